"""Turns operations of torch into instructions of the native library.

Knows the operations that steps are made of, on tensors of up to four dimensions in fp32, bf16,
int64 and bool. `lower` returns None for all else, which torch then runs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
_FLOATS = (torch.float32, torch.bfloat16)


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


class _UnknownError(Exception):
    """This operation, with these arguments, is torch's."""


def lower(operation: Operation) -> list[Instruction] | None:
    """The instructions that do what `operation` does, or None."""
    name = str(operation.function)
    if operation.changes:
        name = name.replace("_.", ".", 1)
    found = _TABLE.get(name.removeprefix("aten.").split(".")[0])
    tensors = [*operation.inputs, *operation.outputs]
    if found is None or any(ref.dtype not in TYPES for ref in tensors):
        return None
    try:
        return found(operation)
    except _UnknownError:
        return None


# --- operands


def _operand(ref: Ref, shape: Sequence[int]) -> Operand:
    """`ref` broadcast to `shape`."""
    lead = len(shape) - len(ref.shape)
    pairs = zip(ref.shape, ref.strides, strict=True)
    strides = (0,) * lead + tuple(0 if size == 1 else stride for size, stride in pairs)
    return Operand(ref.source, ref.dtype, strides, ref.offset * ref.dtype.itemsize)


def _any(value: Any, shape: Sequence[int]) -> Operand:
    if isinstance(value, Ref):
        return _operand(value, shape)
    if isinstance(value, (bool, int, float)):
        return Operand(0, torch.float32, (0,) * len(shape), number=float(value))
    raise _UnknownError


