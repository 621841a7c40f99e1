"""What a prepared step is made of, and where its tensors lie: one arena, planned by last use."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from retinue.model.grouped_linear import GroupedLinear
from retinue.model.instruction import Instruction, Operand
from retinue.model.native_layers import Begun
from retinue.model.record import EXPERTS, PRODUCTS, Operation, Recording, Ref

ALIGNMENT = 64  # bytes


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product that the library runs: out = given @ weight.T + bias, rows contiguous.

    `weight` is one of bfloat16, or the layer that has it in another format.
    """

    out: Ref
    given: Ref
    weight: Ref | GroupedLinear
    bias: Ref | None
    tokens: int
    stride: int


@dataclass(frozen=True, slots=True)
class Attention:
    """An ATTEND that the library runs."""

    operation: Operation


@dataclass(frozen=True, slots=True, eq=False)
class Experts:
    """An EXPERTS that the library runs or begins where it may.

    `table` is an `evaluator.LAYER`, `begun` what it leaves to Python.
    """

    operation: Operation
    table: Any
    begun: Begun


@dataclass(frozen=True, slots=True)
class Torch:
    """An operation that torch runs, or experts that the library cannot."""

    operation: Operation


@dataclass(frozen=True, slots=True)
class Routed:
    """A ROUTED, and what is done again where the router's choice is replaced."""

    operation: Operation
    again: tuple["Item", ...]


Item = Instruction | Product | Attention | Experts | Torch | Routed


def is_large(item: Item) -> bool:
    """Whether it is a product, experts or a policy: those cost what they cost."""
    if isinstance(item, Torch):
        return item.operation.function in (*PRODUCTS, EXPERTS)
    return isinstance(item, (Product, Experts, Routed))


def row_stride(ref: Ref) -> int | None:
    """The stride between rows of neighbouring numbers, if all rows follow one another."""
    *lead, columns = ref.shape
    if columns != 1 and ref.strides[-1] != 1:
        return None
    rows = [(n, s) for n, s in zip(lead, ref.strides, strict=False) if n != 1]
    for (_, outer), (size, inner) in pairwise(rows):
        if outer != size * inner:
            return None
    return rows[-1][1] if rows else columns


def _refs(item: Item) -> list[tuple[int, int]]:
    """The sources that `item` touches, with the bytes that it needs of each."""
    if isinstance(item, Instruction):
        return [(o.source, _operand_stop(o, item)) for o in item.operands if o.number is None]
    if isinstance(item, Product):
        inputs = (item.given, item.weight, item.bias)
        refs = [item.out, *(ref for ref in inputs if isinstance(ref, Ref))]
    else:
        refs = [*item.operation.inputs, *item.operation.outputs]
    found = [(ref.source, ref.stop_bytes) for ref in refs]
    if isinstance(item, Routed):
        found += [touched for each in item.again for touched in _refs(each)]
    return found


def _operand_stop(operand: Operand, item: Instruction) -> int:
    last: int = sum((n - 1) * s for n, s in zip(item.sizes, operand.strides, strict=False))
    return operand.offset_bytes + (last + 1) * operand.dtype.itemsize


def plan(items: Sequence[Item], recording: Recording) -> tuple[torch.Tensor, dict[int, int]]:
    """The arena, and where in it each source's memory begins."""
    sizes: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    refs = [_refs(item) for item in items]
    end = (recording.logits.source, recording.logits.stop_bytes)
    for number, touched in enumerate([*refs, [end]]):
        for source, stop in touched:
            if source not in recording.constants:
                sizes[source] = max(sizes.get(source, 0), stop)
                first.setdefault(source, number)
                last[source] = number
    places: dict[int, int] = {}
    active: list[tuple[int, int, int]] = []  # begin, stop, last use
    total = 0
    for source in sorted(first, key=first.__getitem__):
        active = sorted(entry for entry in active if entry[2] >= first[source])
        begin, size = 0, aligned(sizes[source])
        for other, stop, _ in active:
            if other - begin >= size:
                break
            begin = max(begin, stop)
        places[source] = begin
        active.append((begin, begin + size, last[source]))
        total = max(total, begin + size)
    arena = torch.zeros(total + ALIGNMENT, dtype=torch.uint8)
    shift = -arena.data_ptr() % ALIGNMENT
    return arena[shift:], places


def aligned(count: int) -> int:
    """`count` bytes, rounded up."""
    return -(-count // ALIGNMENT) * ALIGNMENT
