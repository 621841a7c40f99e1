"""Systems that trade exactness for reads: lower precisions, fewer experts, other routers."""

import numpy as np

from retinue.policy.evict.frequency_distance import FrequencyDistance
from retinue.policy.evict.known_paths import KnownPaths
from retinue.policy.evict.multidimensional import WEIGHTS, Multidimensional
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.evict.used_here import UsedHere
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.miss.hottest import FetchHottest
from retinue.policy.place.dynamic_split import expected_rooms
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.precision.by_expert import ByExpert
from retinue.policy.precision.by_share import HIGH_UP_TO, ByShare
from retinue.policy.precision.by_token import CAPACITIES, ByToken
from retinue.policy.predict.chosen import Chosen
from retinue.policy.predict.path_dictionary import PathDictionary
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.policy.predict.trail import Trail
from retinue.policy.preset import Given, Preset
from retinue.policy.route.best_resident import BestResident
from retinue.policy.route.cache_prior import LAMBDA, CachePrior
from retinue.policy.route.periodic_set import EVERY, OutsideFirst, PeriodicSet, SetAhead
from retinue.policy.route.pre_gate import PreGate
from retinue.policy.route.whole_path import WholePath
from retinue.policy.thin.calibrated import CalibratedTail
from retinue.policy.thin.missing_tail import SKIP_ABOVE, MissingTail
from retinue.policy.thin.sensitivity import AdaptiveGate
from retinue.policy.uses import SequenceUses

LOOK_AHEAD = 3  # layers, in HOBBIT; the paper takes one to three
_DECODED = (
    "a lower precision is decoded to the checkpoint's own when it arrives, so that it saves"
    " reading and no room"
)


def hobbit(given: Given, high: float = HIGH_UP_TO, skip: float = SKIP_ABOVE) -> Policies:
    """T1 and T2; 1 and 1 are exact."""
    uses = SequenceUses(high)
    weights = given.learned["hobbit"]["weights"] if "hobbit" in given.learned else WEIGHTS
    return Policies(
        Multidimensional(uses, weights),
        StackedGates(LOOK_AHEAD, until_missing=True),
        FetchAll(),
        thinning=MissingTail(skip),
        precision=ByShare(high),
        watchers=(uses,),
    )


def adapmoe(given: Given, tolerance: float | None = None) -> Policies:
    """T, if not what was learnt; 0 is exact."""
    arrays = given.arrays("adapmoe")
    quotas = expected_rooms(arrays, given).astype(np.float32)
    thinning = AdaptiveGate(arrays, given.routed, tolerance)
    return Policies(
        Quota(Recency(), lambda view: quotas), StackedGates(), FetchAll(), thinning=thinning
    )


def edgemoe(given: Given) -> Policies:
    """16 bits for every expert is exact."""
    arrays, trail = given.arrays("edgemoe"), Trail()
    evictor = FrequencyDistance(given.layers, given.experts)
    return Policies(
        evictor,
        PathDictionary(arrays, given.routed, trail),
        FetchAll(),
        precision=ByExpert(arrays, given.routed),
        watchers=(evictor, trail),
    )


def d2moe(given: Given, capacities: tuple[float, float, float] = CAPACITIES) -> Policies:
    """The shares of int8, int4 and int2; none is exact."""
    return Policies(Recency(), StackedGates(), FetchHottest(), precision=ByToken(capacities))


def pre_gated(given: Given) -> Policies:
    """The gates of the layer before."""
    gate = PreGate(given.arrays("pre-gated"), given.routed)
    return Policies(Recency(), Chosen(gate), FetchAll(), gate)


def read_me(given: Given) -> Policies:
    """One router for all layers."""
    path = WholePath(given.arrays("read-me"), given.routed)
    return Policies(KnownPaths(path), Chosen(path, depth=2), FetchAll(), path)


def cache_prior(given: Given, weight: float = LAMBDA) -> Policies:
    """Lambda; 0 is exact."""
    return Policies(Recency(), NoPredictor(), FetchAll(), CachePrior(weight))


def daop(given: Given, kept: int = 1) -> Policies:
    """How many of a token's missing experts are read; all of them is exact."""
    uses = SequenceUses()
    evictor = Quota(UsedHere(uses))
    routing = BestResident(kept, given.top_k)
    return Policies(evictor, StackedGates(), FetchAll(), routing, watchers=(uses,))


