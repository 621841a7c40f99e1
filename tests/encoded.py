"""Plain counterparts of models in int8 or int4: what the encoded weights stand for, in fp32.

Which weights are encoded is written down here once more, by their names in the checkpoints.
"""

import re
from pathlib import Path

import pytest
import torch

import models
from models import Tensors
from retinue.memory import native
from retinue.memory.grouped import PRECISIONS, Grouped

# Linear layers and experts' matrices; the rest are embeddings, norms, routers and biases.
_ENCODED = re.compile(r"(_proj|_with_mqa|lm_head)(\.weight)?$|experts\..*\.w[123]\.weight$")


def through(tensor: torch.Tensor, precision: str) -> torch.Tensor:
    """A matrix [out, in] as it comes back from the precision."""
    form = Grouped(PRECISIONS[precision], *tensor.shape)
    return form.decode(*form.encode(tensor), torch.float32)


def counterpart(source: Path, target: Path, precision: str) -> Path:
    """The checkpoint with every number that is encoded replaced by what it becomes."""

    def change(tensors: Tensors) -> Tensors:
        return {name: _changed(name, tensor, precision) for name, tensor in tensors.items()}

    models.rewrite(source, target, change)
    return models.edit_config(target, dtype="float32")


def _changed(name: str, tensor: torch.Tensor, precision: str) -> torch.Tensor:
    if not _ENCODED.search(name):
        return tensor.float()
    if tensor.dim() == 3:  # gpt_oss: all experts of a layer, [in, out] each
        return torch.stack([through(each.T, precision).T for each in tensor]).contiguous()
    return through(tensor, precision)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No native kernels: numbers are decoded, and no input is rounded to eight bits."""
    monkeypatch.setattr(native, "library", lambda: None)
