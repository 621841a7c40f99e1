"""The experts function that transformers calls: demand, plan, run residents, wait, run the rest.

Each expert's output goes to rows of its own, and the rows are summed in router order, in fp32, at
the end. So the result does not depend on what was resident, on the order in which reads finish,
nor on how a layer was cut into waves.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from retinue.errors import Cancelled
from retinue.memory.cache import LOADING, ExpertCache, Views
from retinue.memory.formats import Packed
from retinue.memory.layout import Block
from retinue.memory.mover import Urgency
from retinue.metrics import Metrics
from retinue.model.expert_map import ExpertsModule
from retinue.model.linear import product
from retinue.model.restriction import Restriction
from retinue.model.routing import Router
from retinue.policy.base import Ahead, BoolArray, Policies
from retinue.types import Demand, FloatArray, IntArray

IMPLEMENTATION = "retinue"
# Sees (layer, hidden, index, weights) of every layer that runs.
Watch = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
WAIT_S = 0.1  # how often a stalled layer looks whether its request was cancelled
SUM_BLOCK_TOKENS = 64  # bounds the rows that are held in fp32


class ExpertHost:
    """Runs the experts of one model out of one cache. `stop` is asked once a layer and in waits.

    `begin` is told the tasks of the requests that run, before a step; returns bytes it read.
    `restriction` stands between the routers and an approximate preset's routing; nothing is
    fetched while it is active. Raises Unsupported where the routers do not obey it.
    """

    def __init__(
        self,
        modules: Sequence[ExpertsModule],
        routers: Sequence[Router | None],
        cache: ExpertCache,
        policies: Policies,
        metrics: Metrics,
    ) -> None:
        self.cache, self.metrics = cache, metrics
        self.stop: Callable[[], bool] = lambda: False
        self.begin: Callable[[Sequence[str | None]], int] = lambda tasks: 0
        self.watch: Watch | None = None
        self.restriction: Restriction | None = None
        if not policies.routing.exact:
            self.restriction = Restriction(routers, modules, policies.routing, self._resident)
        self._policies = policies
        self._modules = {found.layer: found.module for found in modules}
        order = [found.layer for found in modules]
        self._following = dict(pairwise(order))
        self._routers = dict(zip(order, routers, strict=True))
        for found in modules:
            found.module.retinue_run = _Layer(self, found)  # type: ignore[assignment]

    @property
    def restricted(self) -> bool:
        """Whether residents serve every token now, and nothing is fetched."""
        return self.restriction is not None and self.restriction.active

    @property
    def sees_ahead(self) -> bool:
        """Whether every layer's router can be asked."""
        return None not in self._routers.values()

    def next_scores(self, layer: int, hidden: torch.Tensor) -> FloatArray | None:
        """What the router after `layer` says of `layer`'s input: probabilities [tokens, experts].

        None after the last layer and where that router cannot be asked.
        """
        router = self._routers.get(self._following.get(layer, -1))
        return _probabilities(router, hidden) if router is not None else None

    def close(self) -> None:
        """Let go of the network. Without that the weights live until a garbage collection."""
        for module in self._modules.values():
            module.retinue_run = None  # type: ignore[assignment]
        if self.restriction is not None:
            self.restriction.close()
        self.watch = None
        self.begin = lambda tasks: 0
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
        cache, work = self.cache, _Work(self._modules[layer], hidden, index, weights)
        if self.restricted or (cache.holds_everything and cache.has_all(layer)):
            return self._run_resident(layer, work)
        demand = work.demand(layer)
        cache.begin_layer(layer)
        slots = cache.lookup(layer, demand.experts)
        self._count(slots)
        self.metrics.now.repeated += cache.count_repeated(demand)
        with cache.lease(layer, demand.experts) as lease:
            missing = self._start_reads(demand, slots, hidden)
            cache.touch(demand, len(hidden))
            todo = set(demand.experts.tolist())
            while todo:
                ready = [e for e in todo if cache.slot_of[layer, e] >= 0]
                for expert in ready:
                    self._compute(work, layer, expert)
                    todo.remove(expert)
                    lease.release(expert)
                    if len(missing):
                        cache.poll()
                        missing = cache.fetch(layer, missing)
                if not ready:
                    missing = self._stall(layer, todo, missing)
        return self._sum(work)

    def _compute(self, work: "_Work", layer: int, expert: int) -> None:
        views, started = self.cache.use(layer, expert), time.perf_counter()
        work.compute(expert, views)
        self.metrics.now.expert_s += time.perf_counter() - started

    def _sum(self, work: "_Work") -> torch.Tensor:
        started = time.perf_counter()
        result = work.result()
        self.metrics.now.expert_s += time.perf_counter() - started
        return result

    def _run_resident(self, layer: int, work: "_Work") -> torch.Tensor:
        """A layer that nothing can evict: there is nothing to ask and no book to keep."""
        if self.restricted:
            self._count_rerouted(layer, work.experts)
        else:
            self.metrics.now.hits += len(work.experts)
        self.cache.mark_used(layer, work.experts)
        for expert in work.experts.tolist():
            self._compute(work, layer, expert)
        return self._sum(work)

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
        cache.raise_failure(layer, todo)
        if self.stop():
            raise Cancelled("the request was cancelled")
        self.metrics.now.stall_s += cache.wait(WAIT_S)
        cache.raise_failure(layer, todo)
        return missing

    def _resident(self, layer: int, tokens: int) -> BoolArray:
        """Which experts may serve each token of a restricted layer: [tokens, experts]."""
        there = self.cache.slot_of[layer] >= 0
        return np.broadcast_to(there, (tokens, len(there)))

    def _count_rerouted(self, layer: int, experts: IntArray) -> None:
        """Count what the router asked for, not the `experts` that it got."""
        there = self.cache.lookup(layer, experts) >= 0
        assert there.all(), "a restricted router chose an expert that is not resident"
        rerouted = self.restriction.take(layer) if self.restriction is not None else None
        if rerouted is None:  # these did not come from a router: nothing was replaced
            self.metrics.now.hits += len(experts)
            return
        self._count(self.cache.lookup(layer, rerouted.experts))
        counters = self.metrics.now
        counters.routed_weight += rerouted.weight
        counters.degraded_weight += rerouted.degraded
        counters.rerouted += rerouted.missing

    def _count(self, slots: IntArray) -> None:
        counters = self.metrics.now
        hits, pending = int((slots >= 0).sum()), int((slots == LOADING).sum())
        counters.hits += hits
        counters.pending += pending
        counters.misses += len(slots) - hits - pending


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