def mc_moe_odp(given: Given, quantile: float = 0.5) -> Policies:
    """How many tokens lose the second half of their ranks; 0 is exact."""
    return Policies(Recency(), StackedGates(), FetchAll(), thinning=CalibratedTail(quantile))


def swapmoe(given: Given, every: int = EVERY) -> Policies:
    """Tokens between two sets."""
    periodic = PeriodicSet((given.layers, given.experts), given.slots, given.top_k, every)
    return Policies(OutsideFirst(periodic), SetAhead(periodic), FetchAll(), periodic)


PRESETS = (
    Preset(
        "hobbit",
        False,
        "HOBBIT, 2411.01433",
        (
            "evict: multidimensional",
            "predict: stacked gates, until one is missing",
            "miss: fetch all",
            "thin: missing tail above 0.9",
            "precision: int4 above 0.6",
        ),
        f"{_DECODED}; one set of slots for both precisions",
        hobbit,
        better_with=("hobbit",),
        nested=True,
    ),
    Preset(
        "adapmoe",
        False,
        "AdapMoE, 2408.10284",
        (
            "evict: recency, quotas of a dynamic program",
            "predict: next gate",
            "miss: fetch all",
            "thin: tail below the layer's sensitivity",
        ),
        "top-k instead of top-2: the tail whose share is below the bound is left out; one layer is"
        " looked ahead; slots are one pool, in which layers over their share give first",
        adapmoe,
        learned=("adapmoe",),
    ),
    Preset(
        "edgemoe",
        False,
        "EdgeMoE, 2308.14352",
        (
            "evict: frequency by distance",
            "predict: path dictionary",
            "miss: fetch all",
            "precision: by expert",
        ),
        f"{_DECODED}; k experts a token instead of one: the heaviest stands for a layer in paths;"
        " distance is that to the expert's next turn",
        edgemoe,
        learned=("edgemoe",),
        nested=True,
    ),
    Preset(
        "d2moe",
        False,
        "D2MoE, 2504.15299",
        (
            "evict: recency",
            "predict: next gate",
            "miss: fetch all, hottest first",
            "precision: by token",
        ),
        f"{_DECODED}; widths go by the expert's part of the token's weight, not by a learned"
        " router; planes of 2, 4 and 8 bits; a wider expert is read anew as a whole",
        d2moe,
        nested=True,
    ),
    Preset(
        "pre-gated",
        False,
        "Pre-gated MoE, 2308.12066",
        ("evict: recency", "predict: pre-gate", "miss: fetch all", "route: pre-gate"),
        "only the gates are trained, not the model; weights are those of the layer's own router",
        pre_gated,
        learned=("pre-gated",),
    ),
    Preset(
        "read-me",
        False,
        "Read-ME, 2410.19123",
        ("evict: known paths", "predict: whole path", "miss: fetch all", "route: whole path"),
        "the checkpoint stays as it is: a path names an expert set for each layer; the router reads"
        " the first layer's input; routes are known of the running pass, not of what waits,"
        " which therefore goes by arrival",
        read_me,
        learned=("read-me",),
    ),
    Preset(
        "cache-prior",
        False,
        "Cache-conditional experts, 2412.00099",
        ("evict: recency", "predict: nothing", "miss: fetch all", "route: cache prior"),
        f"lambda is {LAMBDA:g} everywhere; where routers rank by probabilities, their logarithms"
        " count",
        cache_prior,
    ),
    Preset(
        "daop",
        False,
        "DAOP, 2501.10375",
        (
            "evict: used here, even quotas",
            "predict: next gate",
            "miss: fetch all",
            "route: best resident",
        ),
        "what is missing is read, where the paper computes it on the CPU beside a GPU; all layers"
        " are looked ahead at, not from the fifth on",
        daop,
    ),
    Preset(
        "mc-moe-odp",
        False,
        "ODP of MC-MoE, 2410.06270",
        (
            "evict: recency",
            "predict: next gate",
            "miss: fetch all",
            "thin: tail beyond the median",
        ),
        "medians of the tokens seen so far; a token's importance is the norm of its state alone;"
        " the paper's static bit widths are not part of it",
        mc_moe_odp,
    ),
    Preset(
        "swapmoe",
        False,
        "SwapMoE, 2308.15030",
        (
            "evict: outside the set first",
            "predict: the set",
            "miss: fetch all",
            "route: periodic set",
        ),
        f"importance is routing weight alone; the set changes every {EVERY} tokens; slots are split"
        " evenly over the layers",
        swapmoe,
    ),
)
