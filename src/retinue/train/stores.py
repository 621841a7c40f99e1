"""What is kept of requests and iterations that were seen: MoE-Infinity's and fMoE's stores."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from retinue.policy.predict.shares import shares_of
from retinue.policy.preset import Arrays
from retinue.policy.watch.expert_maps import CAPACITY, DISTANCE
from retinue.train.examples import Example
from retinue.types import FloatArray

MATRICES = 120  # the smallest capacity of MoE-Infinity's paper
MAPS_BYTES = 16 << 20  # of them in fp32: large models get fewer
NEAR = 1e-9


def counts_of(example: Example, experts: int) -> FloatArray:
    """The tokens of one text that went to each expert, as shares by row: [rows, experts]."""
    rows = example.experts.shape[1]
    found = np.zeros((rows, experts + 1))
    ids = np.minimum(example.experts, experts)
    np.add.at(found, (np.arange(rows)[None, :, None], ids), 1)
    return np.asarray(shares_of(found[:, :experts]), dtype=np.float32)


def moe_infinity(
    examples: Sequence[Example], experts: int, most: int = MATRICES
) -> dict[str, FloatArray]:
    """MoE-Infinity (arXiv 2401.14361, section 4.2): a library of activation matrices.

    Of more texts than `most` those are kept that stand for the others best: the text nearest to
    all comes first, then, again and again, the one that is least like any that is kept. Likeness is
    the mean over rows of the cosine. The paper takes what comes and replaces the most similar.
    """
    matrices = np.stack([counts_of(one, experts) for one in examples])
    return {"matrices": matrices[_spread(matrices, most)]}


def fmoe(examples: Sequence[Example], seed: int, most: int | None = None) -> dict[str, FloatArray]:
    """fMoE (arXiv 2502.05370, section 4): expert maps of iterations, and their prompts' embeddings.

    An iteration is a prompt, whose map is the mean over its tokens, or a single token of an answer.
    Prompts come first and stay, as far as half of the store: a search by embedding finds a prompt
    and all tokens of its answer alike, and its mean says most of what comes. Tokens enter in a
    random order; once the store is full, each takes the place of the token that it is most like:
    RDY = d/L cos(embeddings) + (1 - d/L) cos(maps), with d = 3 layers.
    """
    if most is None:
        most = max(2, min(CAPACITY, MAPS_BYTES // (4 * examples[0].prompt_scores.size)))
    random = np.random.default_rng(seed)
    first = [examples[at] for at in random.permutation(len(examples))[: max(1, most // 2)]]
    maps, embeddings = _answers(examples)
    order = random.permutation(len(maps))
    maps, embeddings = maps[order], embeddings[order]
    weight = min(1.0, DISTANCE / maps.shape[1])
    flat, words = _unit(maps.reshape(len(maps), -1)), _unit(embeddings)
    kept = list(range(min(most - len(first), len(maps))))
    for at in range(len(kept), len(maps)):
        alike = weight * words[kept] @ words[at] + (1 - weight) * flat[kept] @ flat[at]
        kept[int(alike.argmax())] = at
    prompts = np.stack([one.prompt_scores for one in first])
    meant = np.stack([one.embedding for one in first])
    return {
        "maps": np.concatenate([prompts, maps[kept]]),
        "embeddings": np.concatenate([meant, embeddings[kept]]),
    }


def nearest_request(arrays: Arrays, examples: Sequence[Example]) -> FloatArray:
    """What `moe-infinity` expects of each text's answer: [texts, rows, experts].

    The matrix nearest to what the prompt used.
    """
    matrices = arrays["matrices"]
    rows, experts = matrices.shape[1:]
    library = _unit(matrices).reshape(len(matrices), -1)
    found = []
    for one in examples:
        prompt = replace(one, experts=one.experts[: one.prompt_tokens])
        own = _unit(counts_of(prompt, experts)).reshape(-1)
        found.append(matrices[int((library @ own).argmax())])
    return np.stack(found).reshape(-1, rows, experts)


def nearest_map(arrays: Arrays, example: Example, distance: int) -> FloatArray:
    """What `fmoe` expects of each drawn token: [n, rows, experts].

    The first `distance` rows go by the prompt's embedding, each other by the token's scores up to
    `distance` rows before it.
    """
    maps = arrays["maps"]
    said = np.empty(example.scores.shape, np.float32)
    semantic = int((_unit(arrays["embeddings"]) @ _unit(example.embedding)).argmax())
    said[:, :distance] = maps[semantic, :distance]
    for row in range(distance, maps.shape[1]):
        seen = _unit(example.scores[:, : row + 1 - distance].reshape(len(said), -1))
        known = _unit(maps[:, : row + 1 - distance].reshape(len(maps), -1))
        said[:, row] = maps[(seen @ known.T).argmax(axis=1), row]
    return said


def _answers(examples: Sequence[Example]) -> tuple[FloatArray, FloatArray]:
    """The drawn tokens of all answers: scores, and the embeddings of their prompts."""
    maps = [one.scores[one.drawn >= one.prompt_tokens].astype(np.float32) for one in examples]
    embeddings = [
        np.repeat(one.embedding[None], len(own), axis=0)
        for one, own in zip(examples, maps, strict=True)
    ]
    return np.concatenate(maps), np.concatenate(embeddings)


def _spread(matrices: FloatArray, most: int) -> list[int]:
    """Which of `matrices` to keep, at most `most`."""
    rows = matrices.shape[1]
    flat = _unit(matrices).reshape(len(matrices), -1)
    alike = flat @ flat.T / rows
    kept = [int(alike.sum(axis=0).argmax())]
    nearest = alike[kept[0]].copy()
    while len(kept) < min(most, len(matrices)):
        nearest[kept] = np.inf
        kept.append(int(nearest.argmin()))
        nearest = np.maximum(nearest, alike[kept[-1]])
    return kept


def _unit(values: npt.ArrayLike) -> FloatArray:
    """Of length 1 along the last axis."""
    found = np.asarray(values, dtype=np.float32)
    return np.asarray(found / (np.linalg.norm(found, axis=-1, keepdims=True) + NEAR))
