"""What the predicted routing paths say of the coming layers, the most probable first.

ExpertFlow (arXiv 2410.17954). Deviation: three layers ahead, since what is farther
would only wait in the queue. A wrong one is mended at once: what the router then chooses overtakes
what is read ahead, for every preset.
"""

from retinue.policy.base import Signal, View
from retinue.policy.predict.likely import likely
from retinue.policy.watch.paths import Paths
from retinue.types import Demand, Want

DEPTH = 3


class AlongPaths:
    """Forecasts from `paths`, which somebody else shows what runs."""

    needs: frozenset[Signal] = frozenset()
    depth = DEPTH
    speculative = True

    def __init__(self, paths: Paths) -> None:
        self._paths = paths

    def observe(self, demand: Demand, view: View) -> None:
        """`paths` see it."""

    def forecast(self, view: View) -> list[Want]:
        """Each token's most probable experts in the coming layers, the nearest layer first."""
        chances = self._paths.chances
        if chances is None:
            return []
        row = self._paths.row
        return [
            likely(ahead.layer, chances[:, row[ahead.layer]], view.top_k) for ahead in view.ahead
        ]
