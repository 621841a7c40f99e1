"""What two layers of weights say of a hidden state: `promoe` and `read-me`."""

import numpy as np

from retinue.policy.preset import Arrays
from retinue.types import FloatArray


def ahead(arrays: Arrays, row: int, hidden: FloatArray) -> FloatArray:
    """Kind `promoe`: scores, before a sigmoid, of the experts of row `row` + stride.

    hidden: [tokens, hidden], what the router of row `row` gets. Returns [tokens, experts].
    """
    inner = np.maximum(hidden @ arrays["read"][row] + arrays["read_bias"][row], 0)
    return np.asarray(inner @ arrays["say"][row] + arrays["say_bias"][row])


def whole_path(arrays: Arrays, hidden: FloatArray) -> FloatArray:
    """Kind `read-me`: scores of every row's experts, before a softmax: [tokens, rows, experts].

    hidden: [tokens, hidden], what the router of row 0 gets.
    """
    inner = np.maximum(hidden @ arrays["read"] + arrays["read_bias"], 0)
    said = np.einsum("tw,rwe->tre", inner, arrays["say"], optimize=True)
    return np.asarray(said + arrays["say_bias"])


def pre_gate(arrays: Arrays, row: int, before: FloatArray) -> FloatArray:
    """Kind `pre-gated`: scores of row `row`'s experts, before a softmax: [tokens, experts].

    before: [tokens, hidden], what the router of the row before got; `row` is 1 or more.
    """
    return np.asarray(before @ arrays["gate"][row] + arrays["bias"][row])
