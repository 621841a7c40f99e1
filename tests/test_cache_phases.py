"""Prefill and decode share the slots: the ring, the quotas, and what policies see of it all."""

import numpy as np
import pytest

from disk import Rig, ids
from retinue.memory.history import HEAT_DECAY
from retinue.memory.tier import Tier
from retinue.policy.base import Ahead
from retinue.types import Demand, IntArray


def through_prefill(rig: Rig, layer: int, experts: range, keep: IntArray | None = None) -> None:
    """What a prefill does: all experts of a layer, in waves."""
    rig.cache.begin_layer(layer)
    left = list(experts)
    while left:
        left = rig.load(layer, *left, keep=keep)


def test_prefill_does_not_flush_what_decode_uses() -> None:
    with Rig((8, 8), slots=8, top_k=2) as rig:
        assert rig.cache.division.ring == 4
        rig.begin("decode")
        for layer in (0, 1):
            rig.load(layer, 0, 1, 2, 3)
            rig.use(layer, 0, 1, 2, 3)
        rig.begin("prefill")
        for layer in (0, 1):
            through_prefill(rig, layer, range(4, 8))
        # ByNumber sends layer 0 away first, but only as many as the ring has.
        assert rig.resident(0) == []
        assert rig.resident(1) == list(range(8))


def test_prefill_keeps_each_layers_quota() -> None:
    with Rig((8, 8), slots=8, top_k=2) as rig:
        assert rig.cache.division.quota == 2
        rig.begin("prefill")
        through_prefill(rig, 0, range(8), keep=ids(0, 1))
        through_prefill(rig, 1, range(8), keep=ids(6, 7))
        assert {0, 1} <= set(rig.resident(0))
        assert {6, 7} <= set(rig.resident(1))
        rig.begin("decode")
        assert rig.cache.room(4), "what only passed leaves first"
        assert (rig.resident(0), rig.resident(1)) == ([0, 1], [6, 7])


def test_passing_experts_leave_early_where_new_pages_are_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Rig((8, 8), slots=8, top_k=2) as rig:
        monkeypatch.setattr(Tier, "quick", property(lambda tier: 0))
        rig.begin("prefill")
        through_prefill(rig, 0, range(4), keep=ids(0, 1))
        assert rig.resident(0) == [0, 1, 2, 3], "those of the layer that runs stay"
        through_prefill(rig, 1, range(4), keep=ids(0, 1))
        assert (rig.resident(0), rig.resident(1)) == ([0, 1], [0, 1, 2, 3])
        assert rig.tier.free == 2
        rig.begin("decode", 0)
        rig.load(0, 2)
        assert rig.resident(1) == [0, 1, 2, 3], "in decode all slots are taken first"


def test_a_use_in_decode_makes_a_passing_expert_stay() -> None:
    with Rig((8,), slots=4, top_k=1) as rig:
        rig.begin("prefill")
        through_prefill(rig, 0, range(4))
        rig.begin("decode")
        rig.use(0, 0)
        assert rig.cache.room(3)
        assert rig.resident(0) == [0]


def test_when_everything_fits_nothing_passes() -> None:
    with Rig((4, 4), slots=8, top_k=2) as rig:
        assert rig.cache.holds_everything
        assert (rig.cache.division.ring, rig.cache.division.quota) == (0, 4)
        rig.begin("prefill")
        for layer in (0, 1):
            through_prefill(rig, layer, range(4), keep=ids())
        assert rig.cache.resident == 8


# --- what policies see


def test_touch_records_use_and_heat() -> None:
    with Rig((4, 4), slots=4) as one, Rig((4, 4), slots=4) as many:
        for rig in (one, many):
            rig.begin("decode", layer=1)
        for _ in range(3):
            one.use(1, 2)
        demand = Demand(1, ids(2), ids(3), np.ones(1, dtype=np.float32))
        many.cache.touch(demand, tokens=3)
        assert one.cache.heat[1, 2] == pytest.approx(1 + HEAT_DECAY + HEAT_DECAY**2)
        assert one.cache.heat == pytest.approx(many.cache.heat)
        assert np.flatnonzero(one.cache.heat).tolist() == [6]
        one.use(1, 0)
        assert one.cache.heat[1, 2] == pytest.approx(many.cache.heat[1, 2] * HEAT_DECAY)
        assert one.cache.last_used[1].tolist() == [1, -1, 1, -1]
        assert (one.cache.last_used[0] == -1).all()


def test_view_holds_the_facts() -> None:
    with Rig((4, 3), slots=4, top_k=2) as rig:
        rig.begin("prefill", layer=1)
        rig.load(1, 2)
        scores = np.ones((1, 4), dtype=np.float32)
        view = rig.cache.view((Ahead(0, scores),))
        assert (view.step, view.layer, view.phase, view.top_k) == (1, 1, "prefill", 2)
        assert (view.layers, view.experts, view.slots) == (2, 4, 4)
        assert np.argwhere(view.resident).tolist() == [[1, 2]]
        assert view.ahead[0].scores is scores
