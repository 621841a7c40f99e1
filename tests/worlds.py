"""Texts by hand, in which routing has a reason: hidden states follow from tokens."""

from dataclasses import replace

import numpy as np

from retinue.trace import TraceHead, routed_of
from retinue.train.examples import Example, example_of

ROWS, EXPERTS, TOP_K, HIDDEN, WORDS = 4, 8, 2, 12, 24
HEAD = TraceHead("by-hand", ROWS, EXPERTS, TOP_K, tuple(range(ROWS)), width=HIDDEN)


class World:
    """Words with meanings that change a little from row to row, and a router in each row."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.meanings = random.standard_normal((WORDS, HIDDEN)).astype(np.float32)
        self.gates = [
            (random.standard_normal((HIDDEN, EXPERTS)).astype(np.float32), np.zeros(EXPERTS))
            for _ in range(ROWS)
        ]
        self.turns = [
            np.eye(HIDDEN) + 0.1 * random.standard_normal((HIDDEN, HIDDEN)) for _ in range(ROWS)
        ]

    def text(self, seed: int, task: str, tokens: int = 40) -> Example:
        """A text; those of a task use the same half of the words."""
        random = np.random.default_rng(seed)
        half = WORDS // 2
        ids = random.integers(0, half, tokens) + (half if task == "b" else 0)
        state = self.meanings[ids] + 0.1 * random.standard_normal((tokens, HIDDEN))
        hidden, scores = [], []
        for turn, (weights, bias) in zip(self.turns, self.gates, strict=True):
            state = state @ turn
            said = np.exp(state @ weights + bias)
            hidden.append(state)
            scores.append(said / said.sum(axis=1, keepdims=True))
        signals = {
            "hidden": np.stack(hidden, axis=1).astype(np.float32),
            "scores": np.stack(scores, axis=1).astype(np.float32),
            "embedding": self.meanings[ids[: tokens // 2]].mean(axis=0),
        }
        experts = np.argsort(-signals["scores"], axis=-1)[..., :TOP_K]
        weights = np.take_along_axis(signals["scores"], experts, axis=-1)
        request = replace(routed_of(HEAD, task, tokens // 2, experts, weights), signals=signals)
        return example_of(request, ids.tolist(), tokens, random)

    def texts(self, count: int = 24) -> list[Example]:
        """`count` texts of the tasks `a` and `b` in turn."""
        return [self.text(at, "ab"[at % 2]) for at in range(count)]


def choosing(*tokens: list[list[int]], prompt: int = 0, weights: float = 0.5) -> Example:
    """A text by its tokens' experts, row by row; the first of a row is the heaviest."""
    experts = np.array(tokens)
    falling = weights ** np.arange(experts.shape[-1])
    nothing = np.empty((len(tokens), experts.shape[1], 0), np.float16)
    return Example(
        None,
        prompt,
        np.arange(len(tokens)),
        experts,
        np.broadcast_to(falling, experts.shape).astype(np.float32),
        np.empty(0, np.float32),
        np.empty((experts.shape[1], 0), np.float32),
        np.arange(len(tokens)),
        nothing,
        nothing,
    )
