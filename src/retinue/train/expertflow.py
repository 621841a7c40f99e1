"""Trains the routing paths of `policy/parts/paths.py`, which explains what is computed.

Binary cross-entropy over every layer's experts, as in ExpertFlow (arXiv 2410.17954, section 3.1),
which has 10,000 sequences, three runs each, for one task and model. A token's embedding is dropped
now and then, so that the context learns to speak for words that were hardly seen.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from retinue.policy.parts.paths import fresh as nothing
from retinue.policy.parts.paths import paths
from retinue.policy.preset import Arrays
from retinue.train.descent import Course, Weights, descend, fresh
from retinue.train.examples import Example, choices
from retinue.train.worth import Flags, top
from retinue.types import FloatArray, IntArray

WIDE, WIDTH = 32, 128
DECAY = 0.9
CONTEXT = 24  # tokens before that the fading mean is taken of in training; 8 % is left
DROPPED = 0.1


def expertflow(
    examples: Sequence[Example], vocabulary: int, experts: int, course: Course
) -> dict[str, FloatArray]:
    """Arrays of kind `expertflow` for ids below `vocabulary`."""
    windows, needed = _windows(examples), _needed(examples, experts)
    rows = needed.shape[1]
    shapes = {
        "embed": (vocabulary, WIDE),
        "mix": (3, WIDE, WIDTH),
        "mix_bias": (WIDTH,),
        "say": (rows, WIDTH, experts),
        "say_bias": (rows, experts),
    }
    fading = _fading()
    generator = torch.Generator().manual_seed(course.seed)

    def loss(arrays: Weights, batch: IntArray) -> torch.Tensor:
        ids = torch.tensor(windows[batch])  # [tokens, CONTEXT + 1]; -1 before a text's first
        seen = arrays["embed"][ids.clamp_min(0)] * (ids >= 0)[..., None]
        dropped = torch.rand(len(ids), 1, generator=generator) < DROPPED
        own = seen[:, -1].masked_fill(dropped, 0)
        mean = torch.einsum("c,tcw->tw", fading, seen[:, :-1])
        mix = arrays["mix"]
        inner = own @ mix[0] + seen[:, -2] @ mix[1] + mean @ mix[2] + arrays["mix_bias"]
        said = torch.einsum("tw,rwe->tre", inner.relu(), arrays["say"]) + arrays["say_bias"]
        wanted = torch.tensor(needed[batch], dtype=torch.float32)
        return functional.binary_cross_entropy_with_logits(said, wanted)

    made = descend(fresh(shapes, course.seed), len(windows), loss, course)
    return {"decay": np.array([DECAY]), **made}


def expertflow_names(arrays: Arrays, examples: Sequence[Example], top_k: int) -> Flags:
    """Which `top_k` experts of every token and row of the texts are named."""
    named = []
    for one in examples:
        assert one.ids is not None
        said, _ = paths(arrays, nothing(arrays), one.ids)
        named.append(top(said, top_k))
    return np.concatenate(named)


def _windows(examples: Sequence[Example]) -> IntArray:
    """Of each token the `CONTEXT` ids before it and its own, -1 where there are none."""
    found = []
    for one in examples:
        assert one.ids is not None
        padded = np.concatenate([np.full(CONTEXT, -1), one.ids])
        found.append(np.lib.stride_tricks.sliding_window_view(padded, CONTEXT + 1))
    return np.concatenate(found)


def _needed(examples: Sequence[Example], experts: int) -> Flags:
    return np.concatenate([choices(one.experts, experts) for one in examples])


def _fading() -> torch.Tensor:
    """What a token before the last one, ..., counts in the mean: [CONTEXT], the last one most."""
    age = np.arange(CONTEXT - 1, -1, -1)
    return torch.tensor((1 - DECAY) * DECAY**age, dtype=torch.float32)
