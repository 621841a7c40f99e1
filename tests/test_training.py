"""Training of predictors: what can be learnt is learnt, and scored on what was not seen."""

import itertools

import numpy as np
import pytest
import torch

from retinue.errors import UsageError
from retinue.policy.predict.forecasters import forecaster
from retinue.policy.predict.network import Network, shapes
from retinue.policy.predict.shares import shares_of
from retinue.trace import Routed, TraceHead
from retinue.train.fit import fit
from retinue.train.network import fresh, logits
from retinue.train.predictors import train
from retinue.train.scores import score, score_shares
from retinue.train.texts import (
    Counted,
    RoutedText,
    divide,
    from_trace,
    in_blocks,
    mixed,
)

LAYERS, EXPERTS = 3, 4
ROWS = np.array([1, 2])  # layer 0 is dense


def text(task: str, first: int, second: int) -> RoutedText:
    """All weight of a text on one expert a layer."""
    part = np.zeros((LAYERS, EXPERTS), np.float32)
    part[1, first] = part[2, second] = 8
    return RoutedText(task, part, part)


def alike(count: int = 24) -> list[RoutedText]:
    """Of each task, some texts all of whose experts are 0 and 1, in turn with 2 and 3."""
    return [
        text(task, *((0, 1) if at // 2 % 2 else (2, 3)))
        for at in range(count)
        for task in ("a", "b")
    ]


@pytest.mark.parametrize("layerwise", [False, True])
def test_numpy_computes_what_torch_trains(layerwise: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    arrays = fresh(5, 8, 2, generator)
    assert {name: tuple(array.shape) for name, array in arrays.items()} == shapes(5, 8, 2, 32, 1)
    with torch.no_grad():
        arrays["say"] += torch.randn(arrays["say"].shape, generator=generator)
    seen, prior = (torch.rand(6, 5, 8, generator=generator) for _ in range(2))
    seen, prior = seen / seen.sum(-1, keepdim=True), prior / prior.sum(-1, keepdim=True)
    task = torch.tensor([0, 1, 2, 0, 1, 2])
    wanted = logits(arrays, seen, prior, task, layerwise=layerwise).softmax(-1).detach().numpy()
    made = Network({name: array.detach().numpy() for name, array in arrays.items()}, layerwise)
    for at in range(6):
        found = made.shares(seen[at].numpy(), prior[at].numpy(), int(task[at]))
        assert found == pytest.approx(wanted[at], abs=1e-6)


def test_a_layer_sees_only_those_before_it() -> None:
    arrays = fresh(4, 8, 1, torch.Generator().manual_seed(1))
    with torch.no_grad():
        arrays["say"] += 1 - torch.rand(arrays["say"].shape, generator=torch.Generator())
    made = Network({name: array.detach().numpy() for name, array in arrays.items()}, True)
    prior = np.full((4, 8), 1 / 8)
    before = made.shares(np.eye(8)[:4], prior, 0)
    after = made.shares(np.eye(8)[[0, 1, 7, 3]], prior, 0)
    assert (before[:3] == after[:3]).all()
    assert np.abs(before[3] - after[3]).max() > 1e-3


def test_an_untrained_network_says_what_the_profile_says() -> None:
    arrays = fresh(2, 4, 1, torch.Generator().manual_seed(0))
    made = Network({name: array.detach().numpy() for name, array in arrays.items()}, False)
    prior = np.array([[0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]])
    assert made.shares(np.eye(4)[:2], prior, 0) == pytest.approx(prior, abs=2e-3)


def test_what_the_last_prompt_tells_is_learnt() -> None:
    """Of texts of two kinds the mean is always wrong, and the last text tells the kind."""
    texts = alike()
    kinds = {kind: [t for t in texts if t.prompt[1, kind]] for kind in (0, 2)}
    named = [RoutedText(str(kind), t.prompt, t.answer) for kind, own in kinds.items() for t in own]
    made = fit(named, ROWS, ["0", "2"], layerwise=False, epochs=20, seed=1)
    unknown, prior = 2, Counted(texts).shares(None)[ROWS]
    for kind in (0, 2):
        seen = shares_of(kinds[kind][0].prompt)[ROWS]
        found = made.shares(seen, prior, unknown)
        assert (found * seen).sum(axis=1).min() > (prior * seen).sum(axis=1).max() + 0.1


def test_the_same_seed_learns_the_same() -> None:
    def learn(seed: int, layerwise: bool = True) -> Network:
        return fit(alike(4), ROWS, ["a", "b"], layerwise=layerwise, epochs=2, seed=seed)

    one, same, other = learn(7), learn(7), learn(8)
    assert all((one.arrays[name] == same.arrays[name]).all() for name in one.arrays)
    assert any((one.arrays[name] != other.arrays[name]).any() for name in one.arrays)


def test_scores_by_hand() -> None:
    used = np.array([[[0.5, 0.3, 0.2, 0.0]], [[0.25, 0.25, 0.25, 0.25]]])
    said = np.array([[[0.6, 0.1, 0.3, 0.0]], [[0.9, 0.1, 0.0, 0.0]]])
    found = score_shares(said, used)
    # named: {0, 2} and {0}; used with an equal share at least: {0, 1} and all four
    assert found.precision.tolist() == pytest.approx([2 / 3])
    assert found.recall.tolist() == pytest.approx([2 / 6])
    assert found.f1.tolist() == pytest.approx([4 / 9])
    # 1, 2, 2 and 3 of 4 experts
    assert found.covered == pytest.approx((0.375, 0.6, 0.6, 0.875))


def test_a_forecaster_is_asked_before_it_is_told() -> None:
    stream = [text("a", 0, 1), text("a", 2, 3), text("a", 2, 3)]
    found = score(forecaster("previous-prompt", Counted([text("a", 1, 0)]), None), stream, ROWS)
    # Asked first, it knows nothing of the first text, is wrong of the second, right of the third.
    assert found.covered[0] == pytest.approx(1 / 3)
    own = score(forecaster("own-prefill", Counted([text("a", 1, 0)]), None), stream, ROWS)
    assert own.covered[0] == 1


def test_held_out_texts_are_not_learnt() -> None:
    texts = alike(10)
    learn, held = divide(texts, 3)
    assert (len(learn), len(held)) == (16, 4)
    assert {id(t) for t in learn} | {id(t) for t in held} == {id(t) for t in texts}
    assert [t.task for t in held].count("a") == 2
    assert [id(t) for t in divide(texts, 3)[1]] == [id(t) for t in held]
    assert [id(t) for t in divide(texts, 4)[1]] != [id(t) for t in held]
    with pytest.raises(UsageError, match="too few texts of `a`"):
        divide(alike(2), 3)


def test_streams_hold_every_text_once() -> None:
    texts = alike(20)
    order = mixed(texts, 1)
    assert {id(t) for t in order} == {id(t) for t in texts}
    assert len(order) == len(texts)
    changes = sum(a.task != b.task for a, b in itertools.pairwise(order))
    assert 10 < changes < 30
    assert [t.task for t in in_blocks(order)] == ["a"] * 20 + ["b"] * 20


def test_popularity_without_a_text() -> None:
    texts = [text("a", 0, 1), text("a", 2, 3), text("b", 1, 1)]
    counted = Counted(texts)
    assert counted.shares("a")[1].tolist() == [0.5, 0, 0.5, 0]
    assert counted.shares("c").tolist() == counted.shares(None).tolist()
    assert counted.without(texts[0], "a")[1].tolist() == [0, 0, 1, 0]
    assert counted.without(texts[0], None)[1].tolist() == [0, 0.5, 0.5, 0]
    # of the task's only text there is no rest: all others count
    assert counted.without(texts[2], "b")[1].tolist() == [0.5, 0, 0.5, 0]


def test_requests_of_a_trace_with_both_parts_are_texts() -> None:
    head = TraceHead("by-hand", LAYERS, EXPERTS, 1, (1, 2), "histogram")
    sums = np.arange(16, dtype=np.float32).reshape(2, 2, EXPERTS)
    requests = [Routed("a", 3, 0, sums), Routed(None, 3, 2, sums), Routed("b", 0, 2, sums)]
    (found,) = from_trace(head, requests)
    assert found.task is None
    assert found.prompt.tolist() == [[0] * 4, [0, 1, 2, 3], [4, 5, 6, 7]]
    assert found.answer.tolist() == [[0] * 4, [8, 9, 10, 11], [12, 13, 14, 15]]


def test_training_scores_what_it_did_not_see() -> None:
    shape = (LAYERS, EXPERTS)
    random = np.random.default_rng(0)
    texts = [
        RoutedText(task, *random.random((2, *shape)).astype(np.float32))
        for task in ("a", "b", None)
        for _ in range(6)
    ]
    head = TraceHead("by-hand", LAYERS, EXPERTS, 1, (0, 2))
    ticks: list[int] = []
    made = train(head, texts, ["emoe-l"], epochs=2, seed=0, advance=lambda: ticks.append(1))
    assert (len(ticks), made.held_out, made.learned.texts) == (4, 3, 18)
    assert made.learned.rows.tolist() == [0, 2]
    assert made.learned.tasks == ("a", "b")
    assert list(made.learned.networks) == ["emoe-l"]
    for scores in made.scores.values():
        assert set(scores) == {
            *("popularity", "running-mean", "previous-prompt", "own-prefill", "emoe-l")
        }
    assert set(made.learned.held_out) == set(made.scores["mixed"])
