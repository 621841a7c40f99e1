"""AdapMoE's table of layers (arXiv 2408.10284): what a layer bears, and how well it is foreseen.

The adaptive gate leaves a token's last experts out where their share of its weight is below
sqrt(T / S_l). S_l is the layer's Fisher sensitivity: here the squared gradient of a text's loss by
the layer's output of routed experts, summed over its numbers, a mean over tokens
(`WholeModel.squared_gradients`). A model that is too large for that in fp32 is tried instead: S_l
is the loss that is added where the layer leaves out every token's last expert, over the mean square
of that expert's share, as a small change a of the output adds about a^2 S_l.

Only S_l / T matters, and T = 0.005 is of the paper's model and units. So all S_l are scaled by one
factor: at T = 0.005 a quarter of the choices goes, which is what the paper saved.
"""

from collections.abc import Sequence

import numpy as np

from retinue.train.examples import Example
from retinue.types import FloatArray

TOLERANCE = 0.005  # the paper's T
SAVED = 0.25  # of the choices
LEAST = 1e-3  # of the largest S_l: what was measured as none, or as a gain


def adapmoe(
    examples: Sequence[Example], measured: FloatArray, accuracy: FloatArray
) -> dict[str, FloatArray]:
    """Arrays of kind `adapmoe`. measured: S_l before scaling; accuracy: a_l; [rows] both."""
    least = LEAST * max(float(measured.max()), 1e-12)
    raw = np.asarray(np.maximum(measured, least), dtype=np.float32)
    tails = tails_of(examples)
    low, high = 1e-12, 1e12  # of the factor: the smaller, the more goes
    for _ in range(100):
        middle = np.float32(np.sqrt(low * high))
        if dropped(tails, raw * middle).mean() > SAVED:
            low = float(middle)
        else:
            high = float(middle)
    sensitivity = raw * np.float32(high)
    accuracy = np.where(np.arange(len(raw)) == 0, 0, accuracy)
    single = np.minimum(dropped(tails, sensitivity) * (tails.shape[-1] + 1), 1)
    named = {"sensitivity": sensitivity, "accuracy": accuracy, "single": single}
    return {"tolerance": np.array([TOLERANCE]), **named}


def tails_of(examples: Sequence[Example]) -> FloatArray:
    """What share of a token's weight is left from its second, third, ... expert on.

    [tokens, rows, k - 1], the tokens of all texts one after the other.
    """
    weights = np.concatenate([one.weights for one in examples])
    ranked = -np.sort(-weights, axis=-1)
    ranked /= np.maximum(ranked.sum(axis=-1, keepdims=True), 1e-12)
    rest = np.cumsum(ranked[..., ::-1], axis=-1)[..., ::-1]
    return np.asarray(rest[..., 1:])


def dropped(tails: FloatArray, sensitivity: FloatArray) -> FloatArray:
    """The share of each row's choices that the gate leaves out at `TOLERANCE`: [rows]."""
    bounds = np.sqrt(TOLERANCE / sensitivity)[:, None]
    return np.asarray((tails < bounds).sum(axis=-1).mean(axis=0) / (tails.shape[-1] + 1))
