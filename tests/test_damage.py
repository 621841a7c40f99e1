"""What wrong routing costs by layer and expert, from a profile."""

import numpy as np
import pytest

from retinue.policy.measured import Damage, Sensitivity
from retinue.policy.place.damage import LEAST, TEMPER, damage, expert_damage, layer_damage
from retinue.policy.profile import Profile, TaskCounts


def task(alone: dict[int, float] | None, texts: int = 1) -> TaskCounts:
    """In each layer one expert is chosen 4 times with 0.5, one once with 0.75, one never."""
    choices = np.tile([4, 1, 0], (4, 1))
    weight = np.tile([2.0, 0.75, 0.0], (4, 1)).astype(np.float32)
    found = None
    if alone is not None:
        tried = {layer: Damage(texts, 0.5, added) for layer, added in alone.items()}
        found = Sensitivity(0.85, alone=tried)
    return TaskCounts(texts, 10, choices, weight, sensitivity=found)


def test_layers_that_were_not_tried_lie_between_their_neighbours() -> None:
    found = layer_damage([task({0: 0.4, 2: 0.2})], 4)
    assert found.mean() == pytest.approx(1)
    assert found / found[0] == pytest.approx(np.array([1, 0.75, 0.5, 0.5]) ** TEMPER)


def test_tasks_count_by_their_texts_and_no_layer_is_harmless() -> None:
    tries = [task({0: 0.4, 1: 0.0, 2: -0.1, 3: 0.1}, texts=3), task({0: 0.0}), task(None, texts=9)]
    found = layer_damage(tries, 4)
    mean = 3 * (0.4 + 0 - 0.1 + 0.1) / 4
    assert found / found[0] == pytest.approx(
        (np.array([1.2, LEAST * mean, LEAST * mean, 0.3]) / 1.2) ** TEMPER
    )


def test_an_expert_counts_by_the_weight_of_one_choice() -> None:
    # 2.75 over 5 choices: 0.55 on average.
    assert expert_damage([task(None)] * 2, 4, 3)[0] == pytest.approx([0.5 / 0.55, 0.75 / 0.55, 1])


def test_a_profile_that_tried_nothing_tells_experts_apart_only() -> None:
    profile = Profile("tiny", 4, 3, 1, {"a": task(None), "b": task({})})
    assert damage(profile) == pytest.approx(expert_damage(profile.tasks.values(), 4, 3))
