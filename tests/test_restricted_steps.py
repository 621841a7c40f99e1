"""Prepared decoding steps with policies between routers and experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue.policy import presets
from retinue.policy.base import BoolArray, Choice
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.preset import Preset
from retinue.policy.route.cache_prior import CachePrior
from retinue.policy.thin.missing_tail import MissingTail
from retinue.types import FloatArray
from test_steps import FAMILIES, NEW_TOKENS, PROMPTS, counted, needs_library, small, tokens_of

pytestmark = needs_library


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("above", [1.0, 0.3])
def test_restricted_tokens_and_counts_equal_the_networks(
    family: str, above: float, tmp_path: Path
) -> None:
    """Alone and together; some experts are replaced, and some fetched."""
    folder, found = small(tmp_path, family), []
    settings: dict[str, Any] = {"preset": "random", "experts": "50%", "fetch_above": above}
    for eager in (True, False):
        with (
            models.open_llm(folder, kv_tokens=512, context=128, eager=eager, **settings) as llm,
            counted() as steps,
        ):
            tokens = []
            for prompts in ([PROMPTS[0]], PROMPTS):
                outputs = llm.generate(prompts, models.greedy(NEW_TOKENS), progress=False)
                tokens.append([output.token_ids for output in outputs])
            llm.assembly.cache.check()
            total = llm.assembly.metrics.total.decode
            counts = total.hits, total.missed, total.rerouted, total.fetched, total.fetched_bytes
            found.append((tokens, counts, llm.assembly.host.changes.books.there().tolist()))
        assert {1, 3} <= set(steps) or eager
        assert bool(steps) is not eager
    assert found[0] == found[1]
    assert total.rerouted > 0
    assert (total.fetched > 0) is (above < 1)


@pytest.mark.parametrize("way", ["everything is there", "everything is fetched"])
def test_where_nothing_is_replaced_no_bit_differs(way: str, tmp_path: Path) -> None:
    """From the same steps without a policy, in bfloat16, alone and together."""
    folder = small(tmp_path, "olmoe", torch.bfloat16)
    forced = [models.prompt_of(10, seed=40 + n) for n in range(3)]
    share, above = ("100%", 1.0) if way == "everything is there" else ("50%", 0.0)
    logits = []
    for settings in ({}, {"preset": "random", "experts": share, "fetch_above": above}):
        with models.open_llm(folder, kv_tokens=512, **settings) as llm, counted() as steps:
            alone = models.run_logits(llm, PROMPTS[0], forced[0])
            together = models.run_logits_together(llm, PROMPTS, forced)
            logits.append(torch.cat([alone, *together]))
        assert {1, 3} <= set(steps)
    assert torch.equal(*logits)


def test_a_token_that_keeps_its_experts_keeps_its_bits_beside_one_that_does_not(
    tmp_path: Path,
) -> None:
    """What is done again for one row of a step gives the other rows what they had."""
    folder = small(tmp_path, "olmoe", torch.bfloat16)
    forced = [models.prompt_of(10, seed=40 + n) for n in range(2)]
    found = []
    for replaced in (False, True):
        with models.open_llm(folder, kv_tokens=512, preset="random", experts="100%") as llm:
            restriction = llm.assembly.host.changes.restriction
            assert restriction is not None
            restriction._routing = _OthersForTheSecond(replaced)
            found.append(models.run_logits_together(llm, PROMPTS[:2], forced))
    (first, second), (kept, changed) = found
    assert torch.equal(first, kept)
    assert not torch.equal(second, changed)


class _OthersForTheSecond:
    """In steps of two tokens, the least wanted experts serve the second one."""

    exact, restricts = False, True
    needs: frozenset[str] = frozenset()

    def __init__(self, replaced: bool) -> None:
        self._replaced = replaced

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        if not self._replaced or len(choice.scores) != 2:
            return None
        return np.stack([choice.scores[0], -choice.scores[1]])


class _ByHidden:
    """Chooses by a fixed projection of the router's input, and leans towards what is there."""

    exact, restricts, needs = False, False, frozenset({"hidden"})

    def __init__(self) -> None:
        self.kept: list[FloatArray] = []

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        assert choice.hidden is not None
        self.kept.append(choice.hidden)
        width, experts = choice.hidden.shape[1], choice.scores.shape[1]
        drawn = np.random.default_rng(choice.layer).random((width, experts), dtype=np.float32)
        return choice.scores + 0.1 * choice.hidden @ drawn + 0.05 * resident


@pytest.mark.parametrize(
    "policies",
    [
        lambda: Policies(Recency(), NoPredictor(), FetchAll(), _ByHidden()),
        lambda: Policies(Recency(), NoPredictor(), FetchAll(), CachePrior(weight=3.0)),
        lambda: Policies(Recency(), NoPredictor(), FetchAll(), thinning=MissingTail(0.5)),
        lambda: Policies(
            Recency(), NoPredictor(), FetchAll(), CachePrior(weight=3.0), thinning=MissingTail(0.5)
        ),
    ],
    ids=["by hidden states", "leaning", "thinned", "both"],
)
def test_what_replaces_or_leaves_out_experts_does_it_in_prepared_steps(
    policies: Callable[[], Policies], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, found, degraded = small(tmp_path, "qwen3_moe"), [], list[float]()
    row = Preset("here", False, "", (), "", lambda given: policies())
    monkeypatch.setitem(presets.PRESETS, "here", row)
    plain = tokens_of(folder, PROMPTS)
    for eager in (True, False):
        with (
            models.open_llm(
                folder, kv_tokens=512, context=128, eager=eager, preset="here", experts="50%"
            ) as llm,
            counted() as steps,
        ):
            outputs = llm.generate(PROMPTS, models.greedy(NEW_TOKENS), progress=False)
            total = llm.assembly.metrics.total.decode
            counts = total.hits, total.misses, total.rerouted
            found.append(([output.token_ids for output in outputs], counts))
            degraded.append(total.degraded_weight)
        assert bool(steps) is not eager
    assert found[0] == found[1]
    assert found[0][0] != plain
    assert degraded[0] == pytest.approx(degraded[1], rel=1e-4)
    assert degraded[0] > 0


def test_what_a_policy_is_shown_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routing = _ByHidden()
    row = Preset(
        "here",
        False,
        "",
        (),
        "",
        lambda given: Policies(Recency(), NoPredictor(), FetchAll(), routing),
    )
    monkeypatch.setitem(presets.PRESETS, "here", row)
    with models.open_llm(small(tmp_path, "olmoe"), preset="here", experts="50%") as llm:
        models.run_logits(llm, PROMPTS[0], models.prompt_of(6, seed=5))
    steps = [hidden for hidden in routing.kept if len(hidden) == 1]
    assert len(steps) == 5 * models.LAYERS
    assert len({hidden.tobytes() for hidden in steps}) == len(steps)


def test_the_plain_model_runs_in_the_same_steps_while_the_set_is_away(tmp_path: Path) -> None:
    folder = small(tmp_path, "qwen3_moe")
    wanted = tokens_of(folder, PROMPTS[:1], eager=True)[0]
    with models.open_llm(folder, context=128, preset="random", experts="50%") as llm:
        residents = llm.assembly.residents
        assert residents is not None
        with counted() as steps, residents.away():
            residents_begin, llm.assembly.host.begin = llm.assembly.host.begin, lambda running: 0
            output = llm.generate(PROMPTS[0], models.greedy(NEW_TOKENS), progress=False)[0]
            llm.assembly.host.begin = residents_begin
    assert output.token_ids == wanted
    assert len(steps) == NEW_TOKENS - 1
