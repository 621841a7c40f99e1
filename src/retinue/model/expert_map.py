"""Which checkpoint bytes make up which parameter of which expert.

The names are transformers' business: its converters say how a checkpoint key becomes (a block
of rows of) a parameter of an experts module. Two forms are read where they lie: one tensor that
holds all experts of a layer, and one tensor an expert, whose rows may be a block of a parameter.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from retinue.errors import CheckpointError, Unsupported
from retinue.memory.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorEntry
from retinue.memory.layout import ExpertLayout, Piece, lay_out


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One layer's experts module of the skeleton."""

    layer: int
    name: str
    module: nn.Module
    experts: int


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Layouts of all experts (`layouts[layer]` is empty without experts), and the other keys."""

    modules: list[ExpertsModule]
    layouts: list[list[ExpertLayout]]
    dense_keys: list[str]
    transforms: list[Any]  # transformers' renamings and converters

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        """Which experts the model has: `[layers, experts]`."""
        counts = np.array([len(row) for row in self.layouts])
        return np.arange(counts.max()) < counts[:, None]


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """The modules that transformers routes through its ExpertsInterface, by layer.

    Raises Unsupported for a model without any.
    """
    found: list[ExpertsModule] = []
    for name, module in model.named_modules():
        # The five flags are what the decorator leaves on an experts module.
        if "is_concatenated" not in vars(module):
            continue
        number = re.search(r"(?:layers|blocks|h)\.(\d+)\.", name)
        layer = int(number[1]) if number else len(found)
        experts = next(module.parameters()).shape[0]
        found.append(ExpertsModule(layer, name, module, experts))
    if not found:
        family = model.config.model_type
        raise Unsupported(
            f"`{family}` has no routed experts that transformers lets others run",
            hint="retinue runs Mixture-of-Experts families such as olmoe, qwen3_moe or mixtral",
        )
    return found


def map_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> ExpertMap:
    """Find every expert of the skeleton `model` in `checkpoint`.

    Raises CheckpointError when a part is missing or has another shape, Unsupported when the
    family stores its experts in a form that cannot be read in place.
    """
    modules = find_experts(model)
    transforms = get_model_conversion_mapping(model)
    owners = {
        f"{found.name}.{parameter}": (found, parameter)
        for found in modules
        for parameter, _ in found.module.named_parameters(recurse=False)
    }
    groups, dense = _assign(model, checkpoint, transforms, owners)
    layouts: list[list[ExpertLayout]] = [[] for _ in range(1 + max(m.layer for m in modules))]
    for found in modules:
        pieces: list[list[Piece]] = [[] for _ in range(found.experts)]
        for parameter, tensor in found.module.named_parameters(recurse=False):
            target = f"{found.name}.{parameter}"
            blocks = groups.get(target)
            if blocks is None:
                raise CheckpointError(f"the experts' weights `{target}` are missing")
            for index, found_pieces in enumerate(_pieces(parameter, tensor, target, blocks)):
                pieces[index].extend(found_pieces)
        layouts[found.layer] = [lay_out(expert) for expert in pieces]
    return ExpertMap(modules, layouts, dense, transforms)


@dataclass(frozen=True, slots=True)
class _Block:
    """The tensors that become one block of rows: one with all experts, or one an expert."""

    converter: WeightConverter | None
    position: int  # among the converter's source patterns
    entries: list[TensorEntry]


def _assign(
    model: PreTrainedModel, checkpoint: Checkpoint, transforms: list[Any], owners: dict[str, Any]
) -> tuple[dict[str, list[_Block]], list[str]]:
    """Sort checkpoint keys into blocks per expert parameter, and the rest."""
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state = model.state_dict()
    blocks: dict[tuple[str, str | None], _Block] = {}
    dense = []
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if target not in owners:
            dense.append(key)
            continue
        converter, position = None, 0
        if pattern is not None:
            converter = by_pattern[pattern]
            position = converter.source_patterns.index(pattern)
        block = blocks.setdefault((target, pattern), _Block(converter, position, []))
        block.entries.append(checkpoint.tensors[key])
    groups: dict[str, list[_Block]] = defaultdict(list)
    for (target, _), block in blocks.items():
        groups[target].append(block)
    return groups, dense


def _pieces(
    parameter: str, tensor: torch.Tensor, target: str, blocks: Sequence[_Block]
) -> list[list[Piece]]:
    """Per expert the pieces of `parameter`, whose shape in the model is `[experts, rows, ...]`."""
    experts, shape = tensor.shape[0], tuple(tensor.shape[1:])
    converter = blocks[0].converter
    if converter is None:
        return [[piece] for piece in _slices(parameter, blocks[0].entries[0], tensor)]
    _check_operations(converter, target)
    ordered = sorted(blocks, key=lambda block: block.position)
    if len(ordered) != len(converter.source_patterns):
        raise CheckpointError(f"the experts' weights `{target}` are incomplete")
    for block in ordered:
        if len(block.entries) != experts:
            raise CheckpointError(
                f"`{target}` has {len(block.entries)} experts in the checkpoint, not {experts}"
            )
    result = []
    for index in range(experts):
        entries = [block.entries[index] for block in ordered]
        rows = sum(entry.shape[0] for entry in entries if entry.shape)
        for entry in entries:
            if entry.shape[1:] != shape[1:] or rows != shape[0]:
                raise _wrong_shape(entry, target, shape)
        result.append([_piece(parameter, e, e.start, e.shape) for e in entries])
    return result


def _slices(parameter: str, entry: TensorEntry, tensor: torch.Tensor) -> list[Piece]:
    if entry.shape != tuple(tensor.shape):
        raise _wrong_shape(entry, parameter, tuple(tensor.shape))
    shape = entry.shape[1:]
    stride = prod(shape) * entry.item_bytes
    return [
        _piece(parameter, entry, entry.start + index * stride, shape)
        for index in range(entry.shape[0])
    ]


def _piece(parameter: str, entry: TensorEntry, start: int, shape: tuple[int, ...]) -> Piece:
    if entry.dtype not in WEIGHT_DTYPES:
        raise Unsupported(
            f"the expert tensor `{entry.name}` has the type `{entry.dtype}`",
            hint=f"served are {', '.join(WEIGHT_DTYPES)}",
        )
    return Piece(parameter, entry, start, start + prod(shape) * entry.item_bytes, shape)


def _check_operations(converter: WeightConverter, target: str) -> None:
    """Only stacking experts and joining their rows can be done by reading in place."""
    kinds = [type(operation) for operation in converter.operations]
    joins = [op for op in converter.operations if isinstance(op, Concatenate)]
    simple = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
    if not simple or any(join.dim != 1 for join in joins):
        names = ", ".join(kind.__name__ for kind in kinds)
        raise Unsupported(
            f"the experts of `{target}` are stored in a form that is not served: {names}",
            hint="save the model with transformers' save_pretrained, and use that checkpoint",
        )


def _wrong_shape(entry: TensorEntry, target: str, shape: tuple[int, ...]) -> CheckpointError:
    return CheckpointError(
        f"tensor `{entry.name}` has the shape {list(entry.shape)}, which does not make up"
        f" {list(shape)} of `{target}`",
        hint="config.json and the weights do not belong together",
    )
