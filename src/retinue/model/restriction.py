"""Between routers and policies: full scores out, a policy's choice back in, no code per family.

A router is run as it is and watched: the one `torch.topk` over all experts is where it chooses.
Where a policy chooses otherwise, what the router does from there on is done once more: that `topk`
gives the policy's experts, but still the router's own values, so that normalisation, scaling and
gating stay the family's. In a prepared step these are a few instructions (`program.py`); otherwise
the router runs again, and what it did before is looked up. Whether a family's routers obey is
probed at load, never assumed.
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
from retinue.types import FloatArray, IntArray, Phase

PROBE_TOKENS = 5


class Routed(NamedTuple):
    """One run of a router: what it ranked by, what its `topk` gave, and what it says itself."""

    output: Any
    scores: torch.Tensor  # [tokens, experts]
    values: torch.Tensor  # [tokens, k], of `topk`
    indices: torch.Tensor  # [tokens, k], of `topk`
    experts: torch.Tensor  # [tokens, k]
    weights: torch.Tensor  # [tokens, k]


@dataclass(slots=True)
class Rerouted:
    """What one layer's router chose in one step, and where that was not to be had."""

    chosen: IntArray  # [tokens, k], the experts that the router itself chose
    weights: FloatArray  # [tokens, k]
    replaced: BoolArray  # [tokens, k], where another expert served


class Restriction:
    """Lets a routing policy choose for the routers of one model, while it is `active`.

    `serve(choice)` says which experts may serve each token, or, where the policy does not restrict,
    are there: [tokens, experts]. `close` gives the routers back as they were.
    """

    def __init__(
        self,
        routers: Sequence[Router | None],
        modules: Sequence[ExpertsModule],
        routing: Routing,
        serve: Callable[[Choice], BoolArray],
    ) -> None:
        self.active = False
        self.phase: Phase = "decode"  # of the pass that runs
        self._routing, self._serve = routing, serve
        self._rerouted: dict[int, Rerouted] = {}
        self._routers: list[nn.Module] = []
        for router, found in zip(routers, modules, strict=True):
            if router is None:
                raise _disobeys(found, "it cannot be asked on its own")
            probe(router, found)
            _install(router.module, Watched(self, router.module, found))
            self._routers.append(router.module)

    @property
    def needs_hidden(self) -> bool:
        """Whether the policy chooses by the router's input."""
        return "hidden" in self._routing.needs

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
            del router.retinue_route
        self._routers.clear()

    def choose(self, choice: Choice, own: IntArray) -> IntArray | None:
        """What `topk` is to give instead of `own` [tokens, k]; None: that it is."""
        ranking = self._routing.rank(choice, self._serve(choice))
        chosen = None if ranking is None else _best(ranking, own)
        replaced = (
            np.zeros(own.shape, dtype=bool) if chosen is None else _absent(choice.experts, chosen)
        )
        self._rerouted[choice.layer] = Rerouted(choice.experts, choice.weights, replaced)
        return chosen


class Watched:
    """What a restricted router carries as `retinue_route`, which runs in place of `forward`."""

    def __init__(self, restriction: Restriction, router: nn.Module, found: ExpertsModule) -> None:
        self._restriction, self._found = restriction, found
        self._plain = router.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The router's output, with the policy's choice."""
        if not self._restriction.active:
            return self._plain(*args, **kwargs)
        watch = _Watch(self._found.experts)
        own = self._run(watch, args, kwargs)
        scores, weights = own.scores.float().numpy(), own.weights.float().numpy()
        hidden = None
        if self._restriction.needs_hidden:
            hidden = args[0].reshape(len(scores), -1).float().numpy()
        chosen = self.choose(scores, own.experts.numpy(), weights, own.indices.numpy(), hidden)
        if chosen is None:
            return own.output
        return self._run(watch.again(torch.from_numpy(chosen)), args, kwargs).output

    @property
    def needs_hidden(self) -> bool:
        """Whether the policy chooses by the router's input."""
        return self._restriction.needs_hidden

    def record(self, *args: Any, **kwargs: Any) -> Routed:
        """Run the router as it is, for a recording; nobody chooses."""
        return self._run(_Watch(self._found.experts), args, kwargs)

    def choose(
        self,
        scores: FloatArray,
        experts: IntArray,
        weights: FloatArray,
        indices: IntArray,
        hidden: FloatArray | None = None,
    ) -> IntArray | None:
        """What `topk` is to give instead of `indices`, where the router says this; None: nothing.

        scores: [tokens, experts]; hidden: [tokens, hidden]; the others: [tokens, k].
        """
        if not self._restriction.active:
            return None
        layer, phase = self._found.layer, self._restriction.phase
        choice = Choice(layer, scores, experts, weights, hidden, phase)
        return self._restriction.choose(choice, indices)

    def _run(self, watch: "_Watch", args: Any, kwargs: Any) -> Routed:
        return _run(lambda: self._plain(*args, **kwargs), watch, self._found)


