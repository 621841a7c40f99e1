"""Quantised checkpoints: which two tensors are one parameter, as `quantization_config` says.

After `explain`, a checkpoint names parameters as the plain one would: what is stored as weights
and scales is one `PackedEntry`, and types that nothing explains are refused by the tensor's name.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from retinue.errors import CheckpointError, Unsupported
from retinue.memory.checkpoint import Checkpoint, TensorEntry
from retinue.memory.formats import Float8, Format, Mxfp4, Transposed
from retinue.memory.layout import Piece

DEFAULT_BLOCK = (128, 128)  # of FP8 checkpoints that do not say

_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

Tensors = dict[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class PackedEntry(TensorEntry):
    """A parameter that is stored in `format`, and its `shape`; the bytes are those of `weights`."""

    format: Format
    weights: TensorEntry
    scales: TensorEntry

    def decode(
        self, read: Callable[[TensorEntry], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor:
        """The whole parameter, its two tensors read by `read`."""
        return self.format.decode(read(self.weights), read(self.scales), dtype)


def packed_piece(parameter: str, entry: PackedEntry, view: torch.Tensor) -> Piece:
    """The piece that `view` shows: `entry`, or one expert of it, perhaps transposed.

    view: over the elements of `entry`, contiguous in its shape. Raises Unsupported when it is cut
    in any other way, because the scales would have to be cut with it.
    """
    shape = entry.shape[-2:]
    index, rest = divmod(int(view.storage_offset()), prod(shape))
    stored = entry.format
    if view.shape != shape or not view.is_contiguous():
        view, stored = view.transpose(0, -1), Transposed(stored)
    if rest or view.shape != shape or not view.is_contiguous():
        raise Unsupported(
            f"`{entry.name}` would have to be cut, which is not served in {stored.name}",
            hint="use the bf16, fp16 or fp32 checkpoint of the model",
        )
    number = index if len(entry.shape) > len(shape) else None
    scales = _part(parameter, entry.scales, number)
    return replace(_part(parameter, entry.weights, number), format=stored, scales=scales)


def _part(parameter: str, entry: TensorEntry, index: int | None) -> Piece:
    if index is None:
        return Piece(parameter, entry, entry.start, entry.stop, entry.shape)
    shape = entry.shape[1:]
    count = prod(shape) * entry.item_bytes
    start = entry.start + index * count
    return Piece(parameter, entry, start, start + count, shape)


def explain(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint` with the tensors of one parameter put together.

    Raises CheckpointError when weights or scales are missing or do not belong together,
    Unsupported for types that `quantization_config` does not explain.
    """
    settings = checkpoint.config.get("quantization_config") or {}
    method = settings.get("quant_method")
    tensors = dict(checkpoint.tensors)
    if method == Mxfp4.name:
        tensors = _pair_mxfp4(tensors)
    elif method == Float8.name:
        tensors = _pair_float8(tensors, Float8(_block(settings)))
    for entry in tensors.values():
        half = entry.dtype == "U8" and entry.name.endswith("_blocks")
        unexplained = half or entry.dtype.startswith("F8_")
        if unexplained and not isinstance(entry, PackedEntry):
            raise Unsupported(
                f"tensor `{entry.name}` has the type `{entry.dtype}`, which the"
                f" `quantization_config` of config.json does not explain (`{method}`)",
                hint="use the checkpoint's own config.json, or its bf16, fp16 or fp32 form",
            )
    return replace(checkpoint, tensors=tensors)


def _pair_mxfp4(tensors: Tensors) -> Tensors:
    """`NAME_blocks` and `NAME_scales` become NAME."""
    result: Tensors = {}
    for name, entry in tensors.items():
        base, _, kind = name.rpartition("_")
        if kind == "scales" and entry.dtype == "U8":
            _partner(tensors, name, f"{base}_blocks")
        elif kind == "blocks":
            scales = _partner(tensors, name, f"{base}_scales")
            result[base] = _packed(base, Mxfp4(), entry, scales)
            if (entry.dtype, scales.dtype) != ("U8", "U8"):
                raise _wrong_type(entry, scales)
        else:
            result[name] = entry
    return result


def _pair_float8(tensors: Tensors, format: Float8) -> Tensors:
    """`NAME` and `NAME_scale_inv` become NAME."""
    result: Tensors = {}
    for name, entry in tensors.items():
        base = name.removesuffix("_scale_inv")
        if base != name:
            weights = _partner(tensors, name, base)
            if weights.dtype != "F8_E4M3" or entry.dtype not in _SCALE_DTYPES:
                raise _wrong_type(weights, entry)
        elif entry.dtype == "F8_E4M3":
            result[name] = _packed(
                name, format, entry, _partner(tensors, name, f"{name}_scale_inv")
            )
        else:
            result[name] = entry
    return result


def _partner(tensors: Tensors, name: str, partner: str) -> TensorEntry:
    if partner not in tensors:
        raise CheckpointError(
            f"tensor `{partner}` is missing, which belongs to `{name}`",
            hint="a shard is missing, or a tool has changed the checkpoint; download it again",
        )
    return tensors[partner]


def _packed(name: str, format: Format, weights: TensorEntry, scales: TensorEntry) -> PackedEntry:
    shape = format.shape(weights.shape, scales.shape)
    if shape is None:
        raise CheckpointError(
            f"tensor `{scales.name}` has the shape {list(scales.shape)}, which does not fit"
            f" {list(weights.shape)} of `{weights.name}` in {format.name}",
            hint="config.json and the weights do not belong together",
        )
    return PackedEntry(
        name, weights.file, weights.dtype, shape, weights.start, weights.stop,
        format, weights, scales,
    )  # fmt: skip


def _wrong_type(weights: TensorEntry, scales: TensorEntry) -> Unsupported:
    return Unsupported(
        f"`{weights.name}` has the type `{weights.dtype}` and `{scales.name}` `{scales.dtype}`",
        hint="served are mxfp4 (U8, U8) and fp8 (F8_E4M3 with floating-point or E8M0 scales)",
    )


def _block(settings: dict[str, Any]) -> tuple[int, int] | None:
    if settings.get("expert_dtype", "fp8") != "fp8":
        raise Unsupported(
            f"experts of the type `{settings['expert_dtype']}` are not served",
            hint="use a checkpoint whose experts are fp8, mxfp4 or bf16",
        )
    block = settings.get("weight_block_size", DEFAULT_BLOCK)
    if block is None:
        return None
    sizes = tuple(block) if isinstance(block, list | tuple) else ()
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise CheckpointError(
            f"`weight_block_size` of config.json is `{block}`", hint="two sizes, as [128, 128]"
        )
    return sizes[0], sizes[1]
