"""What of a model is kept in int8 or int4: the experts' matrices and the dense linear layers.

Embeddings, norms and routers stay as they are, and whatever else is no plain linear layer: a
router's small mistakes send tokens elsewhere, and it is read fast as it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from retinue.errors import Unsupported
from retinue.memory.checkpoint import WEIGHT_DTYPES, Checkpoint
from retinue.memory.grouped import PRECISIONS, Grouped
from retinue.memory.quantised import PackedEntry
from retinue.memory.recode import Arrangement, Matrix, arrange, recoded
from retinue.model.expert_map import ExpertMap, ExpertsModule
from retinue.model.linear import RowLinear
from retinue.model.routing import ROUTER_NAMES

MATRICES = ("gate_up_proj", "up_proj", "down_proj")
MIN_OUTPUTS = 16  # of a layer that is encoded: fewer would not fill a tile


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """A linear layer that is kept in `form`; `key` is its tensor, None that of the embedding."""

    name: str
    key: str | None
    form: Grouped


def encoded_experts(experts: ExpertMap, precision: str) -> ExpertMap:
    """`experts` as they are when each one is encoded on its way into a slot.

    Raises Unsupported where the checkpoint is quantised already.
    """
    layouts = [list(row) for row in experts.layouts]
    for found in experts.modules:
        arrangements: dict[object, Arrangement] = {}  # most often all look alike
        for index, layout in enumerate(layouts[found.layer]):
            for piece in layout.pieces:
                if piece.format is not None:
                    raise already_quantised(piece.format.name)
            kind = tuple(layout.windows.items())
            if kind not in arrangements:
                arrangements[kind] = arrange(layout, matrices_of(found, precision))
            layouts[found.layer][index] = recoded(layout, arrangements[kind])
    return replace(experts, layouts=layouts)


def already_quantised(stored: str) -> Unsupported:
    """The refusal to encode what is `stored` in another precision."""
    return Unsupported(
        f"the checkpoint is stored in {stored}, and is not encoded again",
        hint="use its bf16, fp16 or fp32 form, or `--precision as-is`",
    )


def matrices_of(found: ExpertsModule, precision: str) -> dict[str, Matrix]:
    """The parameters of an expert that are encoded, and in which blocks."""
    bits, module = PRECISIONS[precision], found.module
    transposed = bool(module.is_transposed)
    halves = bool(module.has_gate) and bool(module.is_concatenated)
    result = {}
    for name, parameter in module.named_parameters(recurse=False):
        if name not in MATRICES:
            continue
        outputs, inputs = reversed(parameter.shape[1:]) if transposed else parameter.shape[1:]
        count = 2 if halves and name == MATRICES[0] else 1
        block = Grouped(bits, outputs // count, inputs)
        result[name] = Matrix((block,) * count, transposed)
    return result


def linears_to_encode(
    model: PreTrainedModel, checkpoint: Checkpoint, experts: ExpertMap, precision: str
) -> list[DenseLinear]:
    """The dense layers that are encoded while they are loaded, in the model's order."""
    keys = {target: key for key, target in experts.dense.items() if target is not None}
    result = []
    for name, linear in _linears(model, experts):
        form = Grouped(PRECISIONS[precision], *linear.weight.shape)
        key = keys.get(f"{name}.weight")
        if key is not None:
            entry = checkpoint.tensors[key]
            if entry.dtype in WEIGHT_DTYPES and entry.shape == tuple(linear.weight.shape):
                result.append(DenseLinear(name, key, form))
        elif is_tied(model, linear):
            result.append(DenseLinear(name, None, form))
    return result


def stored_linears(checkpoint: Checkpoint, experts: ExpertMap) -> list[DenseLinear]:
    """The dense layers that a pack holds encoded."""
    result = []
    for key, target in experts.dense.items():
        entry = checkpoint.tensors[key]
        if isinstance(entry, PackedEntry) and isinstance(entry.format, Grouped):
            assert target is not None, key
            result.append(DenseLinear(target.removesuffix(".weight"), key, entry.format))
    return result


def left_plain(model: PreTrainedModel, experts: ExpertMap) -> list[str]:
    """The names of linear layers of a loaded model that could have been encoded and were not."""
    return [name for name, _ in _linears(model, experts)]


def is_tied(model: PreTrainedModel, linear: nn.Module) -> bool:
    """Whether the layer's weights are those of the embedding."""
    embedding = model.get_input_embeddings()
    return isinstance(embedding, nn.Embedding) and linear.weight is embedding.weight


def _linears(model: PreTrainedModel, experts: ExpertMap) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers that text passes through but for routers and the like."""
    routers = tuple(_routers(model, experts))
    counts = {found.experts for found in experts.modules}
    owners = tuple(f"{found.name}." for found in experts.modules)
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, RowLinear):
            continue
        apart = f"{name}.".startswith((*experts.unread, *owners, *routers))
        outputs, _ = module.weight.shape
        if not apart and outputs >= MIN_OUTPUTS and not (_is_gate(name) and outputs in counts):
            yield name, module


def _routers(model: PreTrainedModel, experts: ExpertMap) -> Iterator[str]:
    """What is called a router beside the experts, whether or not a look-ahead can ask it."""
    for found in experts.modules:
        block = found.name.rpartition(".")[0]
        for name, _ in model.get_submodule(block).named_children():
            if name in ROUTER_NAMES:
                yield f"{block}.{name}."


def _is_gate(name: str) -> bool:
    """Whether a layer that has an output for each expert is called like a router."""
    return any(word in name.rpartition(".")[2] for word in ROUTER_NAMES)


def embedding_rows(model: PreTrainedModel) -> torch.Tensor:
    """The embedding's weights [vocabulary, hidden]."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight
