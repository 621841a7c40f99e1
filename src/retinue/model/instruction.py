"""Operands and instructions, as they are before anything has an address."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from retinue.memory import evaluator as native
from retinue.model.record import Operation, Ref

MOST_DIMENSIONS = 4
TYPES = {
    torch.float32: native.F32,
    torch.bfloat16: native.BF16,
    torch.int64: native.I64,
    torch.bool: native.BOOL,
}
FLOATS = (torch.float32, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Operand:
    """Numbers at an offset of a source's memory, or one number that never changes."""

    source: int
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset_bytes: int = 0
    number: float | None = None


@dataclass(frozen=True, slots=True)
class Instruction:
    """What one `native.INSTRUCTION` will say. Operands: the output, then up to three inputs.

    `b` of a PICK, a ROWS and a TOPK is integers; of a TOPK an output.
    """

    operation: int
    sizes: tuple[int, ...]
    operands: tuple[Operand, ...]
    scalars: tuple[float, ...] = ()


class UnknownError(Exception):
    """This operation, with these arguments, is torch's."""


def operand(ref: Ref, shape: Sequence[int]) -> Operand:
    """`ref` broadcast to `shape`."""
    lead = len(shape) - len(ref.shape)
    pairs = zip(ref.shape, ref.strides, strict=True)
    strides = (0,) * lead + tuple(0 if size == 1 else stride for size, stride in pairs)
    return Operand(ref.source, ref.dtype, strides, ref.offset * ref.dtype.itemsize)


def operand_of(value: Any, shape: Sequence[int]) -> Operand:
    """A tensor broadcast to `shape`, or a number."""
    if isinstance(value, Ref):
        return operand(value, shape)
    if isinstance(value, (bool, int, float)):
        return Operand(0, torch.float32, (0,) * len(shape), number=float(value))
    raise UnknownError


def over(
    kind: int, shape: Sequence[int], operands: Sequence[Operand], scalars: tuple[float, ...] = ()
) -> list[Instruction]:
    """An instruction over every element of `shape`, in as few dimensions as it takes."""
    keep = [d for d, size in enumerate(shape) if size != 1] or [len(shape) - 1]
    sizes = [shape[d] for d in keep] if shape else [1]
    strides = [[o.strides[d] for d in keep] if shape else [0] for o in operands]
    for d in range(len(sizes) - 2, -1, -1):
        if all(s[d] == s[d + 1] * sizes[d + 1] for s in strides):
            sizes[d : d + 2] = [sizes[d] * sizes[d + 1]]
            for s in strides:
                del s[d]
    if len(sizes) > MOST_DIMENSIONS:
        raise UnknownError
    return [instruction(kind, sizes, operands, strides, scalars)]


def instruction(
    kind: int,
    sizes: Sequence[int],
    operands: Sequence[Operand],
    strides: Sequence[Sequence[int]],
    scalars: tuple[float, ...] = (),
) -> Instruction:
    """An instruction whose operands have these strides."""
    pairs = zip(operands, strides, strict=True)
    moved = tuple(replace(one, strides=tuple(own)) for one, own in pairs)
    return Instruction(kind, tuple(sizes), moved, scalars)


def output(operation: Operation) -> Ref:
    """What `operation` gives."""
    return operation.outputs[0]
