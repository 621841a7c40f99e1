"""A token whose tail is left out: who stays, and what of its weight goes."""

from typing import NamedTuple

import numpy as np

from retinue.policy.base import BoolArray, Route, Thinning, View
from retinue.types import FloatArray


class LeftOut(NamedTuple):
    """`keep` [tokens, k]; the weight that went, and by what that of the others grows: [tokens]."""

    keep: BoolArray
    lost: FloatArray
    gain: FloatArray


def left_out(thinning: Thinning, route: Route, view: View) -> LeftOut:
    """Ask `thinning`. Who is none already is not left out."""
    keep = thinning.keep(route, view) | (route.experts >= view.experts)
    if keep.all():
        nothing = np.zeros(len(keep), dtype=np.float32)
        return LeftOut(keep, nothing, nothing + 1)
    lost = np.asarray(np.where(keep, 0, route.weights).sum(axis=1), dtype=np.float32)
    if not thinning.renormalises:
        return LeftOut(keep, lost, np.ones_like(lost))
    total = route.weights.sum(axis=1)
    return LeftOut(keep, lost, total / np.where(total - lost > 0, total - lost, 1))
