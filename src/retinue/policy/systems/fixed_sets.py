"""A set of experts that serves every token: popularity, chance, and eMoE (arXiv 2503.06823)."""

from typing import Any

from retinue.policy.base import Placement
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.place.chance import Chance
from retinue.policy.place.emoe import Emoe
from retinue.policy.place.marginal import marginal_split
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.preset import Preset
from retinue.policy.route.next_resident import NextResident

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


PRESETS = (
    Preset(
        "popular",
        False,
        "baseline; the miss rule of eMoE, 2503.06823",
        (*_REROUTED, "place: popular"),
        f"{_RULE}{_EVEN}; the set never changes",
        lambda given: _rerouted(Popular()),
        fixed=True,
        profiled=True,
    ),
    Preset(
        "popular-by-task",
        False,
        "baseline; the miss rule and task tables of eMoE, 2503.06823",
        (*_REROUTED, "place: popular by task"),
        f"{_RULE}{_EVEN}; popularity is the profile's, not a predictor's; requests of several"
        " tasks that run at once share the slots by the sum of their tasks' shares",
        lambda given: _rerouted(PopularByTask()),
        fixed=True,
        profiled=True,
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
        lambda given: _rerouted(Emoe(), forecaster="running-mean"),
        fixed=True,
        profiled=True,
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
        lambda given: _rerouted(
            Emoe(marginal_split, weigh=True, worth=WORTH),
            forecaster="running-mean",
            impatient=True,
            fetch_above=0.25,
        ),
        fixed=True,
        profiled=True,
    ),
    Preset(
        "random",
        False,
        "baseline",
        (*_REROUTED, "place: chance"),
        f"{_RULE}{_EVEN}; the set is drawn with a fixed seed",
        lambda given: _rerouted(Chance()),
        fixed=True,
    ),
)
