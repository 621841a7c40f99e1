"""A loaded model's order: what it takes over from the profile, and what it does not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jobs import Waiting
from retinue.config import Config
from retinue.engine.ordering import missing, order_of
from retinue.errors import UsageError
from retinue.memory.machine import machine_name
from retinue.policy.evict.recency import Recency
from retinue.policy.measured import MachineCosts, OutputTokens
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.order.alike import Alike
from retinue.policy.order.emoe import Emoe
from retinue.policy.order.shortest import Shortest
from retinue.policy.place.popular import Popular, PopularByTask
from retinue.policy.policies import NoPlacement, NoPredictor, Policies

FACTS: Any = SimpleNamespace(read_bytes=10)


class Known:
    """A profile of two layers of four experts, in which task `a` uses the first two."""

    experts = 4

    def __init__(self, machine: str = "another") -> None:
        self.costs = MachineCosts(0.5, 0.01, 0.0, 0.25, machine)

    def shares(self, task: str | None) -> Any:
        return np.array([[0.5, 0.5, 0, 0] if task == "a" else [0.25] * 4] * 2)

    def output_tokens(self, task: str | None) -> OutputTokens | None:
        return OutputTokens(3.0, 3.0, 5.0) if task == "a" else None


PLAIN = Policies(Recency(), NoPredictor(), FetchAll())
CACHE: Any = SimpleNamespace(slot_of=np.array([[0, -1, 1, 2], [-1, -1, -1, 3]]))


def made(known: Any, placement: Any = None, order: str | None = None) -> Any:
    """`order` is the preset's."""
    parts = Recency(), NoPredictor(), FetchAll()
    policies = Policies(
        *parts, placement=placement or NoPlacement(), order=order, paths=lambda prompt: prompt > 0
    )
    return order_of(Config(), FACTS, known, policies, CACHE)


def test_the_order_is_the_one_that_is_named() -> None:
    assert isinstance(made(None), Emoe)
    assert isinstance(order_of(Config(order="shortest"), FACTS, None, PLAIN, CACHE), Shortest)
    assert isinstance(made(None, order="alike"), Alike)
    with pytest.raises(UsageError, match="`alike` groups by what a preset predicts"):
        order_of(Config(order="alike"), FACTS, None, PLAIN, CACHE)


def test_experts_of_a_task_that_are_not_in_memory() -> None:
    count = missing(Known(), CACHE)  # type: ignore[arg-type]
    assert (count("a"), count("b")) == (3, 0)


def test_costs_of_another_machine_are_not_ours() -> None:
    here, there = made(Known(machine_name())), made(Known())
    assert here._estimate.costs.decode.at(10) == pytest.approx(0.6)
    assert not there._estimate.costs.known
    assert there._estimate.lengths.whole(Waiting("a")) == 3.0
    assert there._estimate.lengths.whole(Waiting("b")) == 10


def test_loading_is_priced_where_something_would_be_loaded() -> None:
    profile = Known(machine_name())
    seconds = [
        made(profile, placement)._estimate.load_s("a")
        for placement in (NoPlacement(), PopularByTask(), Popular())
    ]
    assert seconds == [pytest.approx(0.75), pytest.approx(0.75), 0.0]
    by_bytes = made(None)._estimate
    for count in range(1, 20):
        by_bytes.loaded(10 * count, 2.0 * count)
    assert by_bytes.costs.load.at(5) == pytest.approx(10.0)