class _Work:
    """One layer's work in one step: which rows belong to which expert, and their outputs."""

    def __init__(
        self, module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> None:
        self._module, self._hidden, self._weights = module, hidden, weights
        self._tokens, self._k = index.shape
        self._ids = index.reshape(-1).numpy()
        self._count: int = module.num_experts  # type: ignore[assignment]
        order = np.argsort(self._ids, kind="stable")
        self._order = order
        sorted_ids = self._ids[order]
        valid = int(np.searchsorted(sorted_ids, self._count))
        self.experts, starts = np.unique(sorted_ids[:valid], return_index=True)
        spans = pairwise([*starts.tolist(), valid])
        self._spans = dict(zip(self.experts.tolist(), spans, strict=True))
        shape = (self._tokens * self._k, hidden.shape[-1])
        full = valid == len(order)
        self._rows = hidden.new_empty(shape) if full else hidden.new_zeros(shape)

    def demand(self, layer: int) -> Demand:
        """The distinct experts, with their tokens and summed weights."""
        flat = self._weights.reshape(-1).float().numpy()
        weight = np.bincount(
            np.minimum(self._ids, self._count), weights=flat, minlength=self._count + 1
        )
        tokens = np.array([stop - start for start, stop in self._spans.values()], dtype=np.int64)
        return Demand(layer, self.experts, tokens, weight[self.experts].astype(np.float32))

    def compute(self, expert: int, views: Views) -> None:
        """Run one expert on its tokens, into its rows."""
        start, stop = self._spans[expert]
        rows = self._order[start:stop]
        if self._tokens == 1:
            output = apply_expert(self._module, self._hidden, views)[0]
            for row in rows.tolist():  # more than one where a router names an expert twice
                self._rows[row] = output
            return
        at = torch.from_numpy(rows)
        padding = padded_tokens(len(rows)) - len(rows)
        inputs = self._hidden.index_select(0, functional.pad(at // self._k, (0, padding)))
        outputs = apply_expert(self._module, inputs, views)
        self._rows.index_copy_(0, at, outputs[: len(rows)])

    def result(self) -> torch.Tensor:
        """Weight the rows and sum them in router order: [tokens, hidden]."""
        rows = self._rows.view(self._tokens, self._k, -1)
        out = torch.empty_like(self._hidden)
        for start in range(0, self._tokens, SUM_BLOCK_TOKENS):
            block = slice(start, start + SUM_BLOCK_TOKENS)
            out[block] = weighted_sum(rows[block], self._weights[block])
        return out


def padded_tokens(count: int) -> int:
    """The number of rows that `count` tokens are computed as.

    The matrix library compiles a kernel for every number of rows it meets and keeps up to a
    megabyte for each; a prefill of 2,000 tokens met hundreds. With few sizes there are few.
    """
    if count <= 32:
        return 1 << (count - 1).bit_length()
    return -(-count // 32) * 32


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over k of `weights [n, k] * rows [n, k, hidden]`, one after the other, in fp32."""
    scales = weights.float().unsqueeze(-1)
    rows = rows.float()
    total = rows[:, 0] * scales[:, 0]
    for k in range(1, rows.shape[1]):
        total.addcmul_(rows[:, k], scales[:, k])
    return total


def apply_expert(module: nn.Module, inputs: torch.Tensor, views: Views) -> torch.Tensor:
    """One expert's feed-forward network: inputs [n, hidden] -> [n, hidden], in inputs' type.

    `views` holds its parameters in the checkpoint's own type and layout; the module's flags say
    how they are to be read.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _linear(module, inputs, views, up_name)
    activate = module._apply_gate if module.has_gate else module.act_fn
    out = _linear(module, activate(up), views, "down_proj")  # type: ignore[operator]
    return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]


def _linear(module: nn.Module, inputs: torch.Tensor, views: Views, name: str) -> torch.Tensor:
    biases = views.get(f"{name}_bias")
    bias = _whole(biases, inputs.dtype) if biases is not None else None
    blocks = [_product(inputs, block, module.is_transposed) for block in views[name]]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    return out if bias is None else out + bias


def _product(inputs: torch.Tensor, weight: Block, transposed: Any) -> torch.Tensor:
    numbers = in_type(weight, inputs.dtype)
    return product(inputs, numbers.T if transposed else numbers)


def in_type(block: Block, dtype: torch.dtype) -> torch.Tensor:
    """`block` in the type that is computed with. What was packed lives until it was used."""
    return block.decode(dtype) if isinstance(block, Packed) else block.to(dtype)


def _whole(blocks: tuple[Block, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = [in_type(block, dtype) for block in blocks]
    return numbers[0] if len(numbers) == 1 else torch.cat(numbers)


def _forward(
    module: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return module.retinue_run(hidden, index, weights)  # type: ignore[operator, no-any-return]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
