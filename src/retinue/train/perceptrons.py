"""Trains what is forecast from hidden states: ProMoE's networks, Read-ME's router, pre-gates.

All learn from drawn tokens of many texts; the numpy forwards of `policy/parts/perceptron.py`
compute the same and say what.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional

from retinue.policy.parts.perceptron import ahead, pre_gate, whole_path
from retinue.policy.preset import Arrays
from retinue.train.descent import Course, Weights, descend, fresh
from retinue.train.examples import Drawn
from retinue.train.worth import Flags, top
from retinue.types import FloatArray, IntArray

STRIDE = 1
WIDEST, NARROWEST = 512, 32
# What the router of a row says before its softmax: weights [hidden, experts], bias [experts].
Gate = Callable[[int], tuple[FloatArray, FloatArray]]


def promoe(drawn: Drawn, course: Course, stride: int = STRIDE) -> dict[str, FloatArray]:
    """ProMoE (arXiv 2410.22134, section 4.2): a network of two layers for each layer.

    It reads the layer's input and says which experts the layer `stride` further on needs, each a
    question of its own (binary cross-entropy). The paper's have 2 million weights each; ours are a
    quarter as wide as the hidden state.
    """
    _, rows, hidden = drawn.hidden.shape
    experts, width = drawn.chosen.shape[-1], _width(hidden)
    shapes = {
        "read": (rows - stride, hidden, width),
        "read_bias": (rows - stride, width),
        "say": (rows - stride, width, experts),
        "say_bias": (rows - stride, experts),
    }

    def loss(arrays: Weights, batch: IntArray) -> torch.Tensor:
        seen = _tensor(drawn.hidden[batch, : rows - stride])
        inner = torch.einsum("trh,rhw->trw", seen, arrays["read"]) + arrays["read_bias"]
        said = torch.einsum("trw,rwe->tre", inner.relu(), arrays["say"]) + arrays["say_bias"]
        needed = _tensor(drawn.chosen[batch, stride:])
        return functional.binary_cross_entropy_with_logits(said, needed)

    made = descend(fresh(shapes, course.seed), len(drawn.hidden), loss, course)
    nothing = {name: np.zeros((stride, *array.shape[1:])) for name, array in made.items()}
    padded = {name: np.concatenate([made[name], nothing[name]]) for name in made}
    return {"stride": np.array([stride]), **padded}


def promoe_names(arrays: Arrays, drawn: Drawn, top_k: int) -> Flags:
    """Which `top_k` experts of each token are named; none of the first `stride` rows."""
    stride = int(arrays["stride"][0])
    named = np.zeros(drawn.chosen.shape, dtype=bool)
    for row in range(drawn.hidden.shape[1] - stride):
        said = ahead(arrays, row, drawn.hidden[:, row].astype(np.float32))
        named[:, row + stride] = top(said, top_k)
    return named


def read_me(drawn: Drawn, course: Course) -> dict[str, FloatArray]:
    """Read-ME (arXiv 2410.19123, section 3.2): one router in front says the whole path.

    The paper's is a causal layer with attention that is distilled (KL) to the masks of a model of
    whole-path experts. Ours reads the input of the first layer with experts, which has seen the
    context already, and is distilled to what each layer's own router says.
    """
    _, rows, hidden = drawn.hidden.shape
    experts, width = drawn.chosen.shape[-1], 2 * _width(hidden)
    shapes = {
        "read": (hidden, width),
        "read_bias": (width,),
        "say": (rows, width, experts),
        "say_bias": (rows, experts),
    }

    def loss(arrays: Weights, batch: IntArray) -> torch.Tensor:
        inner = (_tensor(drawn.hidden[batch, 0]) @ arrays["read"] + arrays["read_bias"]).relu()
        said = torch.einsum("tw,rwe->tre", inner, arrays["say"]) + arrays["say_bias"]
        return _distance(said, _tensor(drawn.scores[batch]))

    return descend(fresh(shapes, course.seed), len(drawn.hidden), loss, course)


def read_me_names(arrays: Arrays, drawn: Drawn, top_k: int) -> Flags:
    """Which `top_k` experts of each token and row are named."""
    return top(whole_path(arrays, drawn.hidden[:, 0].astype(np.float32)), top_k)


def pre_gated(drawn: Drawn, course: Course, gate: Gate) -> dict[str, FloatArray]:
    """Pre-gated MoE (arXiv 2308.12066, section 4.1): each layer is chosen for one layer earlier.

    A pre-gate begins as the router that it takes the place of, applied to the input of the layer
    before, and is tuned to say what that router says (cross-entropy with its probabilities). The
    paper tunes the whole network with the pre-gates in place, 2048 steps of 256 sequences; here
    the network stays as it is.
    """
    rows = drawn.hidden.shape[1]
    start = [gate(row) for row in range(1, rows)]
    arrays = {
        "gate": torch.tensor(np.stack([weights for weights, _ in start])).requires_grad_(),
        "bias": torch.tensor(np.stack([bias for _, bias in start])).requires_grad_(),
    }

    def loss(arrays: Weights, batch: IntArray) -> torch.Tensor:
        seen = _tensor(drawn.hidden[batch, : rows - 1])
        said = torch.einsum("trh,rhe->tre", seen, arrays["gate"]) + arrays["bias"]
        return _distance(said, _tensor(drawn.scores[batch, 1:]))

    made = descend(arrays, len(drawn.hidden), loss, course)
    return {name: np.concatenate([np.zeros_like(made[name][:1]), made[name]]) for name in made}


def pre_gated_names(arrays: Arrays, drawn: Drawn, top_k: int) -> Flags:
    """Which `top_k` experts of each token are named; none of row 0."""
    named = np.zeros(drawn.chosen.shape, dtype=bool)
    for row in range(1, drawn.hidden.shape[1]):
        said = pre_gate(arrays, row, drawn.hidden[:, row - 1].astype(np.float32))
        named[:, row] = top(said, top_k)
    return named


def _width(hidden: int) -> int:
    return min(WIDEST, max(NARROWEST, hidden // 4))


def _distance(said: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of `said`, before a softmax, with probabilities."""
    return -(wanted * said.log_softmax(dim=-1)).sum(dim=-1).mean()


def _tensor(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, dtype=np.float32))
