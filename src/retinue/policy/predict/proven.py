"""Of another predictor's forecasts, what is worth reading: ranks that have proved right.

A cache keeps what is used, so an expert that is *absent* and named by a forecast is named wrongly
far more often than the forecast as a whole is wrong: on a checkpoint of which a third was resident
the next router's first choice was needed in 92 % of the cases in which it was absent, its third in
49 %, its eighth in 14 %, where 40 % of all eighth choices were. So of each rank it is counted how
often an absent expert was needed, whether it was read or not, and only ranks that prove right often
enough are passed on.

How often that is, the link says. With probability p a read ahead saves the time t of a read, else
it takes t from the reads that are waited for, as far as the link has no time to spare: if it is
busy for a share b of the time, that costs b t. An idle link costs something too, c t: the cores
serve it, and somebody has to leave. So a rank is worth it from p = (b + c) / (1 + b + c) on: on a
link that is never idle more than half of the reads have to be needed, on one that is, a fifth.

No paper's; the fixed numbers of others (two experts in arXiv 2312.17238, a share of the summed
probability in 2411.01433 and 2502.12224) are guesses at the same.
"""

from retinue.policy.base import Checking, Signal, View
from retinue.types import Demand, FloatArray, Want

PARTS = 16  # of a forecast, the likeliest first, that are counted apart
ASIDE = 0.25  # the c above
FADE = 0.98  # what a case still counts after the next one of its part
PRIOR = 4.0  # cases, all of them right, that each part begins with


class Proven:
    """The forecasts of `predictor`, while it decodes, without ranks that are not worth a read."""

    def __init__(self, predictor: Checking) -> None:
        self._predictor = predictor
        self.needs: frozenset[Signal] = predictor.needs
        self.depth, self.speculative = predictor.depth, predictor.speculative
        self._right, self._cases = [PRIOR] * PARTS, [PRIOR] * PARTS
        # By layer: the step of its forecast, who was absent, and in which part each stood.
        self._open: dict[int, tuple[int, list[int], list[int]]] = {}

    def observe(self, demand: Demand, view: View) -> None:
        """Count who was needed of those that the forecast for this layer and step named."""
        self._predictor.observe(demand, view)
        step, absent, parts = self._open.pop(demand.layer, (-1, [], []))
        if step != view.step:
            return
        needed = set(demand.experts.tolist())
        for expert, part in zip(absent, parts, strict=True):
            self._right[part] = FADE * self._right[part] + (expert in needed)
            self._cases[part] = FADE * self._cases[part] + 1

    def forecast(self, view: View) -> list[Want]:
        """What the predictor says, without what is not worth a read."""
        wants = self._predictor.forecast(view)
        if view.phase == "prefill":
            return wants
        tried = [self._tried(want, view) for want in wants]
        return [want for want in tried if len(want.experts)]

    def checks(self, layer: int, view: View) -> bool:
        """Whether the predictor asks."""
        return self._predictor.checks(layer, view)

    def check(self, layer: int, scores: FloatArray) -> None:
        """For the predictor."""
        self._predictor.check(layer, scores)

    def _tried(self, want: Want, view: View) -> Want:
        """The forecast without those who are absent and whose part proves wrong."""
        resident = view.resident[want.layer, want.experts].tolist()
        count = len(resident)
        places = [at for at, there in enumerate(resident) if not there]
        parts = [at * PARTS // count for at in places]
        self._open[want.layer] = view.step, want.experts[places].tolist(), parts
        cost = view.busy + ASIDE
        least = cost / (1 + cost)
        for at, part in zip(places, parts, strict=True):
            resident[at] = self._right[part] >= least * self._cases[part]
        if all(resident):
            return want
        return Want(want.layer, want.experts[resident], want.scores[resident])
