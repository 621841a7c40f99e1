"""What happens between "a layer needs these experts" and "all of them were computed".

One for the live engine and for the simulator: it counts, shows policies what happens, asks them,
starts reads and waits. Whoever drives it computes, or lets a clock run. It belongs to one thread,
and imports no torch.

The order in a layer: watchers and the predictor observe, the miss handler says what is read, and
in which precision; then the predictor is asked for the coming layers, in prompts of gated presets
once the layer has waited for that (see `memory/payback.py`).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np

from retinue.errors import Cancelled
from retinue.memory.base import WAIT_S, Urgency
from retinue.memory.cache import LOADING, ExpertCache
from retinue.memory.payback import Patience, Payback
from retinue.metrics import Metrics
from retinue.policy.base import Ahead, BoolArray, Prompt, Route, View
from retinue.policy.policies import Policies
from retinue.types import Demand, FloatArray, IntArray, Phase, Want

RECENT_STEPS = 4
MOST_ASKED = 64  # tokens of a pass; what more of a prompt choose, these have mostly named
LATELY = 0.1  # what the last pass counts in how busy the link is
# What the router of this layer or of a coming one says of this layer's input, [asked tokens,
# experts]; None: nobody knows. Who is asked for is `asked` of the pass's tokens.
ScoresOf = Callable[[int], FloatArray | None]


def asked(tokens: int) -> slice:
    """Of a pass over `tokens` tokens those by which coming layers are foreseen, evenly spread."""
    return slice(None, None, -(-tokens // MOST_ASKED))


class Attendance:
    """Serves layer after layer out of `cache` as `policies` say.

    routed: the layers with experts, in their order. `stop` is asked in waits, `looked` is told of
    looks ahead. `last_missed` [layers, experts] is the step in which each expert was missing last,
    -1: never. `lowers` says whether the precision policy is asked now; otherwise nothing but the
    own one will do.
    """

    def __init__(
        self, cache: ExpertCache, policies: Policies, routed: Sequence[int], metrics: Metrics
    ) -> None:
        self.cache, self.policies, self.metrics = cache, policies, metrics
        self.stop: Callable[[], bool] = lambda: False
        self.looked: Callable[[], None] = lambda: None
        self.lowers = True
        self.last_missed = np.full_like(cache.last_used, -1)
        self.following = dict(pairwise(routed))
        self._watchers, self.checking = policies.watchers, policies.checking
        self._gated, self._payback, self._patience = policies.gated, Payback(), Patience()
        self._begun_s = self._busy_s = 0.0  # the link's time when the pass started that runs

    def begin(self, prompt: Prompt) -> None:
        """A request has its first pass next."""
        for watcher in self._watchers:
            watcher.begin(prompt)

    def end(self, sequence: int) -> None:
        """A request has ended, whatever way."""
        for watcher in self._watchers:
            watcher.end(sequence)

    def begin_pass(self, phase: Phase) -> None:
        """A forward pass starts."""
        self.cache.begin_step(phase)
        if phase == "decode":
            link = self.cache.reads.link
            self._begun_s, self._busy_s = link.clock(), link.busy()
            if self._gated:
                self._payback.begin(waits=self._patience.pays)

    def attend(
        self,
        demand: Demand,
        tokens: int,
        route: Route | None = None,
        scores_of: ScoresOf | None = None,
    ) -> "Turn":
        """A layer of a pass over `tokens` tokens needs experts: to be used in a `with`.

        `scores_of` is asked for coming layers, if the predictor needs their routers' scores and
        they may lack an expert.
        """
        view = self.cache.begin_layer(demand.layer, route)
        for watcher in self._watchers:
            watcher.observe(demand, view)
        return Turn(self, demand, view, tokens, scores_of)

    @property
    def patience(self) -> Patience | None:
        """How long layers of the running pass that lack experts wait before they look ahead."""
        return self._patience if self._gated and self.cache.phase == "prefill" else None

    @property
    def looks_ahead(self) -> bool:
        """Whether layers of the running pass ask for forecasts at once: while that pays."""
        if not self._gated:
            return True
        return self._patience.pays if self.cache.phase == "prefill" else self._payback.ahead

    def end_layer(self, layer: int) -> None:
        """All of a layer was computed; with the last one, a pass is as good as done."""
        if layer in self.following or self.cache.phase != "decode":
            return
        reads = self.cache.reads
        passed_s = reads.link.clock() - self._begun_s
        if passed_s > 0:
            reads.busy += LATELY * ((reads.link.busy() - self._busy_s) / passed_s - reads.busy)
        if self._gated:
            self._payback.end(passed_s)

    def show(self, demand: Demand, route: Route | None = None) -> None:
        """Let those see it that watch."""
        if self._watchers:
            view = self.cache.begin_layer(demand.layer, route)
            for watcher in self._watchers:
                watcher.observe(demand, view)

    def see(self, demand: Demand, route: Route | None = None) -> None:
        """A layer runs whose experts are all there, and never have to leave."""
        self.show(demand, route)
        self.cache.mark_used(demand.layer, demand.experts)
        self.metrics.count(demand.layer, len(demand.experts))

    def look(self, layer: int, experts: Sequence[int]) -> None:
        """Count `experts` as looked up; nobody reads them here."""
        row = self.cache.rows[layer]
        self.count(layer, experts, [row[expert] for expert in experts])

    def count(self, layer: int, experts: Sequence[int], slots: Sequence[int]) -> int:
        """Count what a layer looked up, `slots` as the cache gives them; returns the hits."""
        hits, pending = 0, 0
        for expert, slot in zip(experts, slots, strict=True):
            if slot >= 0:
                hits += 1
                continue
            pending += slot == LOADING
            self.last_missed[layer, expert] = self.cache.step
        self.metrics.count(layer, hits, pending, len(experts) - hits - pending)
        return hits

    def wait(self, layer: int, awaited: set[int], most_s: float = WAIT_S) -> float:
        """Wait for one of the reads, `most_s` at most. Returns the seconds that passed.

        Raises Cancelled, or the error of one that is `awaited`.
        """
        cache = self.cache
        cache.reads.raise_failure(layer, awaited)
        if self.stop():
            raise Cancelled("the request was cancelled")
        passed_s = cache.wait(min(most_s, WAIT_S))
        self.metrics.now.stall_s += passed_s
        cache.reads.raise_failure(layer, awaited)
        return passed_s


def demand_of(layer: int, chosen: IntArray, weights: FloatArray, experts: int) -> Demand:
    """What tokens need that chose so: [tokens, k] each; ids of `experts` or more mean none."""
    ids, given = chosen.ravel(), weights.ravel()
    if len(chosen) == 1:  # a decoding token, as a rule: each expert once
        order = ids.argsort(kind="stable")
        found = ids[order]
        if found[-1] >= experts:  # those that mean none are the last
            order = order[: np.count_nonzero(found < experts)]
            found = found[: len(order)]
        if (found[1:] > found[:-1]).all():
            return Demand(layer, found, np.ones(len(found), np.int64), given[order])
    there = ids < experts
    distinct, at, tokens = np.unique(ids[there], return_inverse=True, return_counts=True)
    weight = np.bincount(at, weights=given[there], minlength=len(distinct))
    return Demand(layer, distinct, tokens, weight.astype(np.float32))


class Turn:
    """One layer's turn: `ready`, compute them, `computed`, or else `wait`, until nothing is left.

    Within the `with`, what is not computed yet is pinned. `left` is what is to be computed,
    `elsewhere` what is computed where it lies, by who has such a place.
    """

    __slots__ = (
        *("_attendance", "_cache", "_demand", "_experts", "_keep", "_lease", "_missing"),
        *("_patience", "_precision", "_row", "_scores_of", "_tokens", "_view", "_waited_s"),
        *("elsewhere", "left"),
    )

    def __init__(
        self,
        attendance: Attendance,
        demand: Demand,
        view: View,
        tokens: int,
        scores_of: ScoresOf | None,
    ) -> None:
        self._attendance, self._cache, self._demand = attendance, attendance.cache, demand
        self._view, self._tokens, self._scores_of = view, tokens, scores_of
        self._experts: list[int] = demand.experts.tolist()
        self._row = self._cache.rows[demand.layer]
        self._missing: IntArray | None = None  # those that found no room yet
        self._keep: IntArray | None = None  # those that may stay after a prefill
        self._precision: dict[int, int] | None = None  # in which each is read
        self._patience: Patience | None = None  # while it has not looked ahead and still may
        self._waited_s = 0.0
        self.left = set(self._experts)
        self.elsewhere = demand.experts[:0]

    def __enter__(self) -> Self:
        self._lease = self._cache.pin(self._demand.layer, self._experts)
        try:
            self._start()
        except BaseException:
            self._lease.__exit__()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lease.__exit__()
        if error is None:
            self._attendance.end_layer(self._demand.layer)

    def ready(self) -> list[int]:
        """Experts to compute now; while some found no room, half of them, who then make room."""
        row = self._row
        ready = [expert for expert in self.left if row[expert] >= 0]
        return ready if self._missing is None else ready[: -(-len(ready) // 2)]

    def computed(self, experts: Sequence[int]) -> None:
        """`experts` are done, and may leave."""
        self.left.difference_update(experts)
        self._lease.release(experts)
        if self._missing is not None:
            self._cache.poll()
            self._fetch(self._missing)

    def wait(self) -> None:
        """Wait for one of the reads. Raises Cancelled, or the error of a read that failed."""
        cache = self._cache
        # Who is computed makes room at once; besides that, reads that were given up do.
        if self._missing is not None and (cache.spare or not cache.reads.loading):
            self._fetch(self._missing)
        attendance, patience, layer = self._attendance, self._patience, self._demand.layer
        if patience is None:
            attendance.wait(layer, self.left)
        elif self._waited_s < patience.takes_s:
            left_s = patience.takes_s - self._waited_s
            self._waited_s += attendance.wait(layer, self.left, left_s)
        else:
            self._patience, clock = None, cache.reads.link.clock
            started = clock()
            self._look_ahead()
            patience.looked(clock() - started)
            cache.poll()

    # --- what happens before anything is computed

    def _start(self) -> None:
        """Look up, observe, start the reads, look ahead."""
        attendance, cache, demand = self._attendance, self._cache, self._demand
        policies, layer, experts = attendance.policies, demand.layer, self._experts
        worst = None if policies.precision.exact else self._worst()
        row = self._row
        slots = [row[expert] for expert in experts]
        if worst is not None:
            slots = cache.lookup(layer, demand.experts, worst).tolist()
        hits = attendance.count(layer, experts, slots)
        since = max(0, cache.step - RECENT_STEPS)
        attendance.metrics.now.repeated += cache.history.recent(layer, experts, since)
        policies.predictor.observe(demand, self._view)
        if policies.predictor.speculative:
            cache.drop_wants(layer, demand.experts)
        if hits < len(experts):
            self._read(np.array(slots) >= 0)
        if self._missing is None:
            if hits < len(experts) and (patience := attendance.patience) is not None:
                self._patience, patience.pays = patience, False
            elif attendance.looks_ahead:
                self._look_ahead()
        cache.touch(demand, self._tokens)
        checking, scores_of = attendance.checking, self._scores_of
        if checking is not None and scores_of is not None and checking.checks(layer, self._view):
            scores = scores_of(layer)
            if scores is not None:
                checking.check(layer, scores)

    def _worst(self) -> IntArray:
        """The worst precision of each expert that will do: [n]."""
        attendance, demand = self._attendance, self._demand
        worst = np.zeros(len(demand.experts), dtype=np.int64)
        if attendance.lowers:
            worst = attendance.policies.precision.pick(demand, self._view)
        self._precision = dict(zip(self._experts, worst.tolist(), strict=True))
        return worst

    def _read(self, there: BoolArray) -> None:
        """Read those that are not `there` [n], but for what has a place elsewhere."""
        cache, demand, miss = self._cache, self._demand, self._attendance.policies.miss
        if (costs := cache.costs) is not None and costs.elsewhere_s is not None:
            self.elsewhere = miss.elsewhere(demand, there, self._view)
            self.left.difference_update(self.elsewhere.tolist())
            there = there | np.isin(demand.experts, self.elsewhere)
        missing = miss.fetch(demand, there, self._view)
        assert len(missing) == np.count_nonzero(~there), "a thinning leaves experts out"
        if cache.phase == "prefill":
            order = np.argsort(-demand.weight, kind="stable")
            self._keep = demand.experts[order][: cache.division.quota]
            cache.settle_in(demand.layer, self._keep)
        self._fetch(missing)

    def _fetch(self, experts: IntArray) -> None:
        precision = None
        if self._precision is not None:
            precision = np.array([self._precision[expert] for expert in experts.tolist()])
        left = self._cache.fetch(self._demand.layer, experts, self._keep, precision)
        self._missing = left if len(left) else None

    def _look_ahead(self) -> None:
        attendance, cache = self._attendance, self._cache
        predictor, prefill = attendance.policies.predictor, cache.phase == "prefill"
        depth = min(predictor.depth, 1) if prefill else predictor.depth
        following = attendance.following.get(self._demand.layer) if depth else None
        if following is None:
            return
        attendance.metrics.now.looks += 1
        near, ahead = following, list[Ahead]()
        while following is not None and len(ahead) < depth:
            ahead.append(Ahead(following, self._scores(following)))
            following = attendance.following.get(following)
        limit = cache.division.ring if prefill else 2 * cache.top_k
        view = cache.view(tuple(ahead), self._view.route)
        for want in predictor.forecast(view):
            urgency = Urgency.NEXT_LAYER if want.layer == near else Urgency.LATER
            cache.want(want, limit, urgency, self._ahead_in(want, view))
        attendance.looked()

    def _scores(self, layer: int) -> FloatArray | None:
        """What `layer`'s router says, if the predictor needs it and it matters."""
        wanted = "next_scores" in self._attendance.policies.predictor.needs
        if self._scores_of is None or not wanted or self._cache.has_all(layer):
            return None
        return self._scores_of(layer)

    def _ahead_in(self, want: Want, view: View) -> IntArray | None:
        precision = self._attendance.policies.precision
        lowers = self._attendance.lowers and not precision.exact
        return precision.pick_ahead(want, view) if lowers else None
