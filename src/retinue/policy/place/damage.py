"""How much it hurts when another expert serves, by layer and expert, from a profile.

By layer: what random routing in that layer alone cost, see `policy/measured.py`. Beyond eMoE
(arXiv 2503.06823), where a layer matters or does not. By expert: what its tokens give it when
they choose it, since the error of an output grows with the square of the weight that is served
wrongly, and the share of routing weight has that weight only once.
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from retinue.policy.profile import Profile, TaskCounts

TEMPER = 0.75  # random routing exaggerates how much layers differ, see docs/LOG.md
LEAST = 0.1  # of the mean: no layer is harmless

Weights = npt.NDArray[np.float64]


def damage(profile: Profile) -> Weights:
    """Relative damage of each expert's routing weight, about 1 on average: [layers, experts]."""
    tasks = list(profile.tasks.values())
    layers = layer_damage(tasks, profile.layers)
    return layers[:, None] * expert_damage(tasks, profile.layers, profile.experts)


def layer_damage(tasks: Iterable[TaskCounts], layers: int) -> Weights:
    """By layer, 1 on average: [layers]. What was not tried lies between its neighbours.

    All 1 where nothing was tried.
    """
    total = np.zeros(layers)
    for task in tasks:
        tried = task.sensitivity.alone if task.sensitivity is not None else {}
        if tried:
            added = [tried[layer].added_nll for layer in sorted(tried)]
            total += task.texts * np.interp(np.arange(layers), sorted(tried), added)
    if total.mean() <= 0:
        return np.ones(layers)
    total = np.maximum(total, LEAST * total.mean()) ** TEMPER
    return np.asarray(total / total.mean())


def expert_damage(tasks: Iterable[TaskCounts], layers: int, experts: int) -> Weights:
    """By expert, 1 on average over a layer's choices; 1 for one that was never chosen."""
    weight, choices = np.zeros((layers, experts)), np.zeros((layers, experts))
    for task in tasks:
        weight += task.weight
        choices += task.choices
    each = weight / np.maximum(choices, 1)
    mean = weight.sum(axis=1, keepdims=True) / np.maximum(choices.sum(axis=1, keepdims=True), 1)
    return np.asarray(np.where(each > 0, each / np.where(mean > 0, mean, 1), 1.0))
