"""An embedding whose rows stay in the checkpoint's file: a token takes one of them, and no more.

Beside the experts it is the one large matrix of which a step uses next to nothing: of the 622 MB of
`qwen3-30b-a3b`'s a decoded token takes 4 KB. Where experts lack room, these bytes hold more of
them. Rows are read through the page cache, so that what is used again costs a copy, and the
system takes that memory back when it needs it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from retinue.errors import CheckpointError
from retinue.memory.checkpoint import Checkpoint, TensorEntry
from retinue.memory.files import Reader
from retinue.memory.layout import TORCH_DTYPES
from retinue.memory.quantised import PackedEntry
from retinue.model.expert_map import ExpertMap


def stored_embedding(
    model: PreTrainedModel, checkpoint: Checkpoint, experts: ExpertMap
) -> TensorEntry | None:
    """The tensor of the embedding, if it may stay in its file.

    None where something else uses the weights too, such as a head that shares them, where rows are
    more than looked up, or where they are not stored one after the other.
    """
    embedding = model.get_input_embeddings()
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        return None
    weight = embedding.weight
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if parameter is weight]
    keys = [key for key, target in experts.dense.items() if target in names]
    if len(names) != 1 or len(keys) != 1:
        return None
    entry = checkpoint.tensors[keys[0]]
    plain = not isinstance(entry, PackedEntry) and entry.dtype in TORCH_DTYPES
    return entry if plain and entry.shape == tuple(weight.shape) else None


class StoredEmbedding(nn.Module):
    """`nn.Embedding` for inference over `entry` [tokens, width], which stays where it is.

    `dtype` is the type that rows are given in.
    """

    def __init__(self, entry: TensorEntry, reader: Reader, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = entry.shape
        self.dtype = dtype
        self._entry, self._reader = entry, reader

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows of the ids `input` [...]: [..., width].

        Raises ReadError where the disk fails, CheckpointError where the file has become shorter,
        IndexError for an id that there is not.
        """
        ids, at = np.unique(input.numpy(), return_inverse=True)
        if len(ids) and not (ids[0] >= 0 and ids[-1] < self.num_embeddings):
            raise IndexError(f"a token is none of {self.num_embeddings}")
        rows = torch.empty(len(ids), self.embedding_dim, dtype=TORCH_DTYPES[self._entry.dtype])
        self._read(ids.tolist(), rows.view(torch.uint8).numpy())
        found = rows if input.numel() == 1 else rows[torch.from_numpy(at.ravel())]
        return found.to(self.dtype).view(*input.shape, self.embedding_dim)

    def _read(self, ids: list[int], into: npt.NDArray[np.uint8]) -> None:
        """Fill `into` [ids, bytes of a row]."""
        entry, width = self._entry, into.shape[1]
        starts = [entry.start + row * width for row in ids]
        if len(starts) > 1:  # so that the disk knows of all of them before one is waited for
            for start in starts:
                self._reader.expect(entry.file, start, width)
        for start, row in zip(starts, into, strict=True):
            if self._reader.read(entry.file, start, memoryview(row), direct=False) < width:
                raise CheckpointError(
                    f"`{entry.file.name}` is truncated: it ends within `{entry.name}`",
                    hint="the file changed since it was opened; restore it",
                )
