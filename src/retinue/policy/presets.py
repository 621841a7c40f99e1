"""Every preset by its name, whatever its source. A preset of its own is a row in `systems/`."""

from retinue.errors import UsageError
from retinue.policy.outside import outside
from retinue.policy.preset import Preset
from retinue.policy.systems import approximate, baselines, exact, fixed_sets, learning, oracle

_TABLES = (
    baselines.PRESETS,
    exact.PRESETS,
    learning.PRESETS,
    oracle.PRESETS,
    fixed_sets.PRESETS,
    approximate.PRESETS,
)
PRESETS = {row.name: row for table in _TABLES for row in table}


def preset(name: str) -> Preset:
    """The preset called `name`, or one from outside the tree, `./my_policy.py:PRESET`.

    Raises UsageError that lists the known ones, or says what is wrong with that from outside.
    """
    if ":" in name:
        found = outside(name)
        if found.name in PRESETS:
            raise UsageError(
                f"`{name}` calls itself `{found.name}`, as one of ours does",
                hint="give it a name of its own",
            )
        return found
    if name not in PRESETS:
        raise UsageError(
            f"unknown preset: `{name}`",
            hint=f"known: {', '.join(PRESETS)}",
        )
    return PRESETS[name]
