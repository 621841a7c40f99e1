"""Turns operations of torch into instructions of the native library.

Knows the operations that steps are made of, on tensors of up to four dimensions in fp32, bf16,
int64 and bool. `lower` returns None for all else, which torch then runs.
"""

import math
from collections.abc import Callable, Sequence

import torch

from retinue.memory import evaluator as native
from retinue.model import lower_rows as rows
from retinue.model.instruction import (
    FLOATS,
    TYPES,
    Instruction,
    UnknownError,
    operand,
    operand_of,
    output,
    over,
)
from retinue.model.record import Operation, Ref


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
    except UnknownError:
        return None


# --- every element by itself


def _unary(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = output(operation)
        given = operand_of(operation.args[0], out.shape)
        return over(kind, out.shape, [operand(out, out.shape), given])

    return build


def _binary(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = output(operation)
        if "rounding_mode" in operation.kwargs:
            raise UnknownError
        alpha = operation.kwargs.get("alpha", 1)
        left, right = (operand_of(value, out.shape) for value in operation.args[:2])
        return over(kind, out.shape, [operand(out, out.shape), left, right], (float(alpha),))

    return build


def _of_bools(kind: int) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        if output(operation).dtype != torch.bool:
            raise UnknownError
        return (_unary if kind == native.NOT else _binary)(kind)(operation)

    return build


def _copy_into(operation: Operation) -> list[Instruction]:
    """`copy_`, and everything else whose second argument becomes the first."""
    into, value = operation.args[:2]
    return over(native.COPY, into.shape, [operand(into, into.shape), operand_of(value, into.shape)])


def _filled(number: float | None) -> Callable[[Operation], list[Instruction]]:
    def build(operation: Operation) -> list[Instruction]:
        out = output(operation)
        value = operation.args[1] if number is None else number
        return over(native.COPY, out.shape, [operand(out, out.shape), operand_of(value, out.shape)])

    return build


def _power(operation: Operation) -> list[Instruction]:
    base, exponent = operation.args
    out = output(operation)
    if not isinstance(exponent, (int, float)) or out.dtype not in FLOATS:
        raise UnknownError
    operands = [operand(out, out.shape), operand_of(base, out.shape)]
    if exponent == 2:
        return over(native.MUL, out.shape, [*operands, operands[1]])
    kinds = {0.5: native.SQRT, -0.5: native.RSQRT, -1: native.RECIPROCAL}
    if exponent in kinds:
        return over(kinds[exponent], out.shape, operands)
    return over(native.POW, out.shape, [*operands, operand_of(exponent, out.shape)])


def _clamp(operation: Operation) -> list[Instruction]:
    low, high = [*operation.args[1:], None, None][:2]
    low, high = operation.kwargs.get("min", low), operation.kwargs.get("max", high)
    if isinstance(low, Ref) or isinstance(high, Ref):
        raise UnknownError
    out = output(operation)
    bounds = (-math.inf if low is None else low, math.inf if high is None else high)
    operands = [operand(out, out.shape), operand_of(operation.args[0], out.shape)]
    return over(native.CLAMP, out.shape, operands, bounds)


def _gelu(operation: Operation) -> list[Instruction]:
    tanh = operation.kwargs.get("approximate", "none") == "tanh"
    return _unary(native.GELU_TANH_OF if tanh else native.GELU_OF)(operation)


def _softplus(operation: Operation) -> list[Instruction]:
    if len(operation.args) > 1 or operation.kwargs:
        raise UnknownError
    return _unary(native.SOFTPLUS)(operation)


def _where(operation: Operation) -> list[Instruction]:
    out = output(operation)
    if len(operation.args) != 3:
        raise UnknownError
    inputs = [operand_of(value, out.shape) for value in operation.args]
    return over(native.WHERE, out.shape, [operand(out, out.shape), *inputs])


def _masked_fill(operation: Operation) -> list[Instruction]:
    out, (given, mask, value) = output(operation), operation.args
    inputs = [operand_of(each, out.shape) for each in (mask, value, given)]
    return over(native.WHERE, out.shape, [operand(out, out.shape), *inputs])


def _stack(operation: Operation) -> list[Instruction]:
    out = output(operation)
    axis = (operation.args[1] if len(operation.args) > 1 else 0) % len(out.shape)
    parts = [_unsqueezed(part, axis) for part in operation.args[0]]
    return _joined(out, parts, axis)


def _unsqueezed(ref: Ref, axis: int) -> Ref:
    shape = (*ref.shape[:axis], 1, *ref.shape[axis:])
    strides = (*ref.strides[:axis], 0, *ref.strides[axis:])
    return Ref(ref.source, ref.dtype, shape, strides, ref.offset)


def _cat(operation: Operation) -> list[Instruction]:
    out = output(operation)
    axis = (operation.args[1] if len(operation.args) > 1 else 0) % len(out.shape)
    return _joined(out, operation.args[0], axis)


def _joined(out: Ref, parts: Sequence[Ref], axis: int) -> list[Instruction]:
    found, first = [], 0
    for part in parts:
        at = out.offset + first * out.strides[axis]
        into = Ref(out.source, out.dtype, part.shape, out.strides, at)
        operands = [operand(into, part.shape), operand(part, part.shape)]
        found += over(native.COPY, part.shape, operands)
        first += part.shape[axis]
    return found


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
    "sum": rows.reduced(native.SUM_OF),
    "mean": rows.reduced(native.MEAN_OF),
    "amax": rows.reduced(native.MAX_OF),
    "amin": rows.reduced(native.MIN_OF),
    "_softmax": rows.softmax,
    "topk": rows.topk,
    "embedding": rows.embedding,
    "index_select": rows.index_select,
    "index": rows.index,
    "gather": rows.gather,
    "scatter": rows.scatter,
}
