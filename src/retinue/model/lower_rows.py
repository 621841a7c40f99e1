"""Lowers operations over whole rows: sums, softmax, the largest, and looking up."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from retinue.memory import evaluator as native
from retinue.model.instruction import (
    FLOATS,
    MOST_DIMENSIONS,
    Instruction,
    UnknownError,
    instruction,
    operand,
    operand_of,
    output,
    over,
)
from retinue.model.record import Operation, Ref


def _rows(ref: Ref, axis: int) -> tuple[list[int], list[int]]:
    """Sizes and strides with `axis` last, of up to four dimensions."""
    order = [d for d in range(len(ref.shape)) if d != axis and ref.shape[d] != 1] + [axis]
    if len(order) > MOST_DIMENSIONS:
        raise UnknownError
    return order, [ref.shape[d] for d in order]


def reduced(kind: int) -> Callable[[Operation], list[Instruction]]:
    """A sum or the like over one dimension."""

    def build(operation: Operation) -> list[Instruction]:
        given, out = operation.args[0], output(operation)
        axes = operation.args[1] if len(operation.args) > 1 else []
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        if len(operation.outputs) != 1 or len(axes) != 1 or given.dtype not in FLOATS:
            raise UnknownError
        axis = axes[0] % len(given.shape)
        kept = len(operation.args) > 2 and bool(operation.args[2])
        order, sizes = _rows(given, axis)
        written = list(out.strides)
        if not kept:
            written.insert(axis, 0)
        strides = [[written[d] for d in order[:-1]] + [0], [given.strides[d] for d in order]]
        operands = [operand(out, out.shape), operand(given, given.shape)]
        return [instruction(kind, sizes, operands, strides)]

    return build


def softmax(operation: Operation) -> list[Instruction]:
    """A softmax over one dimension."""
    given, axis = operation.args[:2]
    out = output(operation)
    order, sizes = _rows(given, axis % len(given.shape))
    strides = [[ref.strides[d] for d in order] for ref in (out, given)]
    operands = [operand(out, out.shape), operand(given, given.shape)]
    return [instruction(native.SOFTMAX, sizes, operands, strides)]


def topk(operation: Operation) -> list[Instruction]:
    """The largest of each row, and where they were."""
    given, k, *options = operation.args
    defaults: tuple[Any, ...] = (-1, True, True)
    axis, largest, in_order = (*options, *defaults[len(options) :])
    if operation.kwargs or not largest:
        raise UnknownError
    values, places = operation.outputs
    order, sizes = _rows(given, axis % len(given.shape))
    refs = (values, given, places)
    strides = [[ref.strides[d] for d in order] for ref in refs]
    operands = [operand(ref, ref.shape) for ref in refs]
    return [instruction(native.TOPK, sizes, operands, strides, (float(k), float(in_order)))]


def _looked_up(table: Any, index: Any, out: Ref) -> list[Instruction]:
    """`out[..., :] = table[index[...], :]`."""
    flat = flat_stride(index)
    if len(table.shape) == 1:  # rows of one number
        table = Ref(table.source, table.dtype, (*table.shape, 1), (*table.strides, 1), table.offset)
        out = Ref(out.source, out.dtype, (*out.shape, 1), (*out.strides, 1), out.offset)
    if len(table.shape) != 2 or flat is None or index.dtype != torch.int64:
        raise UnknownError
    count = math.prod(index.shape)
    lead = flat_stride(Ref(0, out.dtype, out.shape[:-1], out.strides[:-1], 0))
    if lead is None:
        raise UnknownError
    operands = [operand(ref, ref.shape) for ref in (out, table, index)]
    strides = [(lead, out.strides[-1]), table.strides, (flat, 0)]
    return [instruction(native.ROWS, (count, table.shape[1]), operands, strides)]


def flat_stride(ref: Ref) -> int | None:
    """The stride between neighbours, if the whole tensor is one row."""
    sizes = [(n, s) for n, s in zip(ref.shape, ref.strides, strict=True) if n != 1]
    for (_, outer), (size, inner) in pairwise(sizes):
        if outer != size * inner:
            return None
    return sizes[-1][1] if sizes else 0


def embedding(operation: Operation) -> list[Instruction]:
    """Rows of a table."""
    return _looked_up(operation.args[0], operation.args[1], output(operation))


def index_select(operation: Operation) -> list[Instruction]:
    """Rows of a table."""
    table, axis, index = operation.args
    if axis != 0:
        raise UnknownError
    return _looked_up(table, index, output(operation))


def index(operation: Operation) -> list[Instruction]:
    """Rows of a table."""
    table, indices = operation.args
    if len(indices) != 1 or not isinstance(indices[0], Ref):
        raise UnknownError
    return _looked_up(table, indices[0], output(operation))


def gather(operation: Operation) -> list[Instruction]:
    """Numbers of each row."""
    given, axis, index = operation.args[:3]
    out = output(operation)
    if len(given.shape) != 2 or axis % 2 != 1:
        raise UnknownError
    refs = (out, given, index)
    operands = [operand(ref, ref.shape) for ref in refs]
    return [instruction(native.PICK, out.shape, operands, [ref.strides for ref in refs])]


def scatter(operation: Operation) -> list[Instruction]:
    """Numbers put into each row."""
    given, axis, index, value = operation.args
    out = output(operation)
    if len(given.shape) != 2 or axis % 2 != 1 or operation.kwargs:
        raise UnknownError
    found: list[Instruction] = []
    if not operation.changes:
        found += over(native.COPY, out.shape, [operand(ref, out.shape) for ref in (out, given)])
    value = operand_of(value, index.shape)
    operands = [operand(out, out.shape), value, operand(index, index.shape)]
    strides = [out.strides, value.strides, index.strides]
    return [*found, instruction(native.PUT, index.shape, operands, strides)]
