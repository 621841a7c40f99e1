"""A recorded step, made ready to run again and again: native instructions, and calls between them.

The memory of all that lives within a step is one arena (`arena.py`). What was there before the
step (weights, positions, the pool of keys and values) is used where it lies. Where a restricted
router has chosen, its policy is asked, and what follows its `topk` is done again if that replaces
experts: a step in which none is replaced has the bits of the same step without the policy.
"""

import ctypes
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from retinue.errors import Unsupported
from retinue.memory import evaluator as layout
from retinue.memory.native import Format, Matrix, Native
from retinue.metrics import Clock
from retinue.model.again import repeated
from retinue.model.arena import (
    Attention,
    Experts,
    Item,
    Product,
    Routed,
    Torch,
    aligned,
    is_large,
    plan,
    row_stride,
)
from retinue.model.grouped_linear import GroupedLinear
from retinue.model.instruction import TYPES, Instruction, Operand
from retinue.model.kv import Pool
from retinue.model.lower import lower
from retinue.model.native_layers import NativeLayers, StepLog
from retinue.model.record import (
    ATTEND,
    EMBEDDING,
    EXPERTS,
    GROUPED,
    PRODUCTS,
    ROUTED,
    Operation,
    Recording,
    Ref,
    aten,
    layer_of,
)

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Spans:
    """Where the sequences of a step lie, for layers with one window: addresses of two arrays."""

    window: int | None
    starts: np.ndarray[Any, np.dtype[np.int64]]
    table: np.ndarray[Any, Any]  # one layout.SEQUENCES


@dataclass(frozen=True, slots=True)
class Memory:
    """What attention reaches besides a step's own tensors: pools by layer, spans by window."""

    pools: Mapping[int, Pool]
    spans: Callable[[int | None], Spans]


