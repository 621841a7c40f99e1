"""Approximate policies at work: who is left out, who serves instead, and what is counted of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from retinue import LLM
from retinue.policy.base import BoolArray, Choice, Prompt, Route, View
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.policy.preset import Preset
from retinue.policy.presets import PRESETS
from retinue.types import Demand, FloatArray

PROMPT = models.prompt_of(12)
Open = Callable[..., LLM]


class LeaveLast:
    """Leaves out each token's lightest expert, but only where more than one is chosen."""

    exact = False
    needs: frozenset[str] = frozenset({"scores", "hidden", "token_ids"})

    def __init__(self, *, renormalises: bool) -> None:
        self.renormalises = renormalises
        self.routes: list[Route] = []

    def keep(self, route: Route, view: View) -> BoolArray:
        self.routes.append(route)
        assert view.layer == route.layer
        keep = np.ones(route.experts.shape, dtype=bool)
        np.put_along_axis(keep, route.weights.argmin(axis=1)[:, None], False, axis=1)
        return keep


class OnlyResidents:
    """Ranks residents first, as far as there are any; the others are read."""

    exact, restricts = False, False
    needs: frozenset[str] = frozenset({"hidden"})

    def __init__(self) -> None:
        self.choices: list[tuple[Choice, np.ndarray]] = []

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray:
        self.choices.append((choice, resident.copy()))
        return np.asarray(choice.scores + 100 * resident, dtype=np.float32)


class Watching:
    """Notes what a watcher is told."""

    needs: frozenset[str] = frozenset({"embedding"})

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.ended: list[int] = []
        self.routes: list[Route] = []

    def begin(self, prompt: Prompt) -> None:
        self.prompts.append(prompt)

    def observe(self, demand: Demand, view: View) -> None:
        assert view.route is not None
        self.routes.append(view.route)

    def end(self, sequence: int) -> None:
        self.ended.append(sequence)


@pytest.fixture
def opened(olmoe: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens the model with policies of a test's own."""

    def open_with(share: str = "50%", **parts: Any) -> LLM:
        policies = Policies(Recency(), NoPredictor(), FetchAll(), **parts)
        row = Preset("tried", policies.exact, "", (), "", lambda given: policies)
        monkeypatch.setitem(PRESETS, "tried", row)
        return models.open_llm(olmoe, preset="tried", experts=share)

    return open_with


@pytest.mark.parametrize("renormalises", [False, True])
def test_who_is_left_out_has_no_part_in_the_sum(opened: Open, renormalises: bool) -> None:
    thinning = LeaveLast(renormalises=renormalises)
    with opened(thinning=thinning) as llm:
        host = llm.assembly.host
        random = torch.Generator().manual_seed(0)
        hidden = torch.randn(3, 64, generator=random)
        index, weights = torch.tensor([[1, 5], [2, 0], [7, 1]]), torch.rand(3, 2, generator=random)
        with torch.inference_mode():
            host.begin_pass("decode", [2, 1], [8, 9], [40, 41, 42])
            thinned = host.run(1, hidden, index, weights)
            degraded = host.metrics.now.degraded_share
            usages = host.changes.accounts.usages
            host.changes.active = False
            host.begin_pass("decode", [3])
            least = weights.argmin(dim=1, keepdim=True)
            left = weights.scatter(1, least, 0.0)
            if renormalises:
                left = left * (weights.sum(dim=1) / left.sum(dim=1))[:, None]
            plain = host.run(1, hidden, index.scatter(1, least, 8), left)
        torch.testing.assert_close(thinned, plain)
        (route,) = thinning.routes
        assert route.sequences.tolist() == [8, 8, 9]
        assert route.token_ids is not None
        assert route.token_ids.tolist() == [40, 41, 42]
        assert route.scores is not None
        assert route.scores.sum(axis=1) == pytest.approx(np.ones(3), abs=1e-5)
        assert route.hidden is not None
        assert route.hidden == pytest.approx(hidden.numpy())
        lost = weights.min(dim=1).values
        assert degraded == pytest.approx(float(lost.sum() / weights.sum()))
        assert [float(usage.degraded[1]) for usage in usages] == pytest.approx(
            [float(lost[:2].sum()), float(lost[2])]
        )


def test_answers_say_what_was_left_out(opened: Open) -> None:
    with opened(thinning=LeaveLast(renormalises=True)) as llm:
        output = llm.generate([PROMPT], models.greedy(5), progress=False)[0]
        assert 0 < output.stats.degraded_share < 0.5
        counters = llm.assembly.metrics.total.decode
        # One expert a layer and token is left.
        assert counters.hits + counters.pending + counters.misses == 4 * models.LAYERS


def test_a_policy_that_does_not_restrict_sees_who_is_there(opened: Open) -> None:
    routing = OnlyResidents()
    with opened(routing=routing) as llm:
        output = llm.generate([PROMPT], models.greedy(6), progress=False)[0]
        assert output.stats.degraded_share > 0
        assert {choice.phase for choice, _ in routing.choices} == {"prefill", "decode"}
        choice, resident = routing.choices[-1]
        assert choice.hidden is not None
        assert choice.hidden.shape == (1, 64)
        assert models.TOP_K <= resident.sum() <= models.EXPERTS
        before = llm.assembly.metrics.total.decode.misses
        llm.generate([PROMPT], models.greedy(6), progress=False)
        assert llm.assembly.metrics.total.decode.misses == before, "all were served by residents"


def test_what_is_not_there_is_read(opened: Open) -> None:
    class Others(OnlyResidents):
        def rank(self, choice: Choice, resident: BoolArray) -> FloatArray:
            return np.asarray(choice.scores - 100 * resident, dtype=np.float32)

    with opened("25%", routing=Others()) as llm:
        llm.generate([PROMPT], models.greedy(4), progress=False)
        counters = llm.assembly.metrics.total.decode
        assert counters.misses > 0
        assert counters.hits == 0 or counters.misses > counters.hits
        llm.assembly.engine.idle()


def test_watchers_know_whose_token_it_is(opened: Open) -> None:
    watcher = Watching()
    with opened(watchers=(watcher,)) as llm:
        plain = llm.generate([PROMPT, PROMPT[:5]], models.greedy(3), progress=False, task="sql")
        first, second = watcher.prompts
        assert (first.task, first.token_ids.tolist()) == ("sql", PROMPT)
        assert first.embedding is not None
        table = llm.assembly.network.model.get_input_embeddings().weight
        mean = table[torch.tensor(PROMPT)].detach().float().mean(dim=0)
        assert first.embedding == pytest.approx(mean.numpy(), abs=1e-6)
        assert sorted(watcher.ended) == sorted([first.sequence, second.sequence])
        whose = np.concatenate([route.sequences for route in watcher.routes])
        tokens = [len(PROMPT) + 2, 5 + 2]
        for prompt, count in zip(watcher.prompts, tokens, strict=True):
            assert np.count_nonzero(whose == prompt.sequence) == count * models.LAYERS
        assert plain[0].stats.degraded_share == 0


def test_watchers_see_layers_that_hold_everything(opened: Open) -> None:
    watcher = Watching()
    with opened("100%", watchers=(watcher,)) as llm:
        llm.generate([PROMPT], models.greedy(3), progress=False)
        watcher.routes.clear()
        llm.generate([PROMPT], models.greedy(3), progress=False)
        assert len(watcher.routes) == 3 * models.LAYERS
