"""What approximate policies make of recorded routing: who serves, who is left out, at what weight.

A trace holds what the plain model chose. Where a policy lets others serve, later layers and tokens
would have seen other inputs; a replay takes their recorded routing as if they had not. Weights of
other experts follow the recorded scores: normalised where the recorded ones always have the same
sum, else as large in relation to their scores.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from retinue.policy.base import BoolArray, Choice, Route, Routing, Thinning, View
from retinue.policy.ranks import each_row
from retinue.policy.thin.left_out import left_out
from retinue.types import FloatArray, IntArray, Phase

ULP = np.float32(1 + 2**-10)  # what rounding to fp16 may have taken from whom the router preferred
SAME_SUM = 0.02  # sums of a token's weights that differ by less are equal


class Rows(NamedTuple):
    """Experts and weights of some tokens in one layer: [tokens, k] each."""

    experts: IntArray
    weights: FloatArray


@dataclass(frozen=True, slots=True)
class Served:
    """Who serves instead, and how much routing weight that is not the chosen expert's: [tokens]."""

    rows: Rows
    degraded: FloatArray
    rerouted: int = 0  # pairs of a token and an expert that another one serves


def choice_of(
    layer: int, rows: Rows, scores: FloatArray, phase: Phase, hidden: FloatArray | None = None
) -> Choice:
    """What the router says of these tokens; `scores` [tokens, experts] were rounded to fp16.

    hidden: the router's input, for a routing that asks for it.
    """
    scores = scores.copy()
    if len(scores) == 1:
        ids = rows.experts[0]
        scores[0, ids[ids < scores.shape[1]]] *= ULP
        return Choice(layer, scores, rows.experts, rows.weights, hidden, phase=phase)
    there = rows.experts < scores.shape[1]
    scores[there.nonzero()[0], rows.experts[there]] *= ULP
    return Choice(layer, scores, rows.experts, rows.weights, hidden, phase=phase)


def reroute(routing: Routing, choice: Choice, resident: BoolArray) -> Served:
    """Let `routing` choose among the experts, of which `resident` [tokens, experts] are there."""
    own = Rows(choice.experts, choice.weights)
    ranking = routing.rank(choice, resident)
    nothing = np.zeros(len(choice.experts), dtype=np.float32)
    if ranking is None:
        return Served(own, nothing)
    top_k = choice.experts.shape[1]
    if len(ranking) == 1:
        return _reroute_one(choice, (-ranking[0]).argsort(kind="stable")[:top_k], own)
    ids = (-ranking).argsort(axis=1, kind="stable")[:, :top_k]
    replaced = (choice.experts[:, :, None] != ids[:, None]).all(axis=2)
    same = ~replaced.any(axis=1)
    ids[same] = choice.experts[same]
    degraded = (choice.weights * replaced).sum(axis=1)
    rows = Rows(ids, np.where(same[:, None], choice.weights, _weights(choice, ids)))
    return Served(rows, degraded, int(np.count_nonzero(replaced)))


def _reroute_one(choice: Choice, ids: IntArray, own: Rows) -> Served:
    """The same for one token, of which `ids` [k] rank first."""
    mine = set(ids.tolist())
    replaced = [expert not in mine for expert in choice.experts[0].tolist()]
    count = sum(replaced)
    if not count:
        return Served(own, np.zeros(1, dtype=np.float32))
    degraded = (choice.weights * np.array([replaced])).sum(axis=1)
    return Served(Rows(ids[None], _weights(choice, ids[None])), degraded, count)


def thin(thinning: Thinning, route: Route, view: View, rows: Rows) -> Served:
    """Leave out the experts of `rows` that `thinning` does not keep; their ids then mean none."""
    route = Route(route.layer, *rows, route.sequences, route.scores, route.hidden, route.token_ids)
    keep, lost, gain = left_out(thinning, route, view)
    if keep.all():
        return Served(rows, lost)
    weights = np.where(keep, rows.weights * gain[:, None], 0).astype(np.float32)
    return Served(Rows(np.where(keep, rows.experts, view.experts), weights), lost)


def _weights(choice: Choice, ids: IntArray) -> FloatArray:
    """What the family would give the experts `ids` [tokens, k], as far as its weights tell."""
    scores = choice.scores[each_row(len(ids)), ids]
    sums = choice.weights.sum(axis=1, keepdims=True)
    if len(sums) == 1 or sums.max() - sums.min() < SAME_SUM * sums.mean():
        whole = scores.sum(axis=1, keepdims=True)
    else:
        own = np.minimum(choice.experts, choice.scores.shape[1] - 1)
        whole = choice.scores[each_row(len(own)), own].sum(axis=1, keepdims=True)
    return np.asarray(scores * sums / np.where(whole > 0, whole, 1), dtype=np.float32)
