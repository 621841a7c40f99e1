"""Every preset by its name, whatever its source. A preset of its own is a row in `systems/`."""

from retinue.errors import UsageError
from retinue.policy.preset import Preset
from retinue.policy.systems import baselines, fixed_sets, oracle

PRESETS = {row.name: row for row in (*baselines.PRESETS, *oracle.PRESETS, *fixed_sets.PRESETS)}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises UsageError that lists the known ones."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset: `{name}`", hint=f"known: {', '.join(PRESETS)}")
    return PRESETS[name]
