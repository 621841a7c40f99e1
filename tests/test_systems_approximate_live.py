"""Approximate presets in the real engine: they answer, say what it cost, and lose no slot.

With constants under which a rule changes nothing, the rule runs, and the tokens are the plain ones.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

import models
from retinue.config import Config
from retinue.engine.assembly import Assembly, assemble
from retinue.engine.evaluate import evaluate
from retinue.engine.request import Request, new_request
from retinue.engine.reserve import reserve
from retinue.engine.tasks import TaskIds
from retinue.memory.home import sample_folder
from retinue.memory.machine import cache_folder
from retinue.policy.policies import Policies
from retinue.policy.preset import Given
from retinue.policy.systems import approximate
from routes import drawn_parts

ROWS = {row.name: row for row in approximate.PRESETS}
PROMPT, COUNT = [7 + n * n % 900 for n in range(60)], 24
LAYERS, EXPERTS, TOP_K, HIDDEN = 8, 32, 4, 256
GIVEN = Given("sample", LAYERS, EXPERTS, TOP_K, routed=tuple(range(LAYERS)), slots=64)
PARTS = drawn_parts(LAYERS, EXPERTS, HIDDEN)
Build = Callable[[Given], Policies]


def opened(build: Build | None, experts: str = "25%", check: bool = False) -> Assembly:
    """A model under the policies of `build`; None: `on-demand`."""
    fixed = {"memory": "2GiB", "threads": 1, "context": 128, "preset": "on-demand"}
    config = Config(**fixed, experts=experts, self_check=check)
    reserved = reserve(sample_folder(), config)
    if build is None:
        return assemble(reserved)
    given = replace(GIVEN, slots=reserved.split.slots, learned=PARTS)
    return assemble(replace(reserved, policies=build(given)))


def answered(assembly: Assembly, *prompts: list[int]) -> list[Request]:
    requests = [new_request(prompt, models.greedy(COUNT), None) for prompt in prompts]
    for request in requests:
        assembly.engine.add(request)
    while assembly.engine.busy:
        assembly.engine.step()
    assembly.engine.idle()
    for request in requests:
        assert request.error is None, request.error
    return requests


@pytest.fixture(scope="module")
def plain() -> list[int]:
    assembly = opened(None)
    (request,) = answered(assembly, PROMPT)
    assembly.close()
    return request.token_ids


@pytest.mark.parametrize("name", list(ROWS))
def test_it_answers_and_says_what_that_cost(name: str) -> None:
    assembly = opened(ROWS[name].build)
    try:
        (request,) = answered(assembly, PROMPT)
        assert len(request.token_ids) == COUNT
        assert request.usage is not None
        assert 0 < request.usage.degraded_share <= 1
        both = (request.costs.prefill, request.costs.decode)
        degraded = sum(part.degraded_weight for part in both)
        routed = sum(part.routed_weight for part in both)
        assert request.usage.degraded_share == pytest.approx(degraded / routed, rel=1e-4)
        assert all(part.degraded_weight <= part.routed_weight * 1.0001 for part in both)
        # Several at once, and again: what watchers keep of a request ends with it.
        first, second = answered(assembly, PROMPT, PROMPT[::-1])
        assert len(first.token_ids) == len(second.token_ids) == COUNT
    finally:
        assembly.close()


HARMLESS: dict[str, Build] = {
    "hobbit": lambda given: approximate.hobbit(given, high=1 - 1e-7, skip=1 - 1e-7),
    "hobbit, exact": lambda given: approximate.hobbit(given, high=1, skip=1),
    "adapmoe": lambda given: approximate.adapmoe(given, tolerance=0),
    "d2moe": lambda given: approximate.d2moe(given, capacities=(0, 0, 0)),
    "cache-prior": lambda given: approximate.cache_prior(given, weight=1e-9),
    "daop": lambda given: approximate.daop(given, kept=TOP_K),
    "mc-moe-odp": lambda given: approximate.mc_moe_odp(given, quantile=0),
    "swapmoe": lambda given: approximate.swapmoe(given, every=10**9),
}


@pytest.mark.parametrize("name", list(HARMLESS))
def test_constants_that_change_nothing_give_the_plain_tokens(name: str, plain: list[int]) -> None:
    assembly = opened(HARMLESS[name])
    try:
        (request,) = answered(assembly, PROMPT)
        assert request.token_ids == plain
        share = 0 if request.usage is None else request.usage.degraded_share
        assert share == 0
    finally:
        assembly.close()


@pytest.mark.parametrize("name", ["pre-gated", "read-me"])
def test_what_was_chosen_before_is_there_or_on_its_way(name: str) -> None:
    """When the routing is known ahead, only the first layer can miss."""
    assembly = opened(ROWS[name].build, experts="50%")
    try:
        answered(assembly, PROMPT)
        layers = assembly.metrics.layers
        for layer in range(1, LAYERS):
            assert layers["decode", layer].misses == 0
            assert layers["decode", layer].hits > 0
    finally:
        assembly.close()


def test_an_expert_that_must_be_better_is_read_anew() -> None:
    """First everything in int2, then as it is: nothing that is there is good enough."""
    assembly = opened(lambda given: approximate.d2moe(given, capacities=(0, 0, 1)), experts="100%")
    try:
        answered(assembly, PROMPT)
        precision, ready = assembly.cache.precision, assembly.cache.ready
        assert (precision[ready] == 3).all()
        (low,) = answered(assembly, PROMPT)
        assert low.usage is not None
        assert low.usage.degraded_share == pytest.approx(1)
        assembly.host.changes.active = False
        before = assembly.mover.bytes_read
        (request,) = answered(assembly, PROMPT)
        used = assembly.cache.last_used == assembly.cache.step
        assert (precision[used] == 0).all()
        assert assembly.mover.bytes_read > before
    finally:
        assembly.close()
    clean = opened(None)
    assert answered(clean, PROMPT)[0].token_ids == request.token_ids
    clean.close()


def test_lower_precisions_read_less() -> None:
    read = {}
    for name, capacities in (("int2", (0, 0, 1)), ("int8", (1, 0, 0)), ("as-is", (0, 0, 0))):
        assembly = opened(lambda given, c=capacities: approximate.d2moe(given, capacities=c))
        answered(assembly, PROMPT)
        read[name] = assembly.mover.bytes_read / assembly.cache.reads.started
        assembly.close()
    assert read["int2"] < 0.2 * read["as-is"]
    assert 0.5 * read["as-is"] < read["int8"] < 0.6 * read["as-is"]


def test_the_store_is_made_once(caplog: pytest.LogCaptureFixture) -> None:
    for folder in (cache_folder() / "nested").glob("*"):
        for file in folder.iterdir():
            file.unlink()
    for times in (1, 1):
        opened(ROWS["hobbit"].build, check=True).close()  # which reads experts as they are
        said = [record for record in caplog.records if "deriving the experts" in record.message]
        assert len(said) == times


@pytest.mark.parametrize("name", ["hobbit", "daop", "mc-moe-odp"])
def test_evaluated_by_decoding(name: str) -> None:
    texts = [TaskIds("a", PROMPT, 20), TaskIds("b", PROMPT[::-1], 20)]
    assembly = opened(ROWS[name].build)
    try:
        result = evaluate(assembly, texts, lambda: None)
        assembly.engine.idle()
        assert list(result.tasks) == ["a", "b"]
        assert [score.tokens for score in result.tasks.values()] == [20, 20]
        assert 0 < result.degraded_share < 1
        assert result.total.nll != result.total.nll_plain
        assert len(result.cost.degraded_by_layer) == LAYERS
        assert result.misses > 0
        assert result.fetched > 0
        assert result.bytes_read > 0
    finally:
        assembly.close()
    wanted = opened(None)
    own = evaluate(wanted, texts, lambda: None)
    wanted.close()
    assert result.total.nll_plain == pytest.approx(own.total.nll, rel=0.01)


def test_evaluating_what_changes_nothing() -> None:
    texts = [TaskIds("a", PROMPT, 30)]
    assembly = opened(HARMLESS["adapmoe"])
    result = evaluate(assembly, texts, lambda: None)
    assembly.close()
    assert result.total.agreement == 1
    assert result.total.nll == result.total.nll_plain
    assert result.degraded_share == 0
    assert np.isfinite(result.total.nll)
