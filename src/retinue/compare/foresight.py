"""How well the next layer's router, asked with this layer's input, says what that layer will use.

Look-ahead by gates (Mixtral-offloading, 2312.17238; HOBBIT, 2411.01433; AdapMoE, 2408.10284) lives
on this recall: of the k experts that the next layer then chooses, the share that is among the k
that its router names one layer early.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from retinue.compare.grid import DEFAULT, Grid
from retinue.errors import Refused
from retinue.lab.base import Row
from retinue.lab.bench import Bench
from retinue.model.scoring import LayerRouting, Scorer
from retinue.types import FloatArray, IntArray

NAME = "foresight"
NEXT_GATE = "next gate"
SIGNAL = "next_scores"


def measure(bench: Bench, grid: Grid) -> list[Row]:
    """One row for each layer that can be foretold, over all tokens of the texts."""

    def run() -> list[Row]:
        budget = grid.budgets[-1]
        settings = {"memory": budget.memory, "experts": budget.experts}
        with bench.opened(**settings, preset=DEFAULT, read_limit=None) as llm:
            assembly = llm.assembly
            if not assembly.host.sees_ahead:
                raise Refused("some routers of this model cannot be asked")
            parts = assembly.network, assembly.host, assembly.mover, assembly.metrics
            scorer = Scorer(*parts)
            counts: dict[int, list[int]] = {}
            with scorer.recording((SIGNAL,)) as routing:
                for text in bench.texts:
                    scorer.score(text.ids, 1)
                    for layer, found in foretold(routing, assembly.cache.experts).items():
                        known = counts.setdefault(layer, [0, 0])
                        counts[layer] = [known[0] + found[0], known[1] + found[1]]
                    bench.check()
        return [
            {"layer": layer, "named": named, "used": used, "recall": named / used}
            for layer, (named, used) in counts.items()
        ]

    return bench.once(NAME, NEXT_GATE, run)


def foretold(routing: Sequence[LayerRouting], experts: int) -> dict[int, tuple[int, int]]:
    """By layer, how many of the experts that its tokens chose were named, and how many they chose.

    A text's routing, each layer in order; a router names as many as the layer chooses.
    """
    found = {}
    for now, after in pairwise(routing):
        if SIGNAL in now.ahead:
            found[after.layer] = _named(now.ahead[SIGNAL], after.experts, experts)
    return found


def _named(scores: FloatArray, chosen: IntArray, experts: int) -> tuple[int, int]:
    """scores: [tokens, experts]; chosen: [tokens, k], ids beyond the experts mean none."""
    width = chosen.shape[1]
    best = np.argpartition(-scores, width - 1, axis=1)[:, :width]
    named = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(named, best, True, axis=1)
    there = chosen < experts
    hits = np.take_along_axis(named, np.where(there, chosen, 0), axis=1) & there
    return int(hits.sum()), int(there.sum())


def recall(rows: Sequence[Row]) -> float | None:
    """Over all layers; None where nothing was measured."""
    used = sum(float(row["used"] or 0) for row in rows)
    return sum(float(row["named"] or 0) for row in rows) / used if used else None
