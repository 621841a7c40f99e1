"""`retinue presets`: every preset with its source, parts and deviations."""

from argparse import Namespace

from retinue.cli.terminal import emit_json, table
from retinue.policy.presets import PRESETS


def execute(options: Namespace) -> int:
    """Print the presets; returns the exit code."""
    if options.json:
        emit_json({"presets": [preset.as_dict() for preset in PRESETS.values()]})
        return 0
    rows = [
        (
            p.name,
            "exact" if p.exact else "approximate",
            p.paper,
            ", ".join(p.wants),
        )
        for p in PRESETS.values()
    ]
    print(table(("preset", "output", "source", "needs"), rows))
    for preset in PRESETS.values():
        print(f"\n{preset.name}: {'; '.join(preset.parts)}")
        for title, text in (
            ("deviations", preset.deviations),
            ("where one place computes", preset.alone),
            ("may be slower than on-demand", preset.slower),
        ):
            if text:
                print(f"  {title}: {text}")
    return 0
