"""Between routers and policies: full scores out, a policy's ranking back in, no code per family.

A router is run as it is and watched: the one `torch.topk` over all experts is where it chooses.
Where a policy ranks otherwise, the router runs once more, and that `topk` chooses by the policy's
ranking but still returns the router's own values, so that normalisation, scaling and gating stay
the family's. Whether a family's routers obey is probed at load, never assumed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from retinue.errors import Unsupported
from retinue.model.expert_map import ExpertsModule
from retinue.model.routing import Router, router_input
from retinue.policy.base import BoolArray, Choice, Routing
from retinue.types import FloatArray, IntArray

PROBE_TOKENS = 5


class _Pick(NamedTuple):
    """A router's output and what it says: ids and weights [tokens, k]."""

    output: Any
    experts: torch.Tensor
    weights: torch.Tensor


@dataclass(slots=True)
class Rerouted:
    """What one layer's router chose in one step, and where that was not to be had."""

    chosen: IntArray  # [tokens, k], the experts that the router itself chose
    weights: FloatArray  # [tokens, k]
    replaced: BoolArray  # [tokens, k], where another expert served


class Restriction:
    """Lets a routing policy choose for the routers of one model, while it is `active`.

    `serve(choice)` says which experts may serve each token, or where the policy does not restrict
    are there, [tokens, experts].
    `close` gives the routers back as they were.
    """

    def __init__(
        self,
        routers: Sequence[Router | None],
        modules: Sequence[ExpertsModule],
        routing: Routing,
        serve: Callable[[Choice], BoolArray],
    ) -> None:
        self.active = False
        self._routing, self._serve = routing, serve
        self._rerouted: dict[int, Rerouted] = {}
        self._routers: list[nn.Module] = []
        for router, found in zip(routers, modules, strict=True):
            if router is None:
                raise _disobeys(found, "it cannot be asked on its own")
            probe(router, found)
            self._wrap(router.module, found)

    def take(self, layer: int) -> Rerouted | None:
        """What became of the layer's last routing, once; None when it was not restricted."""
        return self._rerouted.pop(layer, None)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, the routers choose for themselves."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def close(self) -> None:
        """Give the routers back as they were."""
        for router in self._routers:
            del router.forward  # the instance's own; the class's shows again
        self._routers.clear()

    def _wrap(self, router: nn.Module, found: ExpertsModule) -> None:
        plain = router.forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return plain(hidden, *args, **kwargs)
            return self._route(found, hidden, lambda: plain(hidden, *args, **kwargs))

        router.forward = forward
        self._routers.append(router)

    def _route(self, found: ExpertsModule, hidden: torch.Tensor, run: Callable[[], Any]) -> Any:
        with _Watch(found.experts) as watch:
            own = _pick(run(), found)
        scores = watch.scores.float().numpy()
        ids, weights = own.experts.numpy(), own.weights.float().numpy()
        shown = None
        if "hidden" in self._routing.needs:
            shown = hidden.reshape(len(ids), -1).float().numpy()
        choice = Choice(found.layer, scores, ids, weights, shown)
        ranking = self._routing.rank(choice, self._serve(choice))
        if ranking is None:
            served, replaced = own, np.zeros(ids.shape, dtype=bool)
        else:
            with _Watch(found.experts, torch.from_numpy(ranking)):
                served = _pick(run(), found)
            replaced = (ids[:, :, None] != served.experts.numpy()[:, None]).all(axis=2)
        self._rerouted[found.layer] = Rerouted(ids, weights, replaced)
        return served.output


def _pick(output: Any, found: ExpertsModule) -> _Pick:
    """Find ids and weights in a router's output, by type and shape."""
    tensors = [item for item in output if isinstance(item, torch.Tensor)]
    ids = [t for t in tensors if not t.is_floating_point() and t.ndim == 2]
    for index in ids[:1]:
        for weights in tensors:
            if weights.is_floating_point() and weights.shape == index.shape:
                return _Pick(output, index, weights)
    raise _disobeys(found, "it does not return ids and weights of the same shape")


class _Watch(TorchFunctionMode):
    """Sees the router's `topk` over all experts; with `ranking` it chooses by that instead."""

    def __init__(self, experts: int, ranking: torch.Tensor | None = None) -> None:
        super().__init__()
        self._experts, self._ranking = experts, ranking
        self._seen: list[torch.Tensor] = []

    @property
    def scores(self) -> torch.Tensor:
        """What the router ranked by: [tokens, experts]."""
        return self._seen[-1]

    @property
    def count(self) -> int:
        """How often the router chose among all experts."""
        return len(self._seen)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.topk, torch.Tensor.topk):
            return func(*args, **kwargs)
        bound = dict(zip(("input", "k", "dim"), args, strict=False)) | kwargs
        scores = bound["input"] if "input" in bound else bound["self"]
        if (
            scores.ndim != 2
            or scores.shape[1] != self._experts
            or bound.get("dim", -1) not in (-1, 1)
        ):
            return func(*args, **kwargs)
        self._seen.append(scores)
        own = func(*args, **kwargs)
        if self._ranking is None:
            return own
        ranked = torch.topk(self._ranking, own.indices.shape[1], dim=-1).indices
        # A token that gets the experts of its router gets them in its router's order, too: the
        # order of summing is part of the result.
        same = (own.indices.sort().values == ranked.sort().values).all(-1, keepdim=True)
        indices = torch.where(same, own.indices, ranked)
        return torch.return_types.topk((scores.gather(-1, indices), indices))


@torch.inference_mode()
def probe(router: Router, found: ExpertsModule) -> None:
    """Raise Unsupported unless `router` obeys a ranking and is itself where nothing changes."""
    random = torch.Generator().manual_seed(0)
    hidden = router_input(router, PROBE_TOKENS)
    hidden = torch.randn(hidden.shape, generator=random).to(hidden.dtype)
    with _Watch(found.experts) as watch:
        own = _pick(router(hidden), found)
    if watch.count != 1:
        raise _disobeys(found, f"it chooses {watch.count} times, not once, by torch.topk")
    ranking = torch.rand(watch.scores.shape, generator=random)
    with _Watch(found.experts, ranking):
        other = _pick(router(hidden), found)
    wanted = ranking.topk(own.experts.shape[1]).indices
    if not torch.equal(other.experts.sort().values, wanted.sort().values):
        raise _disobeys(found, "it does not keep to the experts that it is told")
    with _Watch(found.experts, watch.scores):
        again = _pick(router(hidden), found)
    if not (torch.equal(again.experts, own.experts) and torch.equal(again.weights, own.weights)):
        raise _disobeys(found, "it does not repeat its own choice")


def _disobeys(found: ExpertsModule, reason: str) -> Unsupported:
    return Unsupported(
        f"the router of layer {found.layer} cannot be restricted: {reason}",
        hint="use an exact preset, such as `auto`",
    )
