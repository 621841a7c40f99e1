"""Which checkpoint bytes make up which parameter of which expert.

The names are transformers' business: its converters say how checkpoint keys become parameters of
an experts module, and `conversion.py` follows them without reading. What comes out are views of
the files: whole tensors, slices of a tensor that holds all experts, transposed or every second row.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import numpy.typing as npt
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from retinue.errors import CheckpointError, Unsupported
from retinue.memory.checkpoint import WEIGHT_DTYPES, Checkpoint, TensorEntry
from retinue.memory.layout import ExpertLayout, Piece, lay_out
from retinue.memory.manifest import Pack
from retinue.memory.quantised import PackedEntry, packed_piece
from retinue.model.conversion import Block, Experts, Joined, convert, unstack


@dataclass(frozen=True, slots=True)
class ExpertsModule:
    """One experts module of the skeleton.

    `layer` is its decoder layer, or its place among all where a layer has several of them.
    """

    layer: int
    name: str
    module: nn.Module
    experts: int

    @property
    def width(self) -> int:
        """Numbers of a token that the experts take: the model's hidden size in most families."""
        down = dict(self.module.named_parameters(recurse=False))["down_proj"]
        return int(down.shape[2 if self.module.is_transposed else 1])


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Layouts of all experts (`layouts[layer]` is empty without experts), and the other keys.

    `dense` names the parameter that a key's tensor is; None where it takes more than another name.
    `unread` are the modules that text does not pass through, each with a dot at its end.
    """

    modules: list[ExpertsModule]
    layouts: list[list[ExpertLayout]]
    dense: dict[str, str | None]
    unread: tuple[str, ...]

    def is_dense(self, parameter: str) -> bool:
        """Whether the parameter is to be loaded at the start."""
        owner, _, _ = parameter.rpartition(".")
        routed = any(owner == found.name for found in self.modules)
        return not routed and not parameter.startswith(self.unread)

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        """Which experts the model has: `[layers, experts]`."""
        counts = np.array([len(row) for row in self.layouts])
        return np.arange(counts.max()) < counts[:, None]


def find_experts(model: PreTrainedModel) -> list[ExpertsModule]:
    """The modules that transformers routes through its ExpertsInterface, by layer.

    Raises Unsupported for a model without any.
    """
    unread = unread_modules(model)
    # The five flags are what the decorator leaves on an experts module.
    named = [
        (name, module)
        for name, module in model.named_modules()
        if "is_concatenated" in vars(module) and not f"{name}.".startswith(unread)
    ]
    if not named:
        family = model.config.model_type
        raise Unsupported(
            f"`{family}` has no routed experts that transformers lets others run",
            hint="served are the Mixture-of-Experts families that go through its ExpertsInterface,"
            " such as qwen3_moe, mixtral or gpt_oss; docs/reference/families.md lists them",
        )
    numbers = [re.search(r"(?:layers|blocks|h)\.(\d+)\.", name) for name, _ in named]
    layers = [int(number[1]) for number in numbers if number]
    if len(set(layers)) < len(named):
        layers = list(range(len(named)))
    return [
        ExpertsModule(layer, name, module, next(module.parameters(recurse=False)).shape[0])
        for layer, (name, module) in zip(layers, named, strict=True)
    ]


def unread_modules(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the models within `model` that are not its language model: towers for images."""
    kinds = {type(model.config), type(model.config.get_text_config())}
    return tuple(
        f"{name}."
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and type(module.config) not in kinds
    )


def map_experts(model: PreTrainedModel, checkpoint: Checkpoint) -> ExpertMap:
    """Find every expert of the skeleton `model` in `checkpoint`.

    Raises CheckpointError when a part is missing or has another shape, Unsupported when the
    family stores its experts in a form that cannot be read in place.
    """
    modules, unread = find_experts(model), unread_modules(model)
    owners = {
        f"{found.name}.{parameter}"
        for found in modules
        for parameter, _ in found.module.named_parameters(recurse=False)
    }
    groups, dense = _assign(model, checkpoint, owners, unread)
    layouts: list[list[ExpertLayout]] = [[] for _ in range(1 + max(m.layer for m in modules))]
    converted: dict[int, list[Experts]] = {}
    for found in modules:
        if isinstance(checkpoint, Pack):
            layouts[found.layer] = _stored(found, checkpoint)
            continue
        pieces: list[list[Piece]] = [[] for _ in range(found.experts)]
        for parameter, tensor in found.module.named_parameters(recurse=False):
            target = f"{found.name}.{parameter}"
            group = groups.get(target)
            if group is None:
                raise CheckpointError(f"the experts' weights `{target}` are missing")
            if group.key not in converted:
                converted[group.key] = _experts(group, target, tuple(tensor.shape))
            experts = converted[group.key][group.position]
            _check(experts, target, tuple(tensor.shape), bool(found.module.is_transposed))
            for index, expert in enumerate(experts):
                pieces[index].extend(_pieces(parameter, expert))
        layouts[found.layer] = [lay_out(expert) for expert in pieces]
    return ExpertMap(modules, layouts, dense, unread)


