"""The slow, obvious path that the fast one is compared with, in tests and once at load.

It reads through the safetensors library instead of our reader, keeps nothing, and computes one
token and one expert after the other, in the order of the paper formula.
"""

from math import prod

import torch
from safetensors import safe_open
from torch import nn

from retinue.errors import NotFinite, SelfCheckFailed
from retinue.memory.formats import Packed
from retinue.memory.layout import Block, ExpertLayout, Piece
from retinue.memory.link import Views
from retinue.memory.recode import encode_expert
from retinue.model.expert_map import ExpertsModule
from retinue.model.experts import ExpertHost
from retinue.model.work import apply_expert

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
DAMAGED = "the checkpoint is damaged; download the file again"


def read_expert(layout: ExpertLayout) -> Views:
    """One expert's parameters, read by the safetensors library, and encoded where that is due."""
    if layout.checksum is not None:
        return layout.views(_read(layout.pieces[0]).reshape(-1))
    if layout.plain is not None:
        slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
        encode_expert(layout.windows, read_expert(layout.plain), slot)
        return layout.views(slot)
    result: dict[str, list[Block]] = {}
    for piece in layout.pieces:
        result.setdefault(piece.parameter, []).append(_block(piece))
    return {name: tuple(blocks) for name, blocks in result.items()}


def _block(piece: Piece) -> Block:
    numbers = _read(piece)
    if piece.format is None or piece.scales is None:
        return numbers
    return Packed(piece.format, numbers, _read(piece.scales))


def _read(piece: Piece) -> torch.Tensor:
    entry = piece.entry
    with safe_open(entry.file, framework="pt") as file:
        if entry.shape == piece.shape and piece.strides is None:
            return file.get_tensor(entry.name)  # type: ignore[no-any-return]
        # Some of one expert, which is one row of a tensor of all, or a whole tensor.
        first = (piece.start - entry.start) // entry.item_bytes
        row = prod(entry.shape[1:]) if len(entry.shape) > len(piece.shape) else prod(entry.shape)
        index = first // row
        whole = file.get_tensor(entry.name) if row == prod(entry.shape) else None
        expert = file.get_slice(entry.name)[index : index + 1] if whole is None else whole
        shape, strides = piece.shape, piece.strides or _contiguous(piece.shape)
        return expert.reshape(-1)[first - index * row :].as_strided(shape, strides)  # type: ignore[no-any-return]


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


def reference_experts(
    module: nn.Module,
    layouts: list[ExpertLayout],
    hidden: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """What `ExpertHost.run` must return: hidden [tokens, hidden], index and weights [tokens, k]."""
    out = torch.zeros(hidden.shape, dtype=torch.float32)
    for token in range(hidden.shape[0]):
        for k in range(index.shape[1]):
            expert = int(index[token, k])
            if expert >= len(layouts):
                continue
            row = apply_expert(module, hidden[token : token + 1], read_expert(layouts[expert]))[0]
            out[token] += row.float() * weights[token, k].float()
    return out.to(hidden.dtype)


def damaged_expert(layer: int, expert: int, layout: ExpertLayout, views: Views) -> NotFinite | None:
    """The error that names the expert, if one of its weights is NaN or infinite."""
    for name, blocks in views.items():
        if not all(_is_finite(block) for block in blocks):
            return NotFinite(
                f"expert {expert} of layer {layer} holds NaN or infinite values:"
                f" `{name}` in `{layout.extents[0].file.name}`",
                hint=DAMAGED,
            )
    return None


def _is_finite(block: Block) -> bool:
    numbers = block.decode(torch.bfloat16) if isinstance(block, Packed) else block
    return bool(torch.isfinite(numbers).all())


@torch.inference_mode()
def self_check(
    host: ExpertHost,
    modules: list[ExpertsModule],
    layouts: list[list[ExpertLayout]],
    dtype: torch.dtype,
) -> None:
    """Run one token through two experts of the first and the last layer, both ways.

    Raises SelfCheckFailed when the results differ by more than rounding, NotFinite when a weight
    of these experts is no number.
    """
    random = torch.Generator().manual_seed(0)
    host.begin_pass("decode", [1])
    for found in {modules[0].layer: modules[0], modules[-1].layer: modules[-1]}.values():
        width = min(2, found.experts)
        hidden = torch.randn(1, found.width, generator=random).to(dtype)
        index = torch.randperm(found.experts, generator=random)[:width].view(1, width)
        weights = torch.rand(1, width, generator=random).to(dtype)
        for expert in index[0].tolist():
            layout = layouts[found.layer][expert]
            error = damaged_expert(found.layer, expert, layout, read_expert(layout))
            if error is not None:
                raise error
        fast = host.run(found.layer, hidden, index, weights).float()
        slow = reference_experts(found.module, layouts[found.layer], hidden, index, weights).float()
        distance = float((fast - slow).norm() / slow.norm().clamp_min(1e-20))
        if not distance <= TOLERANCE[dtype]:
            raise SelfCheckFailed(
                f"layer {found.layer}: the experts differ from the reference by {distance:.2e}",
                hint="please report this with the model's name; `--no-self-check` skips it",
            )
