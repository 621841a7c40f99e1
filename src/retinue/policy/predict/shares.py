"""Routing weight as shares: what all forecasters of a prompt's experts count in."""

import numpy as np
import numpy.typing as npt

Shares = npt.NDArray[np.float64]  # [layers, experts], each layer's sum is one, or zero


def shares_of(used: npt.ArrayLike) -> Shares:
    """Per layer the share of each expert in `used` [layers, experts]; 0 where nothing was used.

    So that a long prompt counts as much as a short one, and a layer as much as another.
    """
    weight = np.asarray(used, dtype=np.float64)
    whole = weight.sum(axis=-1, keepdims=True)
    return np.asarray(weight / np.where(whole > 0, whole, 1))


def blend(known: Shares, prior: Shares, weight: float) -> Shares:
    """`known` with `weight` (0 to 1) of `prior`; all of `prior` where a layer knows nothing."""
    empty = known.sum(axis=-1, keepdims=True) == 0
    return np.asarray(np.where(empty, prior, (1 - weight) * known + weight * prior))