class Program:
    """`run` computes one step: its inputs are where they were recorded, `logits` is its answer.

    `clock` counts its time but for the experts'. `native_layers` says which experts may run
    natively, for so many `tokens`.
    """

    def __init__(
        self,
        recording: Recording,
        library: Native,
        memory: Memory,
        clock: Clock,
        native_layers: NativeLayers | None = None,
        tokens: int = 1,
    ) -> None:
        self._clock, self._experts = clock, Clock()
        self._log = StepLog(native_layers, tokens) if native_layers is not None else None
        self._constants, self._library = recording.constants, library
        self._numbers: dict[float, int] = {}
        self._keep: list[Any] = []
        items: list[Item] = []
        for at, operation in enumerate(recording.operations):
            if operation.function == ROUTED:
                items.append(self._routed(recording.operations[:at], operation))
            else:
                items += self._items(operation)
        self._arena, self._places = plan(items, recording)
        self._table = np.zeros(len(self._numbers), dtype=np.float32)
        self._table[:] = list(self._numbers)
        self._calls = self._compile(items, memory)
        self.logits = self._tensor(recording.logits)
        small = [item for item in items if not is_large(item)]
        natives = sum(not isinstance(item, Torch) for item in small)
        self.native_share = natives / max(1, len(small))

    def run(self) -> None:
        """Compute. Raises what experts raise; the next run begins anew."""
        started, self._experts.seconds = time.perf_counter(), 0.0
        if self._log is not None:
            self._log.forget()
        for call in self._calls:
            call()
        self._catch_up()
        self._clock.seconds += time.perf_counter() - started - self._experts.seconds

    def _catch_up(self) -> None:
        if self._log is not None:
            self._experts.seconds += self._log.tell()

    # --- what runs natively

    def _items(self, operation: Operation) -> Sequence[Item]:
        if operation.function == ATTEND:
            return [Attention(operation)]
        if operation.function == EXPERTS:
            return [self._experts_item(operation)]
        if operation.function == GROUPED:
            (given,), (out,) = operation.args, operation.outputs
            tokens = math.prod(given.shape[:-1])
            assert isinstance(operation.module, GroupedLinear)
            return [Product(out, given, operation.module, None, tokens, given.shape[-1])]
        if operation.function in PRODUCTS:
            return [self._product(operation) or Torch(operation)]
        lowered = lower(operation) if operation.module is None else None
        if lowered is None:
            return [Torch(operation)]
        for instruction in lowered:
            for operand in instruction.operands:
                if operand.number is not None:
                    self._numbers.setdefault(operand.number, len(self._numbers))
        return lowered

    def _experts_item(self, operation: Operation) -> Experts | Torch:
        hidden, index, weights = operation.args
        rows = all(
            row_stride(ref) == ref.shape[-1] for ref in (*operation.args, operation.outputs[0])
        )
        known = index.dtype == torch.int64 and {hidden.dtype, weights.dtype} <= TYPES.keys()
        if self._log is None or not rows or not known:
            return Torch(operation)
        added = self._log.add(operation.module, index.shape[-1])
        return Torch(operation) if added is None else Experts(operation, *added)

    def _routed(self, before: Sequence[Operation], operation: Operation) -> Routed:
        again = repeated(before, operation)
        return Routed(operation, tuple(item for each in again for item in self._items(each)))

    def _product(self, operation: Operation) -> Product | None:
        """A product with a weight of bfloat16, as it lies in memory."""
        args, out = operation.args, operation.outputs[0]
        bias = None
        if operation.function is aten.linear.default:
            given, weight, bias = [*args, None][:3]
        elif operation.function is aten.mv.default:
            weight, given = args
        else:
            given, turned = args[-2:]
            weight = replace(turned, shape=turned.shape[::-1], strides=turned.strides[::-1])
            bias = args[0] if len(args) == 3 else None
        rows, columns = weight.shape
        plain = weight.dtype == torch.bfloat16 == given.dtype and weight.strides == (columns, 1)
        if not plain or weight.source not in self._constants or operation.kwargs:
            return None
        if bias is not None and (bias.shape != (rows,) or bias.strides != (1,)):
            return None
        tokens = math.prod(given.shape[:-1])
        stride = row_stride(given)
        if stride is None or row_stride(out) != rows:
            return None
        return Product(out, given, weight, bias, tokens, stride)

    # --- addresses

    def _address(self, source: int, offset_bytes: int = 0) -> int:
        if (tensor := self._constants.get(source)) is not None:
            return tensor.untyped_storage().data_ptr() + offset_bytes
        return self._arena.data_ptr() + self._places[source] + offset_bytes

    def _at(self, ref: Ref) -> int:
        return self._address(ref.source, ref.offset * ref.dtype.itemsize)

    def _tensor(self, ref: Ref) -> torch.Tensor:
        if (constant := self._constants.get(ref.source)) is not None:
            if constant.dtype != ref.dtype:
                raise Unsupported("a weight is seen as another type")
            return torch.as_strided(constant, ref.shape, ref.strides, ref.offset)
        begin = self._places[ref.source]
        memory = self._arena[begin : begin + aligned(ref.stop_bytes)].view(ref.dtype)
        offset = memory.storage_offset() + ref.offset
        return torch.as_strided(memory, ref.shape, ref.strides, offset)

    # --- calls

    def _compile(self, items: Sequence[Item], memory: Memory) -> list[Call]:
        calls: list[Call] = []
        run: list[Any] = []
        for item in [*items, None]:
            if item is not None and not isinstance(item, (Torch, Routed)):
                run.append(item)
                continue
            if run:
                calls.append(self._native(run, memory))
                run = []
            if isinstance(item, Routed):
                calls.append(self._policy(item, memory))
            elif item is not None:
                calls.append(self._torch(item.operation))
        return calls

    def _native(self, items: Sequence[Any], memory: Memory) -> Call:
        table = np.zeros(len(items), dtype=layout.INSTRUCTION)
        instead: dict[int, Call] = {}
        for at, (row, item) in enumerate(zip(table, items, strict=True)):
            if isinstance(item, Instruction):
                self._fill(row, item)
            elif isinstance(item, Product):
                self._fill_product(row, item)
            elif isinstance(item, Experts):
                self._fill_experts(row, item)
                instead[at] = partial(_attend, item, self._torch(item.operation), self._experts)
            else:
                self._fill_attention(row, item.operation, memory)
        self._keep.append(table)
        if not instead:
            return partial(self._library.evaluate, table.ctypes.data, len(table))
        return partial(self._run_native, table, instead)

    def _run_native(self, table: Any, instead: Mapping[int, Call]) -> None:
        """Run the instructions of `table`, and `instead` of those that stop before they ran.

        What gives True has only been helped along: the library goes on with that instruction.
        """
        address, size, at = table.ctypes.data, table.itemsize, 0
        while True:
            at += self._library.evaluate(address + at * size, len(table) - at)
            if at == len(table):
                return
            self._catch_up()
            at += not instead[at]()

    def _fill(self, row: Any, item: Instruction) -> None:
        row["operation"], row["dimensions"] = item.operation, len(item.sizes)
        row["sizes"][: len(item.sizes)] = item.sizes
        row["scalars"][: len(item.scalars)] = item.scalars
        for name, operand in zip(("out", "a", "b", "c"), item.operands, strict=False):
            self._fill_operand(row[name], operand)

    def _fill_operand(self, field: Any, operand: Operand) -> None:
        if operand.number is not None:
            at = self._table.ctypes.data + 4 * self._numbers[operand.number]
        else:
            at = self._address(operand.source, operand.offset_bytes)
        field["at"], field["type"] = at, TYPES[operand.dtype]
        field["strides"][: len(operand.strides)] = operand.strides

    def _fill_product(self, row: Any, item: Product) -> None:
        bias = self._at(item.bias) if item.bias is not None else 0
        if isinstance(item.weight, Ref):
            matrix = Matrix(self._at(item.weight), None, Format.BF16, *item.weight.shape, 0)
        else:
            matrix = item.weight.matrix
            bias = item.weight.bias.data_ptr() if item.weight.bias is not None else 0
        self._keep += [matrix, item.weight]
        row["operation"], row["dimensions"] = layout.PRODUCT, 1
        row["sizes"][0] = item.tokens
        row["a"]["at"], row["a"]["type"] = self._at(item.given), TYPES[item.given.dtype]
        row["a"]["strides"][0] = item.stride
        row["b"]["at"] = ctypes.addressof(matrix)
        row["c"]["at"] = bias
        row["out"]["at"] = self._at(item.out)

    def _fill_experts(self, row: Any, item: Experts) -> None:
        table, (hidden, index, weights) = item.table, item.operation.args
        table["hidden"], table["index"], table["weights"] = map(self._at, (hidden, index, weights))
        table["weights_type"] = TYPES[weights.dtype]
        table["out"] = self._at(item.operation.outputs[0])
        row["operation"], row["dimensions"] = layout.EXPERTS, 1
        row["b"]["at"] = table.ctypes.data
        item.begun.hidden = self._tensor(hidden)

    def _fill_attention(self, row: Any, operation: Operation, memory: Memory) -> None:
        query, key, value = operation.args
        (out,) = operation.outputs
        pool = memory.pools[layer_of(operation.module)]
        options = operation.kwargs
        sinks = options.get("s_aux")
        table = np.zeros(1, dtype=layout.ATTENTION)
        table["type"] = TYPES[query.dtype]
        table["heads"], table["key_heads"] = query.shape[1], key.shape[1]
        table["width"], table["value_width"] = query.shape[3], value.shape[3]
        scale = options.get("scaling")
        table["scale"] = query.shape[3] ** -0.5 if scale is None else scale
        table["cap"] = options.get("softcap") or 0.0
        table["sequences"] = memory.spans(pool.window).table.ctypes.data
        for name, ref in (("query", query), ("key", key), ("value", value)):
            table[name] = self._at(ref)
            table[f"{name}_strides"] = [ref.strides[d] for d in (2, 1, 3)]
        table["sinks"] = self._at(sinks) if sinks is not None else 0
        table["keys"], table["values"] = (states.data_ptr() for states in pool.all_states())
        table["out"] = self._at(out)
        self._keep.append(table)
        row["operation"], row["dimensions"] = layout.ATTEND, 1
        row["b"]["at"] = table.ctypes.data

    def _policy(self, item: Routed, memory: Memory) -> Call:
        _, _, indices, experts, _, scores, weights, *hidden = map(self._tensor, item.operation.args)
        seen = [tensor.numpy() for tensor in (scores, experts, weights, indices, *hidden)]
        again = self._compile(item.again, memory)
        return partial(_run_policy, item.operation.module, seen, again, self._experts)

    def _torch(self, operation: Operation) -> Call:
        args, kwargs = tree_map(self._leaf, (operation.args, operation.kwargs))
        outs = [self._tensor(ref) for ref in operation.outputs]
        if operation.function == EXPERTS:
            return partial(_run_experts, operation.module, args, outs[0], self._experts)
        if operation.function == EMBEDDING:
            assert operation.module is not None
            return partial(_run_torch, partial(operation.module, *args), outs)
        function = operation.function
        if operation.changes:
            return partial(function, *args, **kwargs)
        if function in PRODUCTS:
            return partial(function.overloadpacket.out, *args, **kwargs, out=outs[0])

        return partial(_run_torch, partial(function, *args, **kwargs), outs)

    def _leaf(self, value: Any) -> Any:
        return self._tensor(value) if isinstance(value, Ref) else value


