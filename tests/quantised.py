"""Tiny quantised checkpoints in the forms that are published, and their plain counterparts.

The counterpart's weights come from the quantised bytes by loops over single elements, written from
the formats' definitions: nothing of it is shared with what is tested.
"""

import math
from pathlib import Path
from typing import Any

import torch

import models
from models import Tensors
from retinue.memory.formats import Float8, Mxfp4

# As in the published files of gpt-oss, Qwen3 and DeepSeek-V3.
MXFP4_CONFIG: dict[str, Any] = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
FP8_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.embed_tokens", "model.layers.*.mlp.gate"],
}

# No size is a multiple of 128, and two are larger.
ODD = {"hidden_size": 160, "moe_intermediate_size": 136, "num_hidden_layers": 2}


def to_fp8(source: Path, target: Path, block: tuple[int, int] | None = (128, 128)) -> Path:
    """All linear layers but routers and `lm_head` in FP8; with no block, one scale a tensor."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            result[name] = tensor
            if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
                weights, scales = Float8(block).encode(tensor)
                result |= {name: weights, f"{name}_scale_inv": scales}
        return result

    models.rewrite(source, target, change)
    settings = FP8_CONFIG | {"weight_block_size": list(block) if block else None}
    return models.edit_config(target, quantization_config=settings)


def to_mxfp4(source: Path, target: Path) -> Path:
    """The experts' matrices of a gpt-oss checkpoint in MXFP4, biases and the rest as they are."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                weights, scales = Mxfp4().encode(tensor)
                result |= {f"{name}_blocks": weights, f"{name}_scales": scales}
            else:
                result[name] = tensor
        return result

    models.rewrite(source, target, change)
    return models.edit_config(target, quantization_config=MXFP4_CONFIG)


def plain(source: Path, target: Path, block: tuple[int, int] | None = (128, 128)) -> Path:
    """The counterpart in the model's own type, decoded element by element."""

    def change(tensors: Tensors) -> Tensors:
        result: Tensors = {}
        dtype = tensors["model.embed_tokens.weight"].dtype
        for name, tensor in tensors.items():
            if name.endswith("_blocks"):
                base = name.removesuffix("_blocks")
                experts = zip(tensor, tensors[f"{base}_scales"], strict=True)
                result[base] = torch.stack([mxfp4_by_hand(w, s) for w, s in experts]).to(dtype)
            elif tensor.dtype == torch.float8_e4m3fn:
                result[name] = fp8_by_hand(tensor, tensors[f"{name}_scale_inv"], block).to(dtype)
            elif not name.endswith(("_scales", "_scale_inv")):
                result[name] = tensor
        return result

    models.rewrite(source, target, change)
    return models.edit_config(target, quantization_config=None)


def mxfp4_by_hand(weights: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """weights: [out, groups, 16], scales: [out, groups]; returns [in, out] in fp32."""
    rows = []
    for codes, exponents in zip(weights.tolist(), scales.tolist(), strict=True):
        row = []
        for group, exponent in zip(codes, exponents, strict=True):
            for byte in group:
                row += [e2m1(byte % 16) * e8m0(exponent), e2m1(byte // 16) * e8m0(exponent)]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64).float().T.contiguous()


def fp8_by_hand(
    weights: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """weights: [out, in]; returns the same in fp32."""
    height, width = block or weights.shape
    grid = scales.float().reshape(-(-weights.shape[0] // height), -1)
    rows = [
        [e4m3(code) * grid[i // height, j // width].item() for j, code in enumerate(row)]
        for i, row in enumerate(weights.view(torch.uint8).tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64).float()


def e2m1(code: int) -> float:
    """A sign, two bits of exponent with bias 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1))


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; no infinity, one NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e8m0(code: int) -> float:
    """A power of two; 255 is NaN."""
    return math.nan if code == 255 else 2.0 ** (code - 127)
