"""Finds each layer's router, so that a look-ahead can ask the next one, and how many it chooses."""

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from retinue.model.expert_map import ExpertsModule
from retinue.model.linear import product
from retinue.types import FloatArray

PROBE_TOKENS = 3
ROUTER_NAMES = ("gate", "router")
# How modules and configurations call the number of experts that a token is routed to.
TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_top_k",
    "moe_k",
)


class Router:
    """A layer's own router, asked from outside: hidden [tokens, hidden] -> (logits, ...).

    Some take, besides the tokens, what the block around them keeps, such as a bias per expert.
    """

    def __init__(self, router: nn.Module, block: nn.Module) -> None:
        self.module = router
        names = list(inspect.signature(router.forward).parameters.values())[1:]
        wanted = [
            p.name for p in names if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        self._extra = [(name, block) for name in wanted]

        self.gives_probabilities = False  # instead of logits, see `find_routers`
        # Its weight [experts, hidden], if all that it does before it chooses is a product with it.
        self.weight: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What it says of each token before it chooses: [tokens, experts]."""
        if self.weight is not None and hidden.dtype == self.weight.dtype:
            return product(hidden, self.weight)
        return self(hidden)[0]

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        extra = {name: getattr(block, name) for name, block in self._extra}
        out = self.module(hidden, **extra)
        return out if isinstance(out, tuple) else (out,)


def find_routers(model: nn.Module, modules: list[ExpertsModule]) -> list[Router | None]:
    """Per experts module the router beside it, or None where look-ahead cannot ask it.

    A capability, not an assumption: a router counts if it maps [tokens, hidden] to one number
    per expert, alone or first in a tuple.
    """
    return [_router(model, found) for found in modules]


def _router(model: nn.Module, found: ExpertsModule) -> Router | None:
    block = model.get_submodule(found.name.rpartition(".")[0])
    for name in ROUTER_NAMES:
        module = dict(block.named_children()).get(name)
        if module is None:
            continue
        router = Router(module, block)
        if _answers(router, found.experts):
            return router
    return None


@torch.inference_mode()
def _answers(router: Router, experts: int) -> bool:
    try:
        like = router_input(router, PROBE_TOKENS)
        random = torch.Generator().manual_seed(0)
        given = torch.randn(like.shape, generator=random).to(like.dtype)
        logits = router(given)[0]
    except (StopIteration, TypeError, RuntimeError, IndexError, AttributeError, ValueError):
        return False
    if not isinstance(logits, torch.Tensor) or logits.shape != (PROBE_TOKENS, experts):
        return False
    sums = logits.float().sum(dim=-1)
    router.gives_probabilities = bool((logits >= 0).all() and ((sums - 1).abs() < 1e-2).all())
    router.weight = _plain_weight(router.module, given, logits)
    return True


def _plain_weight(
    module: nn.Module, hidden: torch.Tensor, logits: torch.Tensor
) -> torch.Tensor | None:
    """The router's matrix if `logits` are nothing but its product with `hidden`, to the bit."""
    weights = [p for p in module.parameters() if p.ndim == 2]
    if len(weights) != 1 or weights[0].dtype != hidden.dtype:
        return None
    plain = functional.linear(hidden, weights[0])
    same = plain.dtype == logits.dtype and plain.equal(logits) and bool(plain.any())
    return weights[0] if same else None


def probabilities(router: Router, hidden: torch.Tensor) -> FloatArray:
    """What `router` says of each token before it chooses: [tokens, experts], each row adds to 1."""
    said: FloatArray = router.logits(hidden).float().numpy()
    if router.gives_probabilities:
        return said
    # Not by torch, as for a token the calls take longer than the work.
    powers: FloatArray = np.exp(said - said.max(axis=1, keepdims=True))
    powers /= powers.sum(axis=1, keepdims=True)
    return powers


def router_input(router: Router, tokens: int) -> torch.Tensor:
    """Zeros of the shape and type that `router` takes: [tokens, hidden]."""
    weight = next(p for p in router.module.parameters() if p.ndim == 2)
    return torch.zeros(tokens, weight.shape[1], dtype=weight.dtype, device=weight.device)


def top_k(model: nn.Module, config: Any, modules: list[ExpertsModule]) -> int:
    """The most experts of one module that a token is routed to.

    The module beside the experts knows it, or else the configuration; where neither says a number
    that is possible, it is every expert.
    """
    return max(next(_numbers(model, config, found), found.experts) for found in modules)


def _numbers(model: nn.Module, config: Any, found: ExpertsModule) -> Iterator[int]:
    block = model.get_submodule(found.name.rpartition(".")[0])
    for owner in (block, *block.children(), config):
        for name in TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int) and 0 < value <= found.experts:
                yield value