def _install(router: nn.Module, watched: Watched) -> None:
    """Let `router.retinue_route` answer for the router, whoever is there when it is called."""
    router.retinue_route = watched  # type: ignore[assignment]

    def forward(*args: Any, **kwargs: Any) -> Any:
        return router.retinue_route(*args, **kwargs)  # type: ignore[operator]

    router.forward = forward


def _best(ranking: FloatArray, own: IntArray) -> IntArray | None:
    """The k best of each row, the first of equals first: [tokens, k]; None where all are `own`.

    A token that gets the experts of its router gets them in its router's order, too: the order of
    summing is part of the result.
    """
    best = (-ranking).argsort(axis=1, kind="stable")[:, : own.shape[1]]
    if len(best) == 1:
        return None if set(best[0].tolist()) == set(own[0].tolist()) else best
    same = (np.sort(best, axis=1) == np.sort(own, axis=1)).all(axis=1, keepdims=True)
    return None if same.all() else np.where(same, own, best)


def _absent(experts: IntArray, chosen: IntArray) -> BoolArray:
    """Which of `experts` are not among the `chosen` of their token: [tokens, k]."""
    if len(experts) == 1:
        among = chosen[0].tolist()
        return np.array([[expert not in among for expert in experts[0].tolist()]])
    absent: BoolArray = (experts[:, :, None] != chosen[:, None]).all(axis=2)
    return absent


def _run(run: Callable[[], Any], watch: "_Watch", found: ExpertsModule) -> Routed:
    """Run a router under `watch`."""
    with watch:
        output = run()
    if len(watch.seen) != 1:
        raise _disobeys(found, f"it chooses {len(watch.seen)} times, not once, by torch.topk")
    return Routed(output, *watch.seen[0], *_pick(output, found))


def _pick(output: Any, found: ExpertsModule) -> tuple[torch.Tensor, torch.Tensor]:
    """Find ids and weights [tokens, k] in a router's output, by type and shape."""
    tensors = [item for item in output if isinstance(item, torch.Tensor)]
    ids = [t for t in tensors if not t.is_floating_point() and t.ndim == 2]
    for index in ids[:1]:
        for weights in tensors:
            if weights.is_floating_point() and weights.shape == index.shape:
                return index, weights
    raise _disobeys(found, "it does not return ids and weights of the same shape")


class _Watch(TorchFunctionMode):
    """Sees the router's `topk` over all experts: scores, and what it gave.

    `again(indices)` watches a second run on the same input: what came before the `topk` is looked
    up, and the `topk` gives `indices`.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._experts = experts
        self._before: list[Any] = []  # what the calls before the first `topk` returned
        self._known: list[Any] = []  # the same of the run that is repeated
        self._indices: torch.Tensor | None = None

    def again(self, indices: torch.Tensor) -> "_Watch":
        """The watch of the second run; `indices`: [tokens, k]."""
        other = _Watch(self._experts)
        other._known, other._indices = self._before, indices
        return other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        scores = self._scores(args, kwargs) if func in (torch.topk, torch.Tensor.topk) else None
        if scores is None:
            if self.seen:
                return func(*args, **kwargs)
            at = len(self._before)
            self._before.append(self._known[at] if at < len(self._known) else func(*args, **kwargs))
            return self._before[-1]
        if self._indices is None:
            found = func(*args, **kwargs)
        else:
            values = scores.gather(-1, self._indices)
            found = torch.return_types.topk((values, self._indices))
        self.seen.append((scores, found.values, found.indices))
        return found

    def _scores(self, args: Any, kwargs: Any) -> torch.Tensor | None:
        """What this `topk` chooses from, if that is all experts."""
        bound = dict(zip(("input", "k", "dim"), args, strict=False)) | kwargs
        scores: torch.Tensor = bound["input"] if "input" in bound else bound["self"]
        everyone = scores.ndim == 2 and scores.shape[1] == self._experts
        return scores if everyone and bound.get("dim", -1) in (-1, 1) else None


@torch.inference_mode()
def probe(router: Router, found: ExpertsModule) -> None:
    """Raise Unsupported unless `router` obeys a choice and is itself where nothing changes."""
    random = torch.Generator().manual_seed(0)
    hidden = router_input(router, PROBE_TOKENS)
    hidden = torch.randn(hidden.shape, generator=random).to(hidden.dtype)
    watch = _Watch(found.experts)
    own = _run(lambda: router(hidden), watch, found)
    chosen = torch.rand(own.scores.shape, generator=random).topk(own.experts.shape[1]).indices
    other = _run(lambda: router(hidden), watch.again(chosen), found)
    if not torch.equal(other.experts.sort().values, chosen.sort().values):
        raise _disobeys(found, "it does not keep to the experts that it is told")
    for repeated in (watch.again(own.indices), _Watch(found.experts)):
        again = _run(lambda: router(hidden), repeated, found)
        same = torch.equal(again.experts, own.experts) and torch.equal(again.weights, own.weights)
        if not same:
            raise _disobeys(found, "it does not repeat its own choice")


def _disobeys(found: ExpertsModule, reason: str) -> Unsupported:
    return Unsupported(
        f"the router of layer {found.layer} cannot be restricted: {reason}",
        hint="use an exact preset, such as `auto`",
    )
