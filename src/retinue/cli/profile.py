"""`retinue profile`: which experts each task uses, remembered for the presets that ask."""

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

from retinue.cli.measure import bar, measured
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, table
from retinue.engine.evaluate import make_profile
from retinue.model.profiles import check_profile, default_profile, read_profile, write_profile
from retinue.policy.profile import Profile


def execute(options: Namespace) -> int:
    """Run the texts through the plain model and write the profile; returns the exit code."""
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    merged = read_profile(Path(options.merge)) if options.merge else None
    with measured(options, config) as (assembly, texts):
        if merged is not None:
            check_profile(merged, assembly.facts, Path(options.merge))
        with bar(len(texts)) as advance:
            profile = make_profile(assembly, texts, advance)
        file = Path(options.out) if options.out else default_profile(assembly.folder)
    if merged is not None:
        profile = merged.plus(profile)
    write_profile(profile, file)
    print(_text(profile, file), file=audience(options.json))
    if options.json:
        tasks = {
            name: {"texts": task.texts, "tokens": task.tokens}
            for name, task in profile.tasks.items()
        }
        emit_json({"model": options.model, "out": str(file), "tasks": tasks})
    return 0


def _text(profile: Profile, file: Path) -> str:
    rows = [(name, task.texts, task.tokens) for name, task in profile.tasks.items()]
    return f"{table(('task', 'texts', 'tokens'), rows)}\n\nwritten to {file}"
