"""What every exact system keeps, whatever runs: evictors are total orders, nobody is made up."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import routes
from disk import STEADY
from passes import prompt
from retinue.policy.base import Ahead, Costs, View
from retinue.policy.policies import Policies
from retinue.policy.presets import PRESETS
from routes import EXPERTS, HIDDEN, LAYERS

EXACT = [name for name, row in PRESETS.items() if row.exact and not row.replayed]
ENTRIES = [(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
COSTS = (None, Costs(2.0, 0.1, 0.1), Costs(2.0, 0.1, 0.1, elsewhere_s=0.4))


class Pass:
    """Random passes of two requests, as the engine shows them."""

    def __init__(self, policies: Policies, seed: int) -> None:
        self._policies, self._random = policies, np.random.default_rng(seed)
        self._last_used = np.full((LAYERS, EXPERTS), -1, dtype=np.int64)
        self._heat = np.zeros((LAYERS, EXPERTS), dtype=np.float32)
        self._step = 0
        for number in (5, 6):
            for watcher in policies.watchers:
                watcher.begin(prompt(number, [1.0, 0.5, float(number)]))

    def run(self, sequences: list[int], until: int = LAYERS) -> View:
        """One pass, up to the layer before `until`; returns what is seen in that one."""
        self._step += 1
        for layer in range(until):
            seen = self._layer(layer, sequences)
        return seen

    def _layer(self, layer: int, sequences: list[int]) -> View:
        random, policies, count = self._random, self._policies, len(sequences)
        scores = random.dirichlet(np.ones(EXPERTS), count).astype(np.float32)
        chosen = np.argsort(-scores, axis=1)[:, :2].tolist()
        found = routes.route(chosen, [[0.5, 0.5]] * count, layer=layer, sequences=sequences)
        hidden = random.standard_normal((count, HIDDEN)).astype(np.float32)
        ids = random.integers(0, 9, count)
        found = replace(found, scores=scores, hidden=hidden, token_ids=ids)
        ahead = tuple(
            Ahead(at, random.dirichlet(np.ones(EXPERTS), count).astype(np.float32))
            for at in range(layer + 1, min(LAYERS, layer + 1 + policies.predictor.depth))
        )
        demand = routes.demand(found)
        facts: dict[str, Any] = {"last_used": self._last_used, "heat": self._heat, "route": found}
        facts |= {"step": self._step, "layer": layer, "ahead": ahead}
        facts |= {"phase": "prefill" if count > 2 else "decode"}
        facts |= {"resident": random.random((LAYERS, EXPERTS)) < 0.5}
        seen = routes.view(**facts, costs=COSTS[self._step % len(COSTS)])
        for watcher in policies.watchers:
            watcher.observe(demand, seen)
        policies.predictor.observe(demand, seen)
        self._check_wants(seen)
        self._last_used[layer, demand.experts] = self._step
        self._heat[layer] *= 0.9
        self._heat[layer, demand.experts] += demand.tokens
        return seen

    def _check_wants(self, seen: View) -> None:
        """Coming layers, their experts, each once a layer, and a finite score of each."""
        wants = self._policies.predictor.forecast(seen)
        wanted = [(want.layer, expert) for want in wants for expert in want.experts.tolist()]
        assert len(wanted) == len(set(wanted))
        assert set(wanted) <= set(ENTRIES)
        assert {want.layer for want in wants} <= {ahead.layer for ahead in seen.ahead}
        for want in wants:
            assert want.scores.shape == want.experts.shape
            assert len(want.experts)
            assert np.isfinite(want.scores).all()


@pytest.mark.parametrize("name", EXACT)
@STEADY
@given(data=st.data())
def test_evictors_are_total_orders(name: str, data: st.DataObject) -> None:
    """Finite, the same again, and the same for an entry whoever is asked about besides."""
    policies = PRESETS[name].build(routes.given())
    passes = Pass(policies, data.draw(st.integers(0, 2**32 - 1)))
    for sequences in data.draw(
        st.lists(st.sampled_from([[5], [6], [5, 6], [5] * 5, [5, 6, 5]]), max_size=4)
    ):
        passes.run(sequences)
    seen = passes.run([5], until=data.draw(st.integers(1, LAYERS)))
    order = data.draw(st.permutations(ENTRIES))
    layers, experts = np.array(ENTRIES).T
    found = policies.evictor.priorities(layers, experts, seen)
    assert found.shape == (len(ENTRIES),)
    assert np.isfinite(found).all()
    assert (policies.evictor.priorities(layers, experts, seen) == found).all()
    again = policies.evictor.priorities(*np.array(order).T, seen)
    ranked = [entry for _, entry in sorted(zip(found.tolist(), ENTRIES, strict=True))]
    assert [entry for _, entry in sorted(zip(again.tolist(), order, strict=True))] == ranked


@pytest.mark.parametrize("name", EXACT)
def test_requests_come_and_go(name: str) -> None:
    """Who ended is forgotten, and who comes next is a new one; unknown ones do no harm."""
    policies = PRESETS[name].build(routes.given())
    passes = Pass(policies, 3)
    for step in range(40):
        passes.run([5, 6] if step % 3 else [5, 99])
        for watcher in policies.watchers:
            watcher.end(5)
            watcher.end(1000 + step)
            watcher.begin(prompt(5, [0.0, 0.0, 1.0]))
    assert policies.exact


LOOKING = [name for name in EXACT if PRESETS[name].build(routes.given()).predictor.depth]


@pytest.mark.parametrize("name", LOOKING)
def test_whoever_looks_ahead_finds_something(name: str) -> None:
    policies = PRESETS[name].build(routes.given())
    found: list[int] = []
    forecast = policies.predictor.forecast
    policies.predictor.forecast = lambda seen: (  # type: ignore[method-assign]
        found.append(len(wants := forecast(seen))) or wants
    )
    passes = Pass(policies, 4)
    for sequences in ([5, 5, 5], [5], [5, 6], [6]):
        passes.run(sequences)
    assert sum(found) > 0
