"""What everything else is compared with: exact presets without a paper of their own."""

from retinue.policy.evict.pace import Pace
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.predict.drift import Drift
from retinue.policy.predict.proven import Proven
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.policy.predict.whole_layer import WholeLayer
from retinue.policy.preset import Preset

PRESETS = (
    Preset(
        "auto",
        True,
        "the best exact combination that we measured",
        (
            "evict: pace",
            "predict: next gate, its drift learnt, ranks that prove right",
            "miss: fetch all",
        ),
        "look-ahead reads only while the disk would be idle, and only while it pays",
        lambda given: Policies(Pace(), Proven(Drift(StackedGates())), FetchAll(), gated=True),
    ),
    Preset(
        "on-demand",
        True,
        "baseline",
        ("evict: recency", "predict: nothing", "miss: fetch all"),
        "",
        lambda given: Policies(Recency(), NoPredictor(), FetchAll()),
    ),
    Preset(
        "layer-stream",
        True,
        "baseline; whole layers in turn, as in 2205.10034 and DeepSpeed's offload",
        ("evict: recency", "predict: whole layer", "miss: fetch all"),
        "with fewer slots than two layers, what finds no room is read when it is needed",
        lambda given: Policies(Recency(), WholeLayer(), FetchAll()),
        slower="it reads every expert of each layer, used or not",
    ),
)
