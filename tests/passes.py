"""Passes by hand, for policies that watch: what each token chose, shown to them layer by layer."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import routes
from retinue.policy.base import Ahead, Prompt, View
from retinue.types import Want
from routes import LAYERS, floats, view

COMING = {layer: tuple(Ahead(at) for at in range(layer + 1, LAYERS)) for layer in range(LAYERS)}


def prompt(sequence: int, embedding: list[float] | None = None) -> Prompt:
    ids = np.zeros(0, dtype=np.int64)
    return Prompt(sequence, None, ids, None if embedding is None else floats(embedding))


def show(watcher: Any, experts: list[list[int]], layer: int, step: int = 9, **facts: Any) -> View:
    """A layer in which each token chose so; returns what policies see then."""
    weights = [[0.5] * len(row) for row in experts]
    found = routes.route(experts, weights, layer=layer, sequences=facts.pop("sequences", None))
    scores, ids = facts.pop("scores", None), facts.pop("token_ids", None)
    if scores is not None:
        found = replace(found, scores=floats(scores))
    if ids is not None:
        found = replace(found, token_ids=np.array(ids, dtype=np.int64))
    seen = view(layer=layer, step=step, route=found, ahead=COMING[layer], **facts)
    watcher.observe(routes.demand(found), seen)
    return seen


def listed(wants: list[Want]) -> list[tuple[int, list[int], list[float]]]:
    return [(want.layer, want.experts.tolist(), pytest.approx(want.scores)) for want in wants]