def _stored(found: ExpertsModule, checkpoint: Pack) -> list[ExpertLayout]:
    """The experts of a pack, whose description must fit the module."""
    stored = checkpoint.experts.get(found.name)
    layouts = [] if stored is None else stored.layouts()
    shapes = {
        name: tuple(parameter.shape[1:])
        for name, parameter in found.module.named_parameters(recurse=False)
    }
    if stored is None or len(layouts) != found.experts or stored.shapes != shapes:
        raise CheckpointError(
            f"the pack holds other experts than `{found.name}` has",
            hint="config.json and the weights do not belong together; pack the model again",
        )
    return layouts


@dataclass(slots=True)
class _Group:
    """The tensors that become one parameter, or several of which this one has `position`."""

    key: int
    converter: WeightConverter | None
    position: int = 0
    sources: dict[str, list[TensorEntry]] = field(default_factory=lambda: defaultdict(list))


def _assign(
    model: PreTrainedModel, checkpoint: Checkpoint, owners: set[str], unread: tuple[str, ...]
) -> tuple[dict[str, _Group], dict[str, str | None]]:
    """Sort checkpoint keys into groups by expert parameter, and the rest, as transformers does."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, _Group] = {}
    dense: dict[str, str | None] = {}
    for key in sorted(checkpoint.tensors, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = rename_source_key(key, [], [], prefix, state)
        converter = by_pattern[pattern] if pattern is not None else None
        group = groups.get(target) or _Group(len(groups), converter)
        targets = dict(_targets(target, converter))
        if not targets.keys() & owners:
            if not target.startswith(unread):
                dense[key] = target if converter is None else None
            continue
        group.sources[pattern or key].append(checkpoint.tensors[key])
        for name, position in targets.items():
            groups[name] = _Group(group.key, converter, position, group.sources)
    return groups, dense


def _targets(target: str, converter: WeightConverter | None) -> Iterator[tuple[str, int]]:
    """Every parameter that the converter makes where it makes `target`, with its place."""
    names = converter.target_patterns if converter is not None else [""]
    for position, name in enumerate(names):
        yield target.replace(names[0], name) if position else target, position


def _experts(group: _Group, target: str, shape: tuple[int, ...]) -> list[Experts]:
    if group.converter is None:
        (entry,) = next(iter(group.sources.values()))
        if entry.shape != shape:
            raise _wrong_shape([entry], target, shape)
        return [unstack(entry)]
    if len(group.sources) != len(group.converter.source_patterns):
        raise CheckpointError(f"the experts' weights `{target}` are incomplete")
    counts = {len(entries) for entries in group.sources.values()}
    if len(counts) != 1:
        raise CheckpointError(
            f"`{target}` has {min(counts)} experts in the checkpoint, not {max(counts)}"
        )
    return convert(group.converter, group.sources, shape[1:])


def _check(experts: Experts, target: str, shape: tuple[int, ...], transposed: bool) -> None:
    """Raise unless there are as many experts as there should be, of the right shape."""
    if len(experts) != shape[0]:
        raise CheckpointError(
            f"`{target}` has {len(experts)} experts in the checkpoint, not {shape[0]}"
        )
    for expert in experts:
        others = {_without(block.view.shape, expert.axis) for block in expert.blocks}
        if expert.shape != shape[1:] or len(others) != 1:
            raise _wrong_shape([block.entry for block in expert.blocks], target, shape[1:])
    outputs = len(shape) - 2 if transposed else 0
    if len(experts[0].blocks) > 1 and experts[0].axis != outputs:
        raise Unsupported(
            f"the inputs of `{target}` are stored in several tensors",
            hint="save the model with transformers' save_pretrained, and use that checkpoint",
        )


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :])


def _pieces(parameter: str, expert: Joined) -> Iterator[Piece]:
    rows = len(expert.blocks) == 1 or expert.axis == 0
    for block in expert.blocks:
        yield _piece(parameter, block, rows)


def _piece(parameter: str, block: Block, rows: bool) -> Piece:
    entry, view = block.entry, block.view
    if isinstance(entry, PackedEntry):
        return packed_piece(parameter, entry, view)
    if entry.dtype not in WEIGHT_DTYPES:
        raise Unsupported(
            f"the expert tensor `{entry.name}` has the type `{entry.dtype}`",
            hint=f"served are {', '.join(WEIGHT_DTYPES)}",
        )
    shape = tuple(view.shape)
    last = sum((size - 1) * step for size, step in zip(shape, view.stride(), strict=True))
    start = entry.start + int(view.storage_offset()) * entry.item_bytes
    stop = start + (last + 1) * entry.item_bytes
    strides = None if rows and view.is_contiguous() else tuple(view.stride())
    return Piece(parameter, entry, start, stop, shape, strides)


def _wrong_shape(
    entries: Sequence[TensorEntry], target: str, shape: tuple[int, ...]
) -> CheckpointError:
    worst = next((e for e in entries if prod(e.shape) * len(entries) != prod(shape)), entries[0])
    return CheckpointError(
        f"tensor `{worst.name}` has the shape {list(worst.shape)}, which does not make up"
        f" {list(shape)} of `{target}`",
        hint="config.json and the weights do not belong together",
    )
