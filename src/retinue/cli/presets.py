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
        (p.name, "exact" if p.exact else "approximate", p.paper, "; ".join(p.parts))
        for p in PRESETS.values()
    ]
    print(table(("preset", "output", "source", "parts"), rows))
    for preset in PRESETS.values():
        if preset.deviations:
            print(f"\n{preset.name}: {preset.deviations}")
    return 0
