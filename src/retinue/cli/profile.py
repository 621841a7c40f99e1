"""`retinue profile`: what each task does with the model, remembered for the presets that ask."""

from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from retinue.cli.measure import bar, measured, output
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, table
from retinue.engine.profiling import Effort, make_profile, planned
from retinue.errors import UsageError
from retinue.model.profiles import check_profile, default_profile, read_profile, write_profile
from retinue.policy.profile import Profile, TaskCounts

COLUMNS = ("task", "texts", "tokens", "half", "sensitive", "all random", "answer p50", "p90")


def execute(options: Namespace) -> int:
    """Run the texts through the plain model and write the profile; returns the exit code."""
    config = replace(config_from(options), preset="auto", task=None, profile=None)
    above = options.insensitive_above
    if not 0 <= above <= 1:
        raise UsageError(f"insensitive-above is out of range: `{above}`", hint="from 0 to 1")
    effort = Effort(options.sensitivity, above, options.answers, options.costs)
    out = output(options.out) if options.out else None
    merged = read_profile(Path(options.merge)) if options.merge else None
    with measured(options, config) as (assembly, texts):
        if merged is not None:
            check_profile(merged, assembly.facts, Path(options.merge))
        with bar(planned(assembly, texts, effort)) as advance:
            profile = make_profile(assembly, texts, advance, effort)
        file = default_profile(assembly.folder) if out is None else out
    if merged is not None:
        profile = merged.plus(profile)
    write_profile(profile, file)
    print(_text(profile, file), file=audience(options.json))
    if options.json:
        tasks = {name: _document(profile, name) for name in profile.tasks}
        document = {"model": options.model, "out": str(file), "tasks": tasks}
        document["period"] = profile.period
        document["costs"] = asdict(profile.costs) if profile.costs is not None else None
        emit_json(document)
    return 0


def _document(profile: Profile, name: str) -> dict[str, Any]:
    task, answer = profile.tasks[name], profile.output_tokens(name)
    found: dict[str, Any] = {"texts": task.texts, "tokens": task.tokens}
    found["half_share"] = _half(profile, name)
    if task.sensitivity is not None:
        found["sensitive_layers"] = np.flatnonzero(profile.sensitive(name)).tolist()
        for side in ("first", "last", "alone"):
            damages = getattr(task.sensitivity, side)
            found[f"random_{side}"] = {
                str(depth): asdict(damage) for depth, damage in damages.items()
            }
    if answer is not None:
        found["output_tokens"] = asdict(answer) | {"of": _source(task)}
    if task.transitions is not None:
        found["likeness"] = {
            name: getattr(task.transitions, name) for name in ("layers", "prompts", "overlap")
        }
    return found


def _text(profile: Profile, file: Path) -> str:
    rows = [_row(profile, name, task) for name, task in profile.tasks.items()]
    lines = [table(COLUMNS, rows), "", f"half: {HALF}"]
    known = [task.transitions for task in profile.tasks.values() if task.transitions is not None]
    if known:
        layers, prompts = (
            sum(getattr(item, name) for item in known) / len(known)
            for name in ("layers", "prompts")
        )
        lines.append(
            f"likeness: consecutive layers {layers:.2f} (Cramer's V), consecutive prompts of a"
            f" task {prompts:.2f} (correlation)"
        )
    if profile.period is not None:
        lines.append(f"best period: {profile.period} prompts")
    if profile.costs is not None:
        costs = profile.costs
        lines.append(
            f"a pass takes {1e3 * costs.base_s:.3g} ms and {1e3 * costs.token_s:.3g} ms a token;"
            f" a read {1e3 * costs.load_base_s:.3g} ms and {1e3 * costs.load_s:.3g} ms an expert"
        )
    return "\n".join([*lines, "", f"written to {file}"])


HALF = "the share of a layer's experts that takes half of its routing weight"


def _row(profile: Profile, name: str, task: TaskCounts) -> tuple[Any, ...]:
    answer = profile.output_tokens(name)
    sensitive = random = "unknown"
    if task.sensitivity is not None:
        sensitive = f"{profile.sensitive(name).sum()} of {profile.layers} layers"
        damage = task.sensitivity.first.get(max(task.sensitivity.first, default=0))
        random = f"{damage.agreement:.2f} {damage.added_nll:+.2f}" if damage else "unknown"
    lengths = (f"{answer.p50:.0f}", f"{answer.p90:.0f}") if answer is not None else ("", "")
    half = f"{_half(profile, name):.0%}"
    return (name, task.texts, task.tokens, half, sensitive, random, *lengths)


def _half(profile: Profile, task: str) -> float:
    """Which share of a layer's experts takes half of the routing weight, mean over layers."""
    shares = np.sort(profile.shares(task), axis=1)[:, ::-1]
    routed = shares[shares.sum(axis=1) > 0]
    if not len(routed):
        return 0.0
    needed = (np.cumsum(routed, axis=1) < 0.5).sum(axis=1) + 1
    return float(needed.mean() / shares.shape[1])


def _source(task: TaskCounts) -> str:
    return "answers" if task.answers else "continuations"
