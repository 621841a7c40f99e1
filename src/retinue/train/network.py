"""The network of `policy/predict/network.py` once more, in torch and for many prompts at once.

The two forwards are compared by a test; that one explains what is computed.
"""

import torch
from torch.nn import functional

from retinue.policy.predict.network import HEADS, INNER, NORM_FLOOR, PRIOR_FLOOR, blocks_of, shapes

WIDTH, BLOCKS = 32, 1
Arrays = dict[str, torch.Tensor]


def fresh(layers: int, experts: int, tasks: int, generator: torch.Generator) -> Arrays:
    """Weights before training: they say what the profile says."""
    arrays = {}
    for name, shape in shapes(layers, experts, tasks, WIDTH, BLOCKS).items():
        scale = 0.0 if name == "say" else 0.02 if name == "task" else shape[-2] ** -0.5
        arrays[name] = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    return arrays


def logits(
    arrays: Arrays, seen: torch.Tensor, prior: torch.Tensor, task: torch.Tensor, *, layerwise: bool
) -> torch.Tensor:
    """Scores of the experts, [prompts, layers, experts], after `seen` and `prior` of that shape.

    task: [prompts].
    """
    if layerwise:
        seen = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], dim=1)
    rows = torch.einsum("ble,led->bld", seen.sqrt(), arrays["read"])
    rows = rows + arrays["place"] + arrays["task"][task][:, None]
    for block in range(blocks_of(arrays)):
        weights = {name: arrays[f"{name}{block}"] for name in INNER}
        rows = rows + _attend(_norm(rows), weights, layerwise)
        rows = rows + (_norm(rows) @ weights["widen"]).relu() @ weights["narrow"]
    said = torch.einsum("bld,lde->ble", _norm(rows), arrays["say"])
    return torch.log(prior + PRIOR_FLOOR) + said


def _attend(rows: torch.Tensor, weights: Arrays, layerwise: bool) -> torch.Tensor:
    query, key, value = (
        (rows @ weights[name]).view(*rows.shape[:2], HEADS, -1).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=layerwise)
    return mixed.transpose(1, 2).flatten(2) @ weights["mix"]


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return rows / (rows.square().mean(dim=-1, keepdim=True) + NORM_FLOOR).sqrt()
