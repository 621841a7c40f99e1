"""What `retinue profile` measures: by hand where that is possible, and on a tiny model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from retinue.engine.profiling import ALONE, Effort, _line, _trials, make_profile, planned
from retinue.memory.machine import machine_name
from retinue.model.scoring import Scorer
from retinue.policy.base import Choice
from retinue.policy.periods import measure_periods
from retinue.policy.route.random_layers import RandomLayers
from retinue.policy.transitions import (
    TransitionCounter,
    Transitions,
    transitions_dict,
    transitions_from,
)
from test_evaluate import TEXTS, opened


def test_random_layers() -> None:
    scores = np.zeros((3, 4), np.float32)
    choice = Choice(1, scores, np.zeros((3, 2), np.int64), np.ones((3, 2), np.float32))
    resident = np.array([[True, True, False, True]]).repeat(3, axis=0)
    assert RandomLayers([0, 2]).rank(choice, resident) is None
    drawn = RandomLayers([1], seed=5).rank(choice, resident)
    assert drawn is not None
    assert (np.isneginf(drawn) == ~resident).all()
    assert len(set(drawn[resident].tolist())) == resident.sum()
    assert np.array_equal(drawn, RandomLayers([1], seed=5).rank(choice, resident))


def test_trials_from_both_sides_and_one_by_one() -> None:
    sides = [(0,), (0, 1), (3,), (2, 3), (0, 1, 2, 3)]
    assert _trials((0, 1, 2, 3)) == [*sides, (1,), (2,)]
    assert _trials((1, 3)) == [(1,), (3,), (1, 3)]
    assert _trials((2,)) == [(2,)]
    deep = _trials(range(48))
    assert [len(trial) for trial in deep if len(trial) > 1] == [12, 24, 12, 24, 48]
    singles = sorted(trial[0] for trial in deep if len(trial) == 1)
    assert len(singles) == ALONE
    assert (singles[0], singles[-1]) == (0, 47)
    assert set(np.diff(singles).tolist()) <= {3, 4}, "evenly spread"


def tokens(*rows: list[list[int]]) -> Any:
    return np.array(rows)


def test_transitions_by_hand() -> None:
    counter = TransitionCounter((1, 3), 3)
    # Two tokens, two layers, one expert each: 0 is always followed by 2; id 3 means none.
    counter.add(tokens([[0], [2]], [[0], [2]], [[1], [3]]), np.array([[2, 1, 0], [0, 0, 2]]))
    counter.add(tokens([[1], [0]]), np.array([[2, 1, 0], [2, 0, 0]]))
    found = counter.result()
    assert found.pairs == {(1, 0, 2): 2, (1, 1, 0): 1}
    assert found.following(1, 0) == {2: 2}
    assert found.texts == 2
    # Equal in the first layer; in the second -0.5 and nothing in common.
    assert found.prompts == pytest.approx((1 - 0.5) / 2)
    assert found.overlap == pytest.approx(0.5)


def test_likeness_of_layers() -> None:
    random = np.random.default_rng(0)
    here = random.integers(0, 8, (2000, 1, 1))
    uses = np.ones((2, 8))
    for there, low, high in (((here + 3) % 8, 0.99, 1.0), (random.permutation(here), 0.0, 0.06)):
        counter = TransitionCounter((0, 1), 8)
        counter.add(np.concatenate([here, there], axis=1), uses)
        assert low <= counter.result().layers <= high


def test_transitions_add_up_and_stay_small() -> None:
    one = Transitions(1, 0.5, 0.2, 0.4, {(0, 0, 1): 5, (0, 1, 1): 2, (0, 1, 0): 1})
    two = Transitions(3, 0.1, 0.6, 0.8, {(0, 1, 0): 7, (2, 0, 0): 1})
    both = one.plus(two)
    assert both.pairs == {(0, 0, 1): 5, (0, 1, 1): 2, (0, 1, 0): 8, (2, 0, 0): 1}
    assert (both.texts, both.layers, both.overlap) == (4, pytest.approx(0.2), pytest.approx(0.7))
    document = transitions_dict(both, experts=2)
    assert document["following"] == {"0": {"1": {"0": 8}, "0": {"1": 5}}, "2": {"0": {"0": 1}}}
    kept = transitions_from(document)
    assert kept.pairs == {(0, 1, 0): 8, (0, 0, 1): 5, (2, 0, 0): 1}
    assert transitions_dict(kept, 2) == document


def one_expert(*experts: int) -> list[tuple[str | None, Any]]:
    return [("a", np.eye(4, dtype=np.float32)[[expert]]) for expert in experts]


def test_periods_by_hand() -> None:
    # 40 % of 4 experts are 2: the prompt's own, and the first of the others.
    still = measure_periods(one_expert(*[3] * 40), top_k=1)
    assert still.degraded == {1: 0.0, 5: 0.0, 10: 0.0}
    assert still.best == 10
    turning = measure_periods(one_expert(*[2] * 10, *[3] * 10), top_k=1)
    assert turning.degraded[1] == pytest.approx(1 / 19)
    assert turning.degraded[5] == pytest.approx((5 + 1 + 2 + 3 + 4) / (15 + 19 + 18 + 17 + 16))
    assert set(turning.degraded) == {1, 5}  # of ten there would be two refreshes
    assert turning.best == 1
    other = one_expert(2, 2, 2, 2) + [("b", used) for _, used in one_expert(3, 3, 3, 3)]
    assert measure_periods(other, top_k=1).degraded[1] == 0  # each task has its own set
    assert measure_periods([], top_k=1).best is None


def test_a_line_by_least_squares() -> None:
    assert _line([(1, 3.0), (1, 9.0), (3, 7.0), (5, 11.0)]) == pytest.approx((1, 2))
    assert _line([(1, 5.0), (2, 1.0)]) == pytest.approx((0, 1.4))  # falling: through the origin
    assert _line([(4, 2.0), (4, 8.0)]) == pytest.approx((0, 0.5))


def test_a_whole_profile(olmoe: Path) -> None:
    assembly = opened(olmoe, experts="60%")
    effort = Effort(sensitivity=1, insensitive_above=0.5, answers=1, costs=True)
    count: list[int] = []
    try:
        scorer = Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)
        before = scorer.score(TEXTS[0].ids, 12)
        made = make_profile(assembly, TEXTS, lambda: count.append(1), effort)
        after = scorer.score(TEXTS[0].ids, 12)
        assert len(count) == planned(assembly, TEXTS, effort)
        assembly.engine.idle()
    finally:
        assembly.close()
    assert (before.nll == after.nll).all()  # the routers are their own again
    task = made.tasks["a"]
    assert (task.texts, task.tokens) == (2, 47)
    assert (task.choices.sum(axis=1) == 47 * models.TOP_K).all()
    assert task.words_total == sum(task.words.values()) == 47 - 12 - 5
    assert task.continuations == {12: 1, 5: 1}
    assert task.transitions is not None
    assert {pair[0] for pair in task.transitions.pairs} == set(range(models.LAYERS - 1))
    sensitivity = task.sensitivity
    assert sensitivity is not None
    assert list(sensitivity.first) == list(sensitivity.last) == [1, 2, models.LAYERS]
    whole = models.LAYERS
    assert sensitivity.first[whole] == sensitivity.last[whole]
    assert sensitivity.first[1] != sensitivity.last[1]
    assert list(sensitivity.alone) == list(range(models.LAYERS))
    assert sensitivity.alone[0] == sensitivity.first[1]
    assert sensitivity.alone[models.LAYERS - 1] == sensitivity.last[1]
    tried = [damage.added_nll for damage in sensitivity.alone.values()]
    assert len(set(tried)) == models.LAYERS, "each layer was another trial"
    assert 0 <= sensitivity.first[whole].agreement < 0.9
    assert sensitivity.above == 0.5
    assert made.costs is not None
    assert made.costs.machine == machine_name()
    assert made.costs.load_s > 0


def test_counts_alone(olmoe: Path) -> None:
    assembly = opened(olmoe)
    try:
        made = make_profile(assembly, TEXTS, lambda: None)
    finally:
        assembly.close()
    assert made.costs is None
    assert made.tasks["a"].sensitivity is None
    assert made.tasks["a"].answers == {}