def _over(
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
        raise _UnknownError
    return [_with(kind, sizes, operands, strides, scalars)]


def _with(
    kind: int,
    sizes: Sequence[int],
    operands: Sequence[Operand],
    strides: Sequence[Sequence[int]],
    scalars: tuple[float, ...] = (),
) -> Instruction:
    moved = tuple(
        Operand(o.source, o.dtype, tuple(s), o.offset_bytes, o.number)
        for o, s in zip(operands, strides, strict=True)
    )
    return Instruction(kind, tuple(sizes), moved, scalars)


def _out(operation: Operation) -> Ref:
    return operation.outputs[0]


# --- every element by itself


def _unary(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = _out(operation)
        given = _any(operation.args[0], out.shape)
        return _over(kind, out.shape, [_operand(out, out.shape), given])

    return build


def _binary(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = _out(operation)
        if "rounding_mode" in operation.kwargs:
            raise _UnknownError
        alpha = operation.kwargs.get("alpha", 1)
        left, right = (_any(value, out.shape) for value in operation.args[:2])
        return _over(kind, out.shape, [_operand(out, out.shape), left, right], (float(alpha),))

    return build


def _of_bools(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        if _out(operation).dtype != torch.bool:
            raise _UnknownError
        return (_unary if kind == native.NOT else _binary)(kind)(operation)

    return build


def _copy_into(operation: Operation) -> list[Instruction]:
    """`copy_`, and everything else whose second argument becomes the first."""
    into, value = operation.args[:2]
    return _over(native.COPY, into.shape, [_operand(into, into.shape), _any(value, into.shape)])


def _filled(number: float | None) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = _out(operation)
        value = operation.args[1] if number is None else number
        return _over(native.COPY, out.shape, [_operand(out, out.shape), _any(value, out.shape)])

    return build


def _power(operation: Operation) -> list[Instruction]:
    base, exponent = operation.args
    out = _out(operation)
    if not isinstance(exponent, (int, float)) or out.dtype not in _FLOATS:
        raise _UnknownError
    operands = [_operand(out, out.shape), _any(base, out.shape)]
    if exponent == 2:
        return _over(native.MUL, out.shape, [*operands, operands[1]])
    kinds = {0.5: native.SQRT, -0.5: native.RSQRT, -1: native.RECIPROCAL}
    if exponent in kinds:
        return _over(kinds[exponent], out.shape, operands)
    return _over(native.POW, out.shape, [*operands, _any(exponent, out.shape)])


def _clamp(operation: Operation) -> list[Instruction]:
    low, high = [*operation.args[1:], None, None][:2]
    low, high = operation.kwargs.get("min", low), operation.kwargs.get("max", high)
    if isinstance(low, Ref) or isinstance(high, Ref):
        raise _UnknownError
    out = _out(operation)
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    operands = [_operand(out, out.shape), _any(operation.args[0], out.shape)]
    return _over(native.CLAMP, out.shape, operands, bounds)


def _gelu(operation: Operation) -> list[Instruction]:
    tanh = operation.kwargs.get("approximate", "none") == "tanh"
    return _unary(native.GELU_TANH_OF if tanh else native.GELU_OF)(operation)


def _softplus(operation: Operation) -> list[Instruction]:
    if len(operation.args) > 1 or operation.kwargs:
        raise _UnknownError
    return _unary(native.SOFTPLUS)(operation)


def _where(operation: Operation) -> list[Instruction]:
    out = _out(operation)
    if len(operation.args) != 3:
        raise _UnknownError
    inputs = [_any(value, out.shape) for value in operation.args]
    return _over(native.WHERE, out.shape, [_operand(out, out.shape), *inputs])


def _masked_fill(operation: Operation) -> list[Instruction]:
    out, (given, mask, value) = _out(operation), operation.args
    inputs = [_any(each, out.shape) for each in (mask, value, given)]
    return _over(native.WHERE, out.shape, [_operand(out, out.shape), *inputs])


def _stack(operation: Operation) -> list[Instruction]:
    out = _out(operation)
    axis = (operation.args[1] if len(operation.args) > 1 else 0) % len(out.shape)
    parts = [_unsqueezed(part, axis) for part in operation.args[0]]
    return _joined(out, parts, axis)


def _unsqueezed(ref: Ref, axis: int) -> Ref:
    shape = (*ref.shape[:axis], 1, *ref.shape[axis:])
    strides = (*ref.strides[:axis], 0, *ref.strides[axis:])
    return Ref(ref.source, ref.dtype, shape, strides, ref.offset)


def _cat(operation: Operation) -> list[Instruction]:
    out = _out(operation)
    axis = (operation.args[1] if len(operation.args) > 1 else 0) % len(out.shape)
    return _joined(out, operation.args[0], axis)


def _joined(out: Ref, parts: Sequence[Ref], axis: int) -> list[Instruction]:
    found, first = [], 0
    for part in parts:
        at = out.offset + first * out.strides[axis]
        into = Ref(out.source, out.dtype, part.shape, out.strides, at)
        operands = [_operand(into, part.shape), _operand(part, part.shape)]
        found += _over(native.COPY, part.shape, operands)
        first += part.shape[axis]
    return found


# --- rows


def _rows(ref: Ref, axis: int) -> tuple[list[int], list[int]]:
    """Sizes and strides with `axis` last, of up to four dimensions."""
    order = [d for d in range(len(ref.shape)) if d != axis and ref.shape[d] != 1] + [axis]
    if len(order) > MOST_DIMENSIONS:
        raise _UnknownError
    return order, [ref.shape[d] for d in order]


def _reduced(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        given, out = operation.args[0], _out(operation)
        axes = operation.args[1] if len(operation.args) > 1 else []
        axes = [axes] if isinstance(axes, int) else list(axes or [])
        if len(operation.outputs) != 1 or len(axes) != 1 or given.dtype not in _FLOATS:
            raise _UnknownError
        axis = axes[0] % len(given.shape)
        kept = len(operation.args) > 2 and bool(operation.args[2])
        order, sizes = _rows(given, axis)
        written = list(out.strides)
        if not kept:
            written.insert(axis, 0)
        strides = [[written[d] for d in order[:-1]] + [0], [given.strides[d] for d in order]]
        operands = [_operand(out, out.shape), _operand(given, given.shape)]
        return [_with(kind, sizes, operands, strides)]

    return build


def _softmax(operation: Operation) -> list[Instruction]:
    given, axis = operation.args[:2]
    out = _out(operation)
    order, sizes = _rows(given, axis % len(given.shape))
    strides = [[ref.strides[d] for d in order] for ref in (out, given)]
    operands = [_operand(out, out.shape), _operand(given, given.shape)]
    return [_with(native.SOFTMAX, sizes, operands, strides)]


def _topk(operation: Operation) -> list[Instruction]:
    given, k, *options = operation.args
    axis, largest, in_order = [*options, *(-1, True, True)[len(options) :]]
    if operation.kwargs or not largest:
        raise _UnknownError
    values, places = operation.outputs
    order, sizes = _rows(given, axis % len(given.shape))
    refs = (values, given, places)
    strides = [[ref.strides[d] for d in order] for ref in refs]
    operands = [_operand(ref, ref.shape) for ref in refs]
    return [_with(native.TOPK, sizes, operands, strides, (float(k), float(in_order)))]


def _looked_up(table: Any, index: Any, out: Ref) -> list[Instruction]:
    """`out[..., :] = table[index[...], :]`."""
    flat = _flat_stride(index)
    if len(table.shape) == 1:  # rows of one number
        table = Ref(table.source, table.dtype, (*table.shape, 1), (*table.strides, 1), table.offset)
        out = Ref(out.source, out.dtype, (*out.shape, 1), (*out.strides, 1), out.offset)
    if len(table.shape) != 2 or flat is None or index.dtype != torch.int64:
        raise _UnknownError
    count = math.prod(index.shape)
    lead = _flat_stride(Ref(0, out.dtype, out.shape[:-1], out.strides[:-1], 0))
    if lead is None:
        raise _UnknownError
    operands = [_operand(ref, ref.shape) for ref in (out, table, index)]
    strides = [(lead, out.strides[-1]), table.strides, (flat, 0)]
    return [_with(native.ROWS, (count, table.shape[1]), operands, strides)]


def _flat_stride(ref: Ref) -> int | None:
    """The stride between neighbours, if the whole tensor is one row."""
    sizes = [(n, s) for n, s in zip(ref.shape, ref.strides, strict=True) if n != 1]
    for (_, outer), (size, inner) in pairwise(sizes):
        if outer != size * inner:
            return None
    return sizes[-1][1] if sizes else 0


def _embedding(operation: Operation) -> list[Instruction]:
    return _looked_up(operation.args[0], operation.args[1], _out(operation))


def _index_select(operation: Operation) -> list[Instruction]:
    table, axis, index = operation.args
    if axis != 0:
        raise _UnknownError
    return _looked_up(table, index, _out(operation))


def _index(operation: Operation) -> list[Instruction]:
    table, indices = operation.args
    if len(indices) != 1 or not isinstance(indices[0], Ref):
        raise _UnknownError
    return _looked_up(table, indices[0], _out(operation))


def _gather(operation: Operation) -> list[Instruction]:
    given, axis, index = operation.args[:3]
    out = _out(operation)
    if len(given.shape) != 2 or axis % 2 != 1:
        raise _UnknownError
    refs = (out, given, index)
    operands = [_operand(ref, ref.shape) for ref in refs]
    return [_with(native.PICK, out.shape, operands, [ref.strides for ref in refs])]


def _scatter(operation: Operation) -> list[Instruction]:
    given, axis, index, value = operation.args
    out = _out(operation)
    if len(given.shape) != 2 or axis % 2 != 1 or operation.kwargs:
        raise _UnknownError
    found: list[Instruction] = []
    if not operation.changes:
        found += _over(native.COPY, out.shape, [_operand(ref, out.shape) for ref in (out, given)])
    value = _any(value, index.shape)
    operands = [_operand(out, out.shape), value, _operand(index, index.shape)]
    strides = [out.strides, value.strides, index.strides]
    return [*found, _with(native.PUT, index.shape, operands, strides)]


_TABLE: dict[str, Callable[[Operation], list[Instruction]]] = {
    "_to_copy": _unary(native.COPY),
    "clone": _unary(native.COPY),
    "copy": _copy_into,
    "fill": _copy_into,
    "zero": _filled(0),
    "zeros_like": _filled(0),
    "new_zeros": _filled(0),
    "zeros": _filled(0),
    "ones_like": _filled(1),
    "new_ones": _filled(1),
    "ones": _filled(1),
    "full": _filled(None),
    "full_like": _filled(None),
    "neg": _unary(native.NEG),
    "abs": _unary(native.ABS),
    "exp": _unary(native.EXP),
    "log": _unary(native.LOG),
    "sqrt": _unary(native.SQRT),
    "rsqrt": _unary(native.RSQRT),
    "reciprocal": _unary(native.RECIPROCAL),
    "sigmoid": _unary(native.SIGMOID),
    "tanh": _unary(native.TANH),
    "silu": _unary(native.SILU_OF),
    "relu": _unary(native.RELU_OF),
    "sin": _unary(native.SIN),
    "cos": _unary(native.COS),
    "bitwise_not": _of_bools(native.NOT),
    "logical_not": _unary(native.NOT),
    "gelu": _gelu,
    "softplus": _softplus,
    "pow": _power,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "add": _binary(native.ADD),
    "sub": _binary(native.SUB),
    "mul": _binary(native.MUL),
    "div": _binary(native.DIV),
    "maximum": _binary(native.MAXIMUM),
    "minimum": _binary(native.MINIMUM),
    "eq": _binary(native.EQUAL),
    "ne": _binary(native.UNEQUAL),
    "lt": _binary(native.LESS),
    "le": _binary(native.AT_MOST),
    "gt": _binary(native.GREATER),
    "ge": _binary(native.AT_LEAST),
    "logical_and": _binary(native.AND),
    "logical_or": _binary(native.OR),
    "bitwise_and": _of_bools(native.AND),
    "bitwise_or": _of_bools(native.OR),
    "where": _where,
    "masked_fill": _masked_fill,
    "cat": _cat,
    "stack": _stack,
    "sum": _reduced(native.SUM_OF),
    "mean": _reduced(native.MEAN_OF),
    "amax": _reduced(native.MAX_OF),
    "amin": _reduced(native.MIN_OF),
    "_softmax": _softmax,
    "topk": _topk,
    "embedding": _embedding,
    "index_select": _index_select,
    "index": _index,
    "gather": _gather,
    "scatter": _scatter,
}
