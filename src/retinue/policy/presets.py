"""Every preset: a named combination of policies, with its source and how we deviate from it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from retinue.errors import UsageError
from retinue.policy.base import NoPredictor, Policies
from retinue.policy.evict.heat import Heat
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.predict.next_gate import NextGate
from retinue.policy.predict.whole_layer import WholeLayer


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of `retinue presets`."""

    name: str
    exact: bool
    paper: str
    parts: tuple[str, ...]
    deviations: str
    build: Callable[[], Policies]

    def as_dict(self) -> dict[str, Any]:
        """The row without its factory."""
        return {key: value for key, value in asdict(self).items() if key != "build"}


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "auto",
            True,
            "the best exact combination that we measured",
            ("evict: heat", "predict: next gate", "miss: fetch all"),
            "look-ahead reads only while the disk would be idle",
            lambda: Policies(Heat(), NextGate(), FetchAll()),
        ),
        Preset(
            "on-demand",
            True,
            "baseline",
            ("evict: recency", "predict: nothing", "miss: fetch all"),
            "",
            lambda: Policies(Recency(), NoPredictor(), FetchAll()),
        ),
        Preset(
            "layer-stream",
            True,
            "baseline; whole layers in turn, as in 2205.10034 and DeepSpeed's offload",
            ("evict: recency", "predict: whole layer", "miss: fetch all"),
            "with fewer slots than two layers, what finds no room is read when it is needed",
            lambda: Policies(Recency(), WholeLayer(), FetchAll()),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises UsageError that lists the known ones."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset: `{name}`", hint=f"known: {', '.join(PRESETS)}")
    return PRESETS[name]
