"""Follows transformers' weight converters without reading a byte.

A converter stacks, joins, transposes or cuts checkpoint tensors into parameters. Here the same
operations act on views that only know where their bytes lie, so that the experts can be read in
place. An operation that would have to move bytes is refused by name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from retinue.errors import Unsupported
from retinue.memory.checkpoint import TensorEntry


@dataclass(frozen=True, slots=True)
class Block:
    """A strided view of a checkpoint tensor; `view` is a tensor on meta over its elements."""

    entry: TensorEntry
    view: torch.Tensor


@dataclass(frozen=True, slots=True)
class Joined:
    """One expert's parameter: blocks that are joined along `axis`."""

    blocks: tuple[Block, ...]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the joined parameter; the first block tells the sizes of the other axes."""
        sizes = list(self.blocks[0].view.shape)
        if sizes:
            sizes[self.axis] = sum(block.view.shape[self.axis] for block in self.blocks)
        return tuple(sizes)


class NotInPlace(Exception):
    """An operation would have to move bytes."""


Experts = list[Joined]  # of one parameter, by expert


def whole(entry: TensorEntry) -> Block:
    """All of a checkpoint tensor."""
    return Block(entry, torch.empty(entry.shape, device="meta"))


def unstack(entry: TensorEntry) -> Experts:
    """The experts of a tensor that holds all of a layer's."""
    block = whole(entry)
    return [Joined((replace(block, view=view),)) for view in block.view.unbind(0)]


@dataclass(slots=True)
class _State:
    """The values between two operations, in the order of the source patterns or of the targets.

    `stacked` says that the experts are the first dimension; before that they are a list.
    """

    values: list[Experts]
    stacked: bool
    targets: int
    shape: tuple[int, ...]  # that one expert's parameter must have in the end


def convert(
    converter: WeightConverter,
    sources: Mapping[str, Sequence[TensorEntry]],
    shape: tuple[int, ...],
) -> list[Experts]:
    """For each of the converter's targets the experts of its parameter.

    `sources` holds the checkpoint tensors of each source pattern that was found, in order; `shape`
    is one expert's. Raises Unsupported for operations that cannot be done in place.
    """
    operations = converter.operations
    listed = any(isinstance(operation, _STACKING) for operation in operations)
    values = [
        _listed(sources[pattern]) if listed else _fused(sources[pattern])
        for pattern in converter.source_patterns
        if pattern in sources
    ]
    state = _State(values, not listed, len(converter.target_patterns), shape)
    for operation in operations:
        try:
            _OPERATIONS[type(operation)](operation, state)
        except (KeyError, NotInPlace) as error:
            names = ", ".join(type(kind).__name__ for kind in operations)
            raise Unsupported(
                f"the experts of `{converter.target_patterns[0]}` are stored in a form that is"
                f" not served: {names}",
                hint="save the model with transformers' save_pretrained, and use that checkpoint",
            ) from error
    return state.values


def _listed(entries: Sequence[TensorEntry]) -> Experts:
    return [Joined((whole(entry),)) for entry in entries]


def _fused(entries: Sequence[TensorEntry]) -> Experts:
    if len(entries) != 1 or not entries[0].shape:
        return _listed(entries)
    return unstack(entries[0])


def _axis(dim: int, state: _State) -> int:
    """`dim` of the whole tensor as an axis of one expert's; -1 for the experts themselves."""
    first = next(iter(state.values[0]))
    dims = len(first.blocks[0].view.shape) + state.stacked
    return dim % dims - state.stacked


def _stack(operation: Any, state: _State) -> None:
    if operation.dim != 0:
        raise NotInPlace
    state.stacked = True


def _join(operation: Any, state: _State) -> None:
    axis = _axis(operation.dim, state)
    if axis < 0:
        state.values = [[expert for value in state.values for expert in value]]
        return
    parts = zip(*state.values, strict=False)
    state.values = [[_joined(experts, axis) for experts in parts]]


def _joined(parts: Sequence[Joined], axis: int) -> Joined:
    if any(len(part.blocks) > 1 and part.axis != axis for part in parts):
        raise NotInPlace
    return Joined(tuple(block for part in parts for block in part.blocks), axis)


def _transpose(operation: Any, state: _State) -> None:
    axes = (_axis(operation.dim0, state), _axis(operation.dim1, state))
    if min(axes) < 0:
        raise NotInPlace
    if operation.check_dims and state.values[0][0].shape == state.shape:
        return
    state.values = [[_transposed(expert, *axes) for expert in value] for value in state.values]


def _transposed(expert: Joined, first: int, second: int) -> Joined:
    axis = {first: second, second: first}.get(expert.axis, expert.axis)
    return Joined(
        tuple(replace(b, view=b.view.transpose(first, second)) for b in expert.blocks), axis
    )


def _deinterleave(operation: Any, state: _State) -> None:
    axis = _axis(operation.dim, state)
    if operation.inverse or axis < 0:
        raise NotInPlace
    state.values = [[_halves(expert, axis) for expert in value] for value in state.values]


def _halves(expert: Joined, axis: int) -> Joined:
    """Every second row, then the others."""
    if len(expert.blocks) > 1:
        raise NotInPlace
    (block,) = expert.blocks
    every = [(slice(None),) * axis + (slice(start, None, 2),) for start in (0, 1)]
    return Joined(tuple(replace(block, view=block.view[rows]) for rows in every), axis)


def _chunk(operation: Any, state: _State) -> None:
    if operation.num_shards_attribute is not None or len(state.values) != 1:
        raise NotInPlace
    axis, (experts,), count = _axis(operation.dim, state), state.values, state.targets
    if axis < 0:
        step = math.ceil(len(experts) / count)
        state.values = [experts[i * step : (i + 1) * step] for i in range(count)]
        return
    chunks = [_chunks(expert, axis, count) for expert in experts]
    state.values = [list(parts) for parts in zip(*chunks, strict=True)]


def _chunks(expert: Joined, axis: int, count: int) -> list[Joined]:
    if len(expert.blocks) > 1:
        raise NotInPlace
    (block,) = expert.blocks
    return [Joined((replace(block, view=v),)) for v in block.view.chunk(count, axis)]


def _split_lists_and_join(operation: Any, state: _State) -> None:
    """One list of experts for several targets, each an equal part of it, stacked and joined."""
    if operation.stack_dim != 0 or operation.concat_dim < 1:
        raise NotInPlace
    result = []
    for target in range(state.targets):
        parts = []
        for value in state.values:
            step = math.ceil(len(value) / state.targets)
            parts.append(value[target * step : (target + 1) * step])
        joined = zip(*parts, strict=True)
        result.append([_joined(experts, operation.concat_dim - 1) for experts in joined])
    state.values, state.stacked = result, True


_STACKING = (MergeModulelist, ErnieFuseAndSplitTextVisionExperts)
_OPERATIONS: dict[type, Callable[[Any, _State], None]] = {
    MergeModulelist: _stack,
    Concatenate: _join,
    Transpose: _transpose,
    Interleave: _deinterleave,
    Chunk: _chunk,
    ErnieFuseAndSplitTextVisionExperts: _split_lists_and_join,
}