def _run_experts(
    module: Any, args: Sequence[torch.Tensor], out: torch.Tensor, clock: Clock
) -> None:
    started = time.perf_counter()
    out.copy_(module.retinue_run(*args))  # asked each time: a closed host leaves none
    clock.seconds += time.perf_counter() - started


def _attend(item: Experts, otherwise: Call, clock: Clock) -> bool:
    """Help experts along that the library has begun, or else compute them here."""
    state = item.begun.state
    if state[0] != layout.BEGUN:
        otherwise()
        return False
    started = time.perf_counter()
    item.operation.module.retinue_run.attend(item.begun)  # type: ignore[union-attr, operator]
    state[0] = layout.ATTENDED
    clock.seconds += time.perf_counter() - started
    return True


def _run_policy(module: Any, seen: Sequence[Any], again: Sequence[Call], clock: Clock) -> None:
    """Ask who serves, and compute what the router says of those."""
    started = time.perf_counter()
    # Copies: whoever is asked may keep what it saw.
    chosen = module.retinue_route.choose(*[array.copy() for array in seen])
    if chosen is not None:
        seen[3][...] = chosen
        for call in again:
            call()
    clock.seconds += time.perf_counter() - started


def _run_torch(function: Callable[[], Any], outs: Sequence[torch.Tensor]) -> None:
    results = function()
    results = [results] if isinstance(results, torch.Tensor) else results
    for out, result in zip(outs, results, strict=True):
        out.copy_(result)
