"""Every preset: a named combination of policies, with its source and how we deviate from it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from retinue.errors import UsageError
from retinue.policy.base import NoPredictor, Placement, Policies
from retinue.policy.evict.pace import Pace
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.place.chance import Chance
from retinue.policy.place.emoe import Emoe
from retinue.policy.place.marginal import marginal_split
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.predict.next_gate import NextGate
from retinue.policy.predict.whole_layer import WholeLayer
from retinue.policy.route.next_resident import NextResident


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


_REROUTED = ("evict: recency", "predict: nothing", "miss: fetch nothing", "route: next resident")
_RULE = (
    "a token whose expert is not resident goes to the next resident one in its router's ranking,"
    " and the family's own rule makes the weights"
)
_EVEN = "; slots are split evenly over the layers"
WORTH = 1.0  # whole tokens of a layer that a read of the placement has to save


def _rerouted(placement: Placement, **settings: Any) -> Policies:
    """A set of experts that serves every token. Only the self-check at load fetches all."""
    return Policies(Recency(), NoPredictor(), FetchAll(), NextResident(), placement, **settings)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "auto",
            True,
            "the best exact combination that we measured",
            (
                "evict: pace",
                "predict: next gate",
                "miss: fetch all",
            ),
            "look-ahead reads only while the disk would be idle",
            lambda: Policies(Pace(), NextGate(), FetchAll()),
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
        Preset(
            "popular",
            False,
            "baseline; the miss rule of eMoE, 2503.06823",
            (*_REROUTED, "place: popular"),
            f"{_RULE}{_EVEN}; the set never changes",
            lambda: _rerouted(Popular()),
        ),
        Preset(
            "popular-by-task",
            False,
            "baseline; the miss rule and task tables of eMoE, 2503.06823",
            (*_REROUTED, "place: popular by task"),
            f"{_RULE}{_EVEN}; popularity is the profile's, not a predictor's; requests of several"
            " tasks that run at once share the slots by the sum of their tasks' shares",
            lambda: _rerouted(PopularByTask()),
        ),
        Preset(
            "emoe",
            False,
            "eMoE, 2503.06823",
            (*_REROUTED, "place: emoe", "forecast: running-mean"),
            f"{_RULE}{_EVEN}; starts with the profile's most popular experts, not all; a set"
            " changes between steps, so that no layer waits for reads; forecasts by a running"
            " mean of the task's prompts, which serves as well or better (`--forecaster emoe-a` and"
            " `emoe-l` are the paper's)",
            lambda: _rerouted(Emoe(), forecaster="running-mean"),
        ),
        Preset(
            "emoe-fetch",
            False,
            "beyond eMoE, 2503.06823; fetching by score as in HOBBIT, 2411.01433",
            (
                *_REROUTED[:2],
                "miss: fetch above 0.25",
                _REROUTED[3],
                "place: emoe",
                "forecast: running-mean",
            ),
            "slots go where they save the most routing weight, weighed by what wrong routing does"
            " to the layer; an expert replaces another one only where that is worth the read;"
            " forecasts come sooner after a change, until which other tasks find the set as it is;"
            " a missing expert with more than a quarter of its token's routing weight is fetched,"
            " for others the next resident one serves",
            lambda: _rerouted(
                Emoe(marginal_split, weigh=True, worth=WORTH),
                forecaster="running-mean",
                impatient=True,
                fetch_above=0.25,
            ),
        ),
        Preset(
            "random",
            False,
            "baseline",
            (*_REROUTED, "place: chance"),
            f"{_RULE}{_EVEN}; the set is drawn with a fixed seed",
            lambda: _rerouted(Chance()),
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called `name`. Raises UsageError that lists the known ones."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset: `{name}`", hint=f"known: {', '.join(PRESETS)}")
    return PRESETS[name]
