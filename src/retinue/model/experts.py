"""The experts function that transformers calls: demand, plan, run residents, wait, run the rest.

Each expert's output goes to rows of its own, and the rows are summed in router order, in fp32, at
the end. So the result does not depend on what was resident, on the order in which reads finish,
nor on how a layer was cut into waves.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from retinue.errors import Cancelled
from retinue.memory.attendance import Attendance, Turn, asked, demand_of
from retinue.memory.cache import ExpertCache
from retinue.metrics import Metrics
from retinue.model.arrival import Arrival
from retinue.model.changes import Changes, distinct
from retinue.model.exchange import Exchange
from retinue.model.expert_map import ExpertsModule
from retinue.model.kernels import ExpertKernel
from retinue.model.native_layers import Begun, NativeLayers
from retinue.model.restriction import Rerouted
from retinue.model.routing import Router, probabilities
from retinue.model.shown import Shown
from retinue.model.token_work import TokenWork
from retinue.model.work import NativeWork, ViewsOf, Work
from retinue.policy.base import Prompt, Route, Running
from retinue.policy.miss.book import Served
from retinue.policy.policies import Policies
from retinue.types import Demand, FloatArray, IntArray, Phase

IMPLEMENTATION = "retinue"
Result = TypeVar("Result")
# Sees (layer, hidden, index, weights) of every layer that runs.
Watch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


class ExpertHost:
    """Runs the experts of one model out of one cache. `stop` is asked once a layer and in waits.

    `begin` is told of the requests that run, before a step; returns the bytes that it read.
    `observe` is told what a prompt used when it is done: its task, [layers, experts] of weight.
    `embed` gives the mean of tokens' input embeddings, [hidden], where a policy needs it. `changes`
    are those of approximate policies; raises Unsupported where routers do not obey them.
    `kernels` run the layers that they can; torch runs the others, on what `views` shows.
    """

    def __init__(
        self,
        modules: Sequence[ExpertsModule],
        routers: Sequence[Router | None],
        cache: ExpertCache,
        views: "ViewsOf",
        policies: Policies,
        metrics: Metrics,
        kernels: Mapping[int, ExpertKernel] | None = None,
    ) -> None:
        self.cache, self.views, self.metrics = cache, views, metrics
        self.kernels = kernels or {}
        self.begin: Callable[[Sequence[Running]], int] = lambda running: 0
        self.observe: Callable[[str | None, FloatArray], None] = lambda task, used: None
        self.embed: Callable[[Sequence[int]], FloatArray] | None = None
        self.watch: Watch | None = None
        order = [found.layer for found in modules]
        self.attendance = Attendance(cache, policies, order, metrics)
        self.changes = Changes(routers, modules, cache, policies, metrics)
        self.arrival = Arrival(self.attendance, self.changes.books)
        self.native_layers = NativeLayers(modules, self.kernels, cache, metrics)
        self._needs = policies.needs
        self.shown = Shown(policies, self.scores)
        self._lowers = not policies.precision.exact
        self._watched = bool(policies.watchers)
        self._modules = {found.layer: found.module for found in modules}
        self._routers = dict(zip(order, routers, strict=True))
        for found in modules:
            found.module.retinue_run = _Layer(self, found)  # type: ignore[assignment]

    @property
    def stop(self) -> Callable[[], bool]:
        """Says whether nobody wants the running pass any more."""
        return self.attendance.stop

    @stop.setter
    def stop(self, stop: Callable[[], bool]) -> None:
        """Ask `stop` from now on."""
        self.attendance.stop = stop

    @property
    def last_missed(self) -> IntArray:
        """The step in which each expert was missing when it was asked for: [layers, experts]."""
        return self.attendance.last_missed

    @property
    def layers(self) -> int:
        """How many layers have routed experts."""
        return len(self._modules)

    @property
    def sees_ahead(self) -> bool:
        """Whether every layer's router can be asked."""
        return None not in self._routers.values()

    def scores(self, layer: int, hidden: torch.Tensor) -> FloatArray | None:
        """What `layer`'s own router says of its input: probabilities [tokens, experts].

        None where it cannot be asked.
        """
        router, restriction = self._routers.get(layer), self.changes.restriction
        if router is None:
            return None
        if restriction is None:
            return probabilities(router, hidden)
        with restriction.aside():
            return probabilities(router, hidden)

    def enter(self, sequence: int, task: str | None, token_ids: Sequence[int]) -> None:
        """The request of that number has its first pass next."""
        embedding = None
        if "embedding" in self._needs and self.embed is not None and len(token_ids):
            embedding = self.embed(token_ids)
        ids = np.asarray(token_ids, dtype=np.int64)
        self.attendance.begin(Prompt(sequence, task, ids, embedding))

    def leave(self, sequence: int) -> None:
        """The request of that number has ended, whatever way."""
        self.attendance.end(sequence)

    def begin_pass(
        self,
        phase: Phase,
        rows: Sequence[int],
        sequences: Sequence[int] | None = None,
        token_ids: Sequence[int] = (),
    ) -> None:
        """A forward pass over `token_ids` starts, with `rows[i]` of the request `sequences[i]`.

        Raises Cancelled when nobody wants it any more.
        """
        if self.stop():
            raise Cancelled("the request was cancelled")
        self.shown.begin_pass(rows, sequences, token_ids)
        changes = self.changes
        changes.begin_pass(phase, rows)
        self.attendance.lowers = changes.active
        self.attendance.begin_pass(phase)
        watched = self.watch is not None or self.shown.wanted or self._watched
        changed = self._lowers or changes.reroutes or changes.thins
        self.native_layers.allow(phase == "decode" and not watched and not changed)
        if changes.restricted:
            self.arrival.begin_pass()

    def end_pass(self, *, succeeded: bool) -> None:
        """The pass has ended. One that failed changes neither books nor, in effect, the cache."""
        self.changes.end_pass(succeeded=succeeded)
        self.arrival.end_pass(succeeded=succeeded)
        if not succeeded:
            self.cache.cancel_all()

    def close(self) -> None:
        """Let go of the network. Without that the weights live until a garbage collection."""
        for kernel in self.kernels.values():
            kernel.end()  # what an interrupted step has begun: slots are given back next
        for module in self._modules.values():
            module.retinue_run = None  # type: ignore[assignment]
        self.changes.close()
        self.shown.close()
        self.watch = self.embed = None
        self.begin, self.observe = lambda running: 0, lambda task, used: None
        self.stop = lambda: False

    def run(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The routed experts' output for one layer.

        hidden: [tokens, hidden]; index, weights: [tokens, k], ids >= the number of experts are
        skipped. Returns [tokens, hidden] in hidden's type. Raises Cancelled when `stop` says so,
        and the error of a read that failed.
        """
        if self.stop():
            raise Cancelled("the request was cancelled")
        if self.watch is not None:
            self.watch(layer, hidden, index, weights)
        self.arrival.await_layer(layer)
        cache, changes = self.cache, self.changes
        settled = cache.holds_everything and cache.has_all(layer) and not self._lowers
        kernel = self.kernels.get(layer)
        plain = not (self.shown.wanted or changes.reroutes)
        if settled and kernel is not None and len(hidden) == 1 and plain:
            return self._run_token(kernel, layer, hidden, index, weights)
        rerouted = changes.take(layer)
        if rerouted is not None and changes.restricted and not self.shown.wanted:
            return self._run_unseen(kernel, layer, hidden, index, weights, rerouted)
        if not changes.restricted:
            changes.choose(layer, index, weights, rerouted)
        route = self.shown.route(layer, hidden, index, weights, rerouted)
        lost = None
        if changes.thins and route is not None:
            view = cache.begin_layer(layer, route)
            index, weights, lost = changes.thin(index, weights, route, view)
        work = self._work(layer, hidden, index, weights)
        low: set[int] = set()
        if changes.restricted:
            out = self._run_restricted(layer, work, rerouted, route)
        elif settled:
            self.attendance.see(work.demand(layer), route)
            out = self._run_resident(layer, work)
        else:
            out, low = self._run_attended(layer, work, hidden, route)
        if rerouted is not None or (changes.active and route is not None):
            given = weights.float().numpy()
            if low:
                lost = changes.lowered(index, given, low, lost)
            changes.count(layer, given if route is None else route.weights, rerouted, lost)
        return out

    def attend(self, begun: Begun) -> None:
        """A lone token's layer that the library has begun: other threads compute who is there.

        This one keeps the books, looks ahead, and fills the rows that are left. Raises as `run`.
        """
        layer, cache, ids = begun.layer, self.cache, begun.ids[0].tolist()
        kernel, row = self.kernels[layer], cache.rows[layer]
        ready = [expert for expert in ids if row[expert] >= 0]
        try:
            if self.stop():
                raise Cancelled("the request was cancelled")
            cache.use(layer, ready)
            demand = demand_of(layer, begun.ids, begun.weights, cache.experts)
            with self._turn(demand, begun.hidden, None) as turn:
                self._timed(kernel.end)
                turn.computed(ready)
                if turn.left:
                    self._compute(turn, layer, TokenWork(kernel, ids, begun.hidden, begun.rows))
        except BaseException:
            kernel.end()
            raise

    def _run_attended(
        self, layer: int, work: Work, hidden: torch.Tensor, route: Route | None
    ) -> tuple[torch.Tensor, set[int]]:
        """A layer that may lack experts; also, which were computed in a lower precision."""
        with self._turn(work.demand(layer), hidden, route) as turn:
            low = self._compute(turn, layer, work)
        return self._timed(work.result), low

    def _turn(self, demand: Demand, hidden: torch.Tensor, route: Route | None) -> Turn:
        tokens = len(hidden)
        return self.attendance.attend(
            demand, tokens, route, lambda coming: self.scores(coming, hidden[asked(tokens)])
        )

    def _compute(self, turn: Turn, layer: int, work: Work | TokenWork) -> set[int]:
        """Compute all of a turn; returns who was there in a lower precision."""
        cache, low = self.cache, set[int]()
        while turn.left:
            if ready := turn.ready():
                if self._lowers:
                    low.update(e for e in ready if cache.precision[layer, e])
                self._timed(work.compute, ready, cache.use(layer, ready))
                turn.computed(ready)
            else:
                turn.wait()
        return low

    def _run_token(
        self,
        kernel: ExpertKernel,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """One token whose experts are there and stay: what decoding mostly is in memory."""
        experts = index[0].numpy()
        there = experts < self.cache.experts
        if not there.all():
            experts = experts[there]
        if not self.changes.restricted:  # else that is counted with the pass
            self.metrics.count(layer, len(set(experts.tolist())))
        self.cache.mark_used(layer, experts)
        slots = self.cache.use(layer, experts)
        assert min(slots.tolist(), default=0) >= 0, "a router chose what is not resident"
        ranks = np.flatnonzero(there)
        return self._timed(kernel.run_token, experts, slots, ranks, hidden, weights)

    def _run_resident(self, layer: int, work: Work) -> torch.Tensor:
        """A layer whose experts are there: there is nothing to read."""
        experts = work.experts.tolist()
        self._timed(work.compute, experts, self.cache.use(layer, experts))
        return self._timed(work.result)

    def _run_unseen(
        self,
        kernel: ExpertKernel | None,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        rerouted: Rerouted,
    ) -> torch.Tensor:
        """A restricted layer at which nobody looks; it is counted with the whole pass."""
        served, cache = self.changes.take_served(layer), self.cache
        assert served is not None
        self.changes.tally.add(layer, rerouted, served)
        if len(hidden) > 1:
            wanted = distinct(rerouted.chosen, cache.experts)
            self.attendance.look(layer, wanted.tolist())
        elif served.missed[0]:
            wanted = rerouted.chosen[0]
            self.last_missed[layer, wanted[~cache.ready[layer, wanted]]] = cache.step
        if kernel is not None and len(hidden) == 1 and not len(served.fetched):
            return self._run_token(kernel, layer, hidden, index, weights)
        return self._run_served(layer, self._work(layer, hidden, index, weights), served)

    def _run_restricted(
        self, layer: int, work: Work, rerouted: Rerouted | None, route: Route | None
    ) -> torch.Tensor:
        """A restricted layer at which somebody looks."""
        served = self.changes.take_served(layer)
        self.attendance.show(work.demand(layer), route)
        if rerouted is None or served is None:  # they did not come from a router: none is replaced
            self.metrics.count(layer, len(work.experts))
        else:  # what the router asked for counts, not what it got
            wanted = distinct(rerouted.chosen, self.cache.experts)
            self.attendance.look(layer, wanted.tolist())
            self.changes.count_restricted(layer, rerouted, served)
        return self._run_served(layer, work, served)

    def _run_served(self, layer: int, work: Work, served: Served | None) -> torch.Tensor:
        """A layer whose experts are there, but for those that the book has fetched."""
        self.cache.mark_used(layer, work.experts)
        if served is None or not len(served.fetched):
            assert (self.cache.lookup(layer, work.experts) >= 0).all(), (
                "a router chose what is not resident"
            )
            return self._run_resident(layer, work)
        exchange = Exchange(self.cache, layer, served, work.experts)
        with self.cache.pin(layer, work.experts.tolist()) as lease:
            while not exchange.done:
                ready = exchange.advance()
                if ready:
                    self._timed(work.compute, ready, self.cache.use(layer, ready))
                    lease.release(ready)
                else:
                    self.attendance.wait(layer, exchange.needed)
        return self._timed(work.result)

    def _timed(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """What `compute` gives; its time counts as that of routed experts."""
        started = time.perf_counter()
        result = compute(*arguments)
        self.metrics.now.expert_s += time.perf_counter() - started
        return result

    def _work(
        self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> Work:
        module, kernel = self._modules[layer], self.kernels.get(layer)
        views = partial(self.views, layer)
        if kernel is None:
            return Work(module, views, hidden, index, weights)
        return NativeWork(kernel, module, views, hidden, index, weights)


class _Layer:
    """What an experts module carries: its host and its number."""

    def __init__(self, host: ExpertHost, found: ExpertsModule) -> None:
        self._host, self._layer = host, found.layer

    def __call__(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self._host.run(self._layer, hidden, index, weights)

    def attend(self, begun: Begun) -> None:
        """Fill the rows that a step has begun."""
        self._host.attend(begun)


def _forward(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return module.retinue_run(hidden, index, weights)  # type: ignore[operator, no-any-return]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
