"""Views of checkpoint bytes against what transformers' own converters make of the tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

from retinue.errors import Unsupported
from retinue.memory.checkpoint import TensorEntry, read_header
from retinue.model.conversion import Joined, convert

EXPERTS = 4
LISTED = {"gate": (EXPERTS, (6, 8)), "up": (EXPERTS, (6, 8))}
FUSED = {"all": (1, (EXPERTS, 6, 8))}

# Source patterns with the number and shape of their tensors, targets, operations.
CASES: dict[str, tuple[dict[str, tuple[int, tuple[int, ...]]], list[str], list[Any]]] = {
    "stacked": ({"down": (EXPERTS, (8, 6))}, ["t"], [MergeModulelist(0)]),
    "stacked and joined by rows": (LISTED, ["t"], [MergeModulelist(0), Concatenate(1)]),
    "stacked and joined by columns": (LISTED, ["t"], [MergeModulelist(0), Concatenate(2)]),
    "joined from the end": (LISTED, ["t"], [MergeModulelist(0), Concatenate(-1)]),
    "transposed": (FUSED, ["t"], [Transpose(1, 2)]),
    "every second row": (FUSED, ["t"], [Interleave(dim=1)]),
    "every second column": (FUSED, ["t"], [Interleave(dim=2)]),
    "two joined, of which each holds all experts": (
        {"gate": (1, (EXPERTS, 6, 8)), "up": (1, (EXPERTS, 6, 8))},
        ["t"],
        [Concatenate(1)],
    ),
    "cut by rows": (FUSED, ["t", "u"], [Chunk(dim=1)]),
    "cut by experts": (FUSED, ["t", "u"], [Chunk(dim=0)]),
    "lists for two targets": (LISTED, ["t", "u"], [ErnieFuseAndSplitTextVisionExperts(0, 1)]),
}


def write(file: Path, sources: dict[str, tuple[int, tuple[int, ...]]]) -> dict[str, Any]:
    """Random tensors in a file; per source their entries and themselves."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.{index}": torch.randn(shape, generator=random)
        for name, (count, shape) in sources.items()
        for index in range(count)
    }
    save_file(tensors, file)
    entries = {entry.name: entry for entry in read_header(file)}
    names = {name: [f"{name}.{i}" for i in range(count)] for name, (count, _) in sources.items()}
    return {
        "entries": {name: [entries[key] for key in keys] for name, keys in names.items()},
        "tensors": {name: [tensors[key] for key in keys] for name, keys in names.items()},
    }


def read(expert: Joined, content: bytes) -> torch.Tensor:
    blocks = []
    for block in expert.blocks:
        entry: TensorEntry = block.entry
        numbers = torch.frombuffer(
            bytearray(content[entry.start : entry.stop]), dtype=torch.float32
        )
        view = block.view
        blocks.append(numbers.as_strided(view.shape, view.stride(), view.storage_offset()))
    return torch.cat(blocks, dim=expert.axis)


@pytest.mark.parametrize("case", CASES)
def test_views_are_what_transformers_makes(case: str, tmp_path: Path) -> None:
    sources, targets, operations = CASES[case]
    made = write(tmp_path / "w.safetensors", sources)
    converter = WeightConverter(list(sources), targets, operations)
    plain = dict(made["tensors"])
    for operation in operations:
        plain = operation.convert(
            plain, source_patterns=list(sources), target_patterns=targets, config=None
        )
    ours = convert(converter, made["entries"], tuple(plain[targets[0]].shape[1:]))
    content = (tmp_path / "w.safetensors").read_bytes()
    assert len(ours) == len(targets)
    for target, experts in zip(targets, ours, strict=True):
        assert len(experts) == len(plain[target])
        for expert, tensor in zip(experts, plain[target], strict=True):
            assert expert.shape == tuple(tensor.shape)
            assert torch.equal(read(expert, content), tensor)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_a_transposition_that_checks_the_shape_is_made_only_where_needed(
    shape: tuple[int, int], tmp_path: Path
) -> None:
    made = write(tmp_path / "w.safetensors", FUSED)
    converter = WeightConverter(["all"], ["t"], [Transpose(1, 2, check_dims=True)])
    (experts,) = convert(converter, made["entries"], shape)
    assert experts[0].shape == shape


@pytest.mark.parametrize(
    "operation",
    [PermuteForRope(), Interleave(1, inverse=True), Transpose(0, 1), MergeModulelist(1)],
    ids=["rotary", "inverse", "experts last", "stacked within"],
)
def test_what_would_move_bytes_is_refused_by_name(operation: Any, tmp_path: Path) -> None:
    made = write(tmp_path / "w.safetensors", FUSED)
    converter = WeightConverter(["all"], ["t"], [operation])
    with pytest.raises(Unsupported, match=type(operation).__name__) as caught:
        convert(converter, made["entries"], (6, 8))
    assert "save_pretrained" in caught.value.hint
