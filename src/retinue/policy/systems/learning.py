"""Systems that keep every router's choice, and learn: beforehand, while they serve, or both."""

import numpy as np

from retinue.policy.evict.activation import Activation
from retinue.policy.evict.map_frequency import MapFrequency
from retinue.policy.evict.predicted_quota import PredictedQuota
from retinue.policy.evict.quota import Quota
from retinue.policy.evict.recency import Recency
from retinue.policy.evict.recent_score import RecentScore
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.miss.timelines import Timelines
from retinue.policy.policies import Policies
from retinue.policy.predict.activation_match import DEPTH, ActivationMatch
from retinue.policy.predict.along_paths import AlongPaths
from retinue.policy.predict.gain import Gain
from retinue.policy.predict.map_search import MapSearch
from retinue.policy.predict.promoe import Promoe
from retinue.policy.preset import Given, Preset
from retinue.policy.systems.exact import GATED, ONE_POOL
from retinue.policy.watch.activations import Activations
from retinue.policy.watch.expert_maps import DISTANCE, ExpertMaps
from retinue.policy.watch.paths import Paths
from retinue.policy.watch.scores import RecentScores
from retinue.types import FloatArray

STORE_BYTES = 16 << 20  # of what MoE-Infinity and fMoE remember: the budget has no line for it
KEPT = 1000  # matrices or maps at most, as in the code of both


def moe_infinity(given: Given) -> Policies:
    """One collection of matrices for prefetching and eviction."""
    matrices = given.arrays("moe-infinity")["matrices"]
    activations = Activations(_by_layer(matrices, given), _kept(given))
    predictor = ActivationMatch(activations)
    return Policies(Activation(activations), predictor, FetchAll(), watchers=(activations,))


def fmoe(given: Given) -> Policies:
    """One store of maps for prefetching and eviction."""
    arrays = given.arrays("fmoe")
    maps = ExpertMaps(_by_layer(arrays["maps"], given), arrays["embeddings"], _kept(given))
    return Policies(MapFrequency(maps), MapSearch(maps), FetchAll(), watchers=(maps,))


def promoe(given: Given) -> Policies:
    """A network a layer."""
    predictor = Promoe(given.arrays("promoe"), given.routed)
    return Policies(Quota(Recency()), predictor, FetchAll(), gated=True)


def expertflow(given: Given) -> Policies:
    """Paths from token ids, for prefetching, quotas and the order of requests."""
    paths = Paths(given.arrays("expertflow"), given.routed, given.layers)
    return Policies(
        PredictedQuota(paths),
        AlongPaths(paths),
        FetchAll(),
        watchers=(paths,),
        order="alike",
        paths=paths.path,
        gated=True,
    )


def hybrimoe(given: Given) -> Policies:
    """Recent scores for eviction; gains for prefetching."""
    recent = RecentScores()
    return Policies(RecentScore(recent), Gain(), Timelines(), watchers=(recent,))


def _by_layer(rows: FloatArray, given: Given) -> FloatArray:
    """[kept, rows, experts] as [kept, layers, experts]."""
    whole = np.zeros((len(rows), given.layers, rows.shape[2]), np.float32)
    whole[:, given.routed] = rows
    return whole


def _kept(given: Given) -> int:
    """How many matrices or maps of this model may be remembered."""
    return max(1, min(KEPT, STORE_BYTES // max(1, 4 * given.layers * given.experts)))


PRESETS = (
    Preset(
        "moe-infinity",
        True,
        "MoE-Infinity, 2401.14361",
        (
            "evict: activation matrices",
            "predict: the most similar activation matrix",
            "miss: fetch all",
        ),
        f"{DEPTH} layers ahead, and of each as many experts as its tokens can choose, where the"
        " paper queues all that were ever used; the match follows each layer; a batch goes by the"
        f" sum of its requests' matrices; at most {KEPT} matrices and {STORE_BYTES >> 20} MiB",
        moe_infinity,
        learned=("moe-infinity",),
        slower="it reads ahead what an earlier request used, needed or not",
    ),
    Preset(
        "fmoe",
        True,
        "fMoE (FineMoE), 2502.05370",
        ("evict: map and frequency", "predict: expert maps", "miss: fetch all"),
        f"distance {DISTANCE} for every model; a chunk of a prompt has one map, the mean of its"
        " tokens; the search is not asynchronous; a miss overtakes what is read ahead instead of"
        f" pausing it; at most {KEPT} maps and {STORE_BYTES >> 20} MiB",
        fmoe,
        learned=("fmoe",),
        slower="it reads the more ahead the less any stored map is like what runs",
    ),
    Preset(
        "promoe",
        True,
        "ProMoE, 2410.22134",
        ("evict: recency, by quota", "predict: a network a layer", "miss: fetch all"),
        f"{ONE_POOL}; reads are cut into chunks of bytes, not into an expert's three matrices, and"
        " an expert is computed when it is there whole; networks run in the engine's thread; the"
        f" first layers are not foreseen; {GATED}",
        promoe,
        learned=("promoe",),
        slower="it asks a network of each layer about every token of a prompt",
    ),
    Preset(
        "expertflow",
        True,
        "ExpertFlow, 2410.17954",
        (
            "evict: predicted quota",
            "predict: routing paths",
            "miss: fetch all",
            "order: alike",
        ),
        "paths come from a token, the one before it and a fading mean, not from an encoder and"
        " decoder; they are known once a pass begins, so that its first layer is not foreseen;"
        " requests are regrouped, not tokens; the slots of a layer that is done stay until another"
        f" one asks; {GATED}",
        expertflow,
        learned=("expertflow",),
        slower="it asks a network about every token of a prompt before it runs",
    ),
    Preset(
        "hybrimoe",
        True,
        "HybriMoE, 2504.05897",
        ("evict: recent scores", "predict: gain of three gates", "miss: three timelines"),
        "the processor takes no experts over that are cached; alpha is 0.1, which the paper does"
        " not give; of a coming layer the k best experts of each token are candidates",
        hybrimoe,
        slower="it asks three routers in each layer, and reads ahead for all of them",
        alone="every miss is read; its cache and its look-ahead stay",
    ),
)
