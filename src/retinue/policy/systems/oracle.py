"""What nobody can beat: the preset that knows what will be needed."""

from retinue.policy.evict.belady import Belady
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.preset import Given, Preset


def _belady(given: Given) -> Policies:
    oracle = Belady(given.foreseen())
    return Policies(oracle, NoPredictor(), FetchAll(), watchers=(oracle,), ring=1.0)


PRESETS = (
    Preset(
        "belady",
        True,
        "oracle; Belady's MIN, as in Read-ME, 2410.19123",
        ("evict: farthest next use", "predict: nothing", "miss: fetch all"),
        "knows the future, so that only `retinue simulate` runs it; reads nothing ahead, so that a"
        " preset that does may wait less",
        _belady,
        replayed=True,
    ),
)
