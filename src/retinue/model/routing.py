"""Finds each layer's router, so that a look-ahead can ask the next one."""

import torch
from torch import nn

from retinue.model.expert_map import ExpertsModule

ROUTER_NAMES = ("gate", "router")


def find_routers(model: nn.Module, modules: list[ExpertsModule]) -> list[nn.Module | None]:
    """Per experts module the router beside it, or None where look-ahead cannot ask it.

    A capability, not an assumption: a router counts if it maps [tokens, hidden] to a tuple whose
    first element is one number per expert.
    """
    return [_router(model, found) for found in modules]


def _router(model: nn.Module, found: ExpertsModule) -> nn.Module | None:
    block = model.get_submodule(found.name.rpartition(".")[0])
    for name in ROUTER_NAMES:
        router = dict(block.named_children()).get(name)
        if router is not None and _answers(router, found.experts):
            return router
    return None


@torch.inference_mode()
def _answers(router: nn.Module, experts: int) -> bool:
    weight = next(router.parameters(), None)
    if weight is None or weight.ndim != 2:
        return False
    probe = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        logits = router(probe)[0]
    except (TypeError, RuntimeError, IndexError):
        return False
    return isinstance(logits, torch.Tensor) and logits.shape == (1, experts)
