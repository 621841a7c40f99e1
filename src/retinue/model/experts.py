"""The experts function that transformers calls: demand, plan, run residents, wait, run the rest.

Each expert's output goes to rows of its own, and the rows are summed in router order, in fp32, at
the end. So the result does not depend on what was resident, on the order in which reads finish,
nor on how a layer was cut into waves.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from retinue.errors import Cancelled
from retinue.memory.cache import LOADING, ExpertCache
from retinue.memory.mover import Urgency
from retinue.metrics import Metrics
from retinue.model.accounts import Accounts
from retinue.model.exchange import Exchange
from retinue.model.expert_map import ExpertsModule
from retinue.model.kernels import ExpertKernel
from retinue.model.restriction import Restriction
from retinue.model.routing import Router
from retinue.model.work import NativeWork, Work
from retinue.policy.base import Ahead, BoolArray, Choice, Running
from retinue.policy.miss.book import Books, Served, Shares
from retinue.policy.policies import Policies
from retinue.types import Demand, FloatArray, IntArray, Phase

IMPLEMENTATION = "retinue"
Result = TypeVar("Result")
# Sees (layer, hidden, index, weights) of every layer that runs.
Watch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
RECENT_STEPS = 4
WAIT_S = 0.1  # how often a stalled layer looks whether its request was cancelled


class ExpertHost:
    """Runs the experts of one model out of one cache. `stop` is asked once a layer and in waits.

    `begin` is told of the requests that run, before a step; returns the bytes that it read.
    `observe` is told what a prompt used when it is done: its task, [layers, experts] of weight.
    `restriction` stands between the routers and an approximate preset's routing; while it is
    active, `books` say who serves and what is fetched. Raises Unsupported where the routers do not
    obey it. `accounts` say what the last pass was for each of its requests.
    `kernels` run the layers that they can; torch runs the others.
    """

    def __init__(
        self,
        modules: Sequence[ExpertsModule],
        routers: Sequence[Router | None],
        cache: ExpertCache,
        policies: Policies,
        metrics: Metrics,
        kernels: Mapping[int, ExpertKernel] | None = None,
    ) -> None:
        self.cache, self.metrics = cache, metrics
        self.kernels = kernels or {}
        self.stop: Callable[[], bool] = lambda: False
        self.begin: Callable[[Sequence[Running]], int] = lambda running: 0
        self.observe: Callable[[str | None, FloatArray], None] = lambda task, used: None
        self.watch: Watch | None = None
        self.last_missed = np.full_like(cache.last_used, -1)  # step, when it was asked for
        self.restriction: Restriction | None = None
        self.accounts = Accounts(*cache.slot_of.shape)
        self.books = Books(policies.fetch_above, (len(cache.slot_of), cache.experts))
        self._served: dict[int, Served] = {}  # by the books, and not computed yet
        if not policies.routing.exact:
            self.accounts.on = True
            self.restriction = Restriction(routers, modules, policies.routing, self._serve)
        self._policies = policies
        self._modules = {found.layer: found.module for found in modules}
        order = [found.layer for found in modules]
        self._following = dict(pairwise(order))
        self._routers = dict(zip(order, routers, strict=True))
        for found in modules:
            found.module.retinue_run = _Layer(self, found)  # type: ignore[assignment]

    @property
    def restricted(self) -> bool:
        """Whether residents serve tokens now whose experts are not there."""
        return self.restriction is not None and self.restriction.active

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
        router = self._routers.get(layer)
        return _probabilities(router, hidden) if router is not None else None

    def next_scores(self, layer: int, hidden: torch.Tensor) -> FloatArray | None:
        """What the router after `layer` says of `layer`'s input: probabilities [tokens, experts].

        None after the last layer and where that router cannot be asked.
        """
        router = self._routers.get(self._following.get(layer, -1))
        return _probabilities(router, hidden) if router is not None else None

    def place(self, wanted: BoolArray, popularity: Shares) -> int:
        """Make exactly `wanted` [layers, experts] resident, between passes; returns bytes read.

        popularity: what is known of each one's share of routing weight; broadcasts to `wanted`.
        Raises the error of a read that failed.
        """
        self.books.astray = True
        read = self.cache.place(wanted)
        self.books.place(wanted, popularity)
        return read

    def begin_pass(self, phase: Phase, rows: Sequence[int]) -> None:
        """A forward pass starts, with `rows[i]` tokens of its i-th request.

        Brings the cache back to where the books stand, should the last pass have failed. Raises
        the error of a read that failed.
        """
        self._served.clear()
        self.accounts.begin(rows, phase)
        self.cache.begin_step(phase)
        if self.restricted and self.books.astray:
            self.cache.place(self.books.there())
            self.books.astray = False

    def end_pass(self, *, succeeded: bool) -> None:
        """The pass has ended. One that failed changes neither books nor, in effect, the cache."""
        if succeeded:
            self.books.commit()
        else:
            self.books.abandon()
            self.cache.cancel_all()

    def close(self) -> None:
        """Let go of the network. Without that the weights live until a garbage collection."""
        for module in self._modules.values():
            module.retinue_run = None  # type: ignore[assignment]
        if self.restriction is not None:
            self.restriction.close()
        self.watch = None
        self.begin = lambda running: 0
        self.observe = lambda task, used: None
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
        cache = self.cache
        settled = cache.holds_everything and cache.has_all(layer)
        kernel = self.kernels.get(layer)
        if settled and kernel is not None and len(hidden) == 1 and not self.restricted:
            return self._run_token(kernel, layer, hidden, index, weights)
        work = self._work(layer, hidden, index, weights)
        if self.restricted:
            return self._run_restricted(layer, work)
        if self.accounts.on:
            self.accounts.choose(layer, index.numpy(), weights.float().numpy())
        if settled:
            self.metrics.count(layer, len(work.experts))
            return self._run_resident(layer, work)
        demand = work.demand(layer)
        cache.begin_layer(layer)
        slots = cache.lookup(layer, demand.experts)
        self._count(layer, demand.experts, slots)
        self.metrics.now.repeated += _repeated(cache, demand)
        with cache.lease(layer, demand.experts) as lease:
            missing = self._start_reads(demand, slots, hidden)
            cache.touch(demand, len(hidden))
            todo = set(demand.experts.tolist())
            while todo:
                ready = [e for e in todo if cache.slot_of[layer, e] >= 0]
                if not ready:
                    missing = self._stall(layer, todo, missing)
                # While some wait for room, they ask again as soon as one more may leave.
                for some in [[e] for e in ready] if len(missing) or not ready else [ready]:
                    self._timed(work.compute, some, cache.use(layer, some))
                    todo.difference_update(some)
                    lease.release(some)
                    if len(missing):
                        cache.poll()
                        missing = cache.fetch(layer, missing)
        return self._timed(work.result)

    def _run_token(
        self,
        kernel: ExpertKernel,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """One token in a layer that nothing can evict: what decoding mostly is in memory."""
        experts = index[0].numpy()
        there = experts < self.cache.experts
        if not there.all():
            experts = experts[there]
        self.metrics.count(layer, len(set(experts.tolist())))
        self.cache.mark_used(layer, experts)
        slots = self.cache.use(layer, experts)
        ranks = np.flatnonzero(there)
        return self._timed(kernel.run_token, experts, slots, ranks, hidden, weights)

    def _run_resident(self, layer: int, work: Work) -> torch.Tensor:
        """A layer whose experts are there: there is nothing to ask and nothing to read."""
        self.cache.mark_used(layer, work.experts)
        experts = work.experts.tolist()
        self._timed(work.compute, experts, self.cache.use(layer, experts))
        return self._timed(work.result)

    def _run_restricted(self, layer: int, work: Work) -> torch.Tensor:
        """A layer whose experts are there, but for those that the book has fetched."""
        served = self._served.pop(layer, None)
        self._count_rerouted(layer, work.experts, served)
        if served is None or not len(served.fetched):
            assert (self.cache.lookup(layer, work.experts) >= 0).all(), (
                "a router chose what is not resident"
            )
            return self._run_resident(layer, work)
        exchange = Exchange(self.cache, layer, served, work.experts)
        self.cache.mark_used(layer, work.experts)
        with self.cache.lease(layer, work.experts) as lease:
            while not exchange.done:
                ready = exchange.advance()
                if ready:
                    self._timed(work.compute, ready, self.cache.use(layer, ready))
                    lease.release(ready)
                else:
                    self._wait(layer, exchange.needed)
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
        module, kernel, views = self._modules[layer], self.kernels.get(layer), self.cache.views
        if kernel is None:
            return Work(module, views, hidden, index, weights)
        return NativeWork(kernel, module, views, hidden, index, weights)

    def _start_reads(self, demand: Demand, slots: IntArray, hidden: torch.Tensor) -> IntArray:
        """Submit demand reads, then look ahead. Returns the experts that found no room yet."""
        cache, policies = self.cache, self._policies
        view = cache.view()
        policies.predictor.observe(demand, view)
        if policies.predictor.speculative:
            cache.drop_wants(demand.layer, demand.experts)
        missing = policies.miss.fetch(demand, slots >= 0, view)
        left = missing
        if len(missing):
            keep = None
            if cache.phase == "prefill":
                keep = demand.experts[np.argsort(-demand.weight, kind="stable")][: cache.quota]
                cache.settle_in(demand.layer, keep)
            left = cache.fetch(demand.layer, missing, keep)
        if not len(left):
            self._look_ahead(demand.layer, hidden)
        return left

    def _look_ahead(self, layer: int, hidden: torch.Tensor) -> None:
        cache, predictor = self.cache, self._policies.predictor
        prefill = cache.phase == "prefill"
        depth = min(predictor.depth, 1) if prefill else predictor.depth
        ahead: list[Ahead] = []
        following = self._following.get(layer)
        while following is not None and len(ahead) < depth:
            ahead.append(Ahead(following, self._scores(following, hidden)))
            following = self._following.get(following)
        if not ahead:
            return
        limit = cache.ring if prefill else 2 * cache.top_k
        for want in predictor.forecast(cache.view(tuple(ahead))):
            near = want.layer == ahead[0].layer
            cache.want(want, limit, Urgency.NEXT_LAYER if near else Urgency.LATER)

    def _scores(self, layer: int, hidden: torch.Tensor) -> FloatArray | None:
        """What `layer`'s router says of `hidden`, if the predictor needs it and it matters."""
        router = self._routers[layer]
        wanted = "next_scores" in self._policies.predictor.needs
        if router is None or not wanted or self.cache.has_all(layer):
            return None
        return _probabilities(router, hidden)

    def _stall(self, layer: int, todo: set[int], missing: IntArray) -> IntArray:
        cache = self.cache
        if len(missing):
            missing = cache.fetch(layer, missing)
        self._wait(layer, todo)
        return missing

    def _wait(self, layer: int, awaited: set[int]) -> None:
        """Wait for one of the reads. Raises Cancelled, or the error of one that is `awaited`."""
        cache = self.cache
        cache.raise_failure(layer, awaited)
        if self.stop():
            raise Cancelled("the request was cancelled")
        self.metrics.now.stall_s += cache.wait(WAIT_S)
        cache.raise_failure(layer, awaited)

    def _serve(self, choice: Choice) -> BoolArray:
        """Which experts may serve each token of a restricted layer: [tokens, experts]."""
        served = self._served[choice.layer] = self.books.serve(choice)
        return served.may

    def _count_rerouted(self, layer: int, experts: IntArray, served: Served | None) -> None:
        """Count what the router asked for, not the `experts` that it got."""
        rerouted = self.restriction.take(layer) if self.restriction is not None else None
        counters, accounts = self.metrics.now, self.accounts
        if rerouted is None or served is None:  # they did not come from a router: none is replaced
            self.metrics.count(layer, len(experts))
            return
        wanted = np.unique(rerouted.chosen)
        self._count(layer, wanted, self.cache.lookup(layer, wanted))
        weights = rerouted.weights.sum(axis=1)
        degraded = (rerouted.weights * rerouted.replaced).sum(axis=1)
        self.metrics.count_weight(layer, float(weights.sum()), float(degraded.sum()))
        counters.rerouted += int(np.count_nonzero(rerouted.replaced))
        counters.missed += int(served.missed.sum())
        counters.fetched += len(served.fetched)
        counters.fetched_bytes += self.cache.read_bytes(layer, served.fetched)
        accounts.choose(layer, rerouted.chosen, rerouted.weights)
        accounts.serve(layer, weights, degraded)
        accounts.miss(served.missed, served.reads)

    def _count(self, layer: int, experts: IntArray, slots: IntArray) -> None:
        self.last_missed[layer, experts[slots < 0]] = self.cache.step
        hits, pending = int((slots >= 0).sum()), int((slots == LOADING).sum())
        self.metrics.count(layer, hits, pending, len(slots) - hits - pending)


def _repeated(cache: ExpertCache, demand: Demand) -> int:
    """How many experts of `demand` the last few passes used as well."""
    last = cache.last_used[demand.layer, demand.experts]
    return int(np.count_nonzero((last >= 0) & (last >= cache.step - RECENT_STEPS)))


def _probabilities(router: Router, hidden: torch.Tensor) -> FloatArray:
    scores: FloatArray = torch.softmax(router(hidden)[0].float(), dim=-1).numpy()
    return scores


class _Layer:
    """What an experts module carries: its host and its number."""

    def __init__(self, host: ExpertHost, found: ExpertsModule) -> None:
        self._host, self._layer = host, found.layer

    def __call__(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return self._host.run(self._layer, hidden, index, weights)


def _forward(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return module.retinue_run(hidden, index, weights)  # type: ignore[operator, no-any-return]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
