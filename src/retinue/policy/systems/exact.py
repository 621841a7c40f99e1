"""Systems that keep every router's choice, and know no more than a profile does."""

from retinue.policy.evict.popularity import ByPopularity
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.evict.ring import Ring
from retinue.policy.miss.cheaper import CheaperPlace
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.miss.hottest import FetchHottest
from retinue.policy.miss.split import SplitMisses
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.predict.correlation import Correlation
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.policy.predict.whole_layer import WholeLayer
from retinue.policy.preset import Given, Preset

SPECULATIVE = 2  # experts of the next layer that mixtral-offloading reads ahead, for each token
ONE_POOL = "slots are one pool, in which a layer may lend what it does not use"
GATED = "reads ahead only while that pays, as measured"


def mixtral_offloading(given: Given) -> Policies:
    """Slots by layer, the least recently used of them, and the next router's two best."""
    return Policies(Quota(Recency()), StackedGates(1, SPECULATIVE), FetchAll(), gated=True)


def se_moe(given: Given) -> Policies:
    """As many layers ahead as there are slots for, beside the one that runs."""
    ahead = given.slots // max(1, given.experts) - 1
    return Policies(Ring(), WholeLayer(max(1, min(ahead, given.layers - 1))), FetchAll())


def klotski(given: Given) -> Policies:
    """Hot experts from the profile's pairs; nothing stays after its use."""
    return Policies(Ring(), Correlation(given.known()), FetchHottest())


def fiddler(given: Given) -> Policies:
    """The profile's most popular experts."""
    return Policies(ByPopularity(given.known()), NoPredictor(), CheaperPlace())


def freetoken(given: Given) -> Policies:
    """The least recently used of all layers; whole layers while a prompt is read."""
    return Policies(Recency(), WholeLayer(1, "prefill"), SplitMisses())


PRESETS = (
    Preset(
        "mixtral-offloading",
        True,
        "Mixtral-offloading, 2312.17238",
        ("evict: recency, by quota", "predict: next gate, two experts", "miss: fetch all"),
        f"{ONE_POOL}; experts are read in the checkpoint's own precision, not in 2 to 4 bits;"
        f" {GATED}",
        mixtral_offloading,
    ),
    Preset(
        "se-moe",
        True,
        "SE-MoE (MoESys), 2205.10034",
        ("evict: ring of layers", "predict: whole layers", "miss: fetch all"),
        "a ring of slots, not of layer buffers; with fewer slots than two layers, what finds no"
        " room is read when it is needed; while it decodes, only so many reads are under way at"
        " once that most of a layer is read when it is needed",
        se_moe,
        slower="it reads every expert of each layer, used or not",
    ),
    Preset(
        "klotski",
        True,
        "Klotski, 2502.06888",
        ("evict: ring of layers", "predict: correlation table", "miss: hottest first"),
        "the requests that decode together are its batches, and nobody plans how many; K is the"
        " model's k; routers are always in memory; experts with few tokens go by their number of"
        " tokens, not by arrival; attention has no part in the schedule",
        klotski,
        profiled=True,
        slower="it keeps no expert after its use, since it is made for many batches at a time",
    ),
    Preset(
        "fiddler",
        True,
        "Fiddler, 2402.07033",
        ("evict: popularity", "predict: nothing", "miss: the cheaper place"),
        "popularity is the profile's; the set comes together as it is first used, and a slot of it"
        " is lent to what is read besides",
        fiddler,
        profiled=True,
        slower="its set never changes, since misses are to be computed where they lie",
        alone="every miss is read; those of the profile's most used experts stay",
    ),
    Preset(
        "freetoken",
        True,
        "FreeToken, 2608.16157",
        ("evict: recency", "predict: whole layer, in prompts", "miss: split by rates"),
        "rates are the cost model's, not measured while link and processor both work; prompts take"
        " the slots that are there, not two buffers of their own",
        freetoken,
        alone="every miss is read, as in `on-demand`; prompts stream whole layers",
    ),
)
