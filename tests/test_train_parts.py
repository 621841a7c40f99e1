"""Training of learned parts: each rule by hand, and what can be learnt is learnt."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from retinue.errors import Refused
from retinue.policy.parts.kinds import KINDS, misfit
from retinue.policy.parts.paths import Context, fresh, paths
from retinue.policy.parts.perceptron import ahead, pre_gate, whole_path
from retinue.policy.predict.learned import Part
from retinue.train import adapmoe, edgemoe, hobbit, stores
from retinue.train.measures import MOST_TOKENS, TEXTS, Measures, some
from retinue.train.parts import KINDS_MADE, Task, baseline, ticks, train_parts
from retinue.train.worth import judged, top
from retinue.types import FloatArray, IntArray
from worlds import EXPERTS, HEAD, HIDDEN, ROWS, TOP_K, WORDS, World, choosing

CHANCE = TOP_K / EXPERTS
FORECASTS = ("promoe", "expertflow", "moe-infinity", "fmoe", "pre-gated", "read-me", "edgemoe")


class Whole:
    """A model whose loss grows with the importance of what is in few bits."""

    def __init__(self, importances: FloatArray) -> None:
        self.importances = importances
        self.asked = 0

    def loss(self, texts: Sequence[Sequence[int]], bits: IntArray | None = None) -> float:
        self.asked += 1
        if bits is None:
            return 2.0
        return 2.0 + float((self.importances * (bits == 2)).sum() + (bits < 2).sum())

    def squared_gradients(self, texts: Sequence[Sequence[int]]) -> FloatArray:
        return np.arange(ROWS, 0, -1, dtype=np.float32)

    def distances(self, texts: Sequence[Sequence[int]], bits: tuple[int, int]) -> FloatArray:
        assert bits == (4, 2)
        return self.importances / np.arange(ROWS, 0, -1, dtype=np.float32)[:, None]


def measures(world: World) -> Measures:
    importances = np.linspace(1e-4, 1e-2, ROWS * EXPERTS, dtype=np.float32)
    whole: Any = Whole(importances.reshape(ROWS, EXPERTS))
    return Measures(world.gates, whole)


def task(world: World, seed: int = 0, **changes: Any) -> Task:
    return Task(HEAD, WORDS, measures(world), seed, **changes)


@pytest.fixture(scope="module")
def made() -> dict[str, Part]:
    world = World()
    return train_parts(task(world, epochs=30), world.texts(), list(KINDS))


def test_every_kind_is_made(made: dict[str, Part]) -> None:
    assert KINDS_MADE.keys() == KINDS.keys() == made.keys()
    for kind, part in made.items():
        assert misfit(kind, part.arrays, ROWS, EXPERTS) is None
        assert part.worth


@pytest.mark.parametrize("kind", FORECASTS)
def test_what_can_be_learnt_is_learnt(kind: str, made: dict[str, Part]) -> None:
    worth = made[kind].worth
    assert set(worth) >= {"precision", "recall", "f1"}
    recall = [value for value in worth["recall"] if value]
    assert len(recall) == (ROWS - 1 if kind in ("promoe", "pre-gated") else ROWS)
    least = {"moe-infinity": 1.25, "fmoe": 1.6, "edgemoe": 1.5}.get(kind, 2.0)
    assert np.mean(recall) > least * CHANCE, recall


def test_tuning_improves_a_pre_gate(made: dict[str, Part]) -> None:
    world = World()
    found = baseline(task(world), world.texts())
    assert set(found) == {"popularity", "gate 1", "gate 2", "gate 3"}
    assert [sum(value == 0 for value in found[f"gate {n}"]) for n in (1, 2, 3)] == [1, 2, 3]
    assert np.mean(made["pre-gated"].worth["recall"]) > np.mean(found["gate 1"])


def test_the_same_seed_learns_the_same() -> None:
    world, kinds = World(), ["promoe", "expertflow", "read-me", "pre-gated", "fmoe", "hobbit"]

    def learn(seed: int) -> dict[str, Part]:
        return train_parts(task(world, seed, epochs=1), world.texts(8), kinds)

    one, same, other = learn(3), learn(3), learn(4)
    for kind in kinds:
        pairs = [(part[kind].arrays[name] for part in (one, same)) for name in one[kind].arrays]
        assert all((left == right).all() for left, right in pairs)
    assert (one["promoe"].arrays["read"] != other["promoe"].arrays["read"]).any()


def test_progress_is_said() -> None:
    world, seen = World(), list[int]()
    kinds = ["promoe", "hobbit"]
    train_parts(task(world, epochs=2, advance=lambda: seen.append(1)), world.texts(8), kinds)
    assert len(seen) == ticks(kinds, 2) == 2 * 3 + 2


# --- what numpy computes


def test_a_path_by_hand() -> None:
    arrays = {
        "embed": np.array([[1, 0], [0, 1], [2, 2]], np.float32),
        "decay": np.array([0.5], np.float32),
        "mix": np.array([[[1], [0]], [[10], [0]], [[0], [100]]], np.float32),
        "mix_bias": np.array([0.5], np.float32),
        "say": np.array([[[1, -1]], [[2, 0]]], np.float32),
        "say_bias": np.array([[0, 1], [0, 0]], np.float32),
    }
    said, context = paths(arrays, fresh(arrays), np.array([0, 1, 9]))
    # Own 1, 0, 2; before 0, 1, 0; mean's second 0, 0, 0.5 * 0 + 0.5 * 1; an unknown id is the last
    inner = np.array([1.5, 10.5, 2 + 50 + 0.5])
    assert said[:, 0].tolist() == [[x, 1 - x] for x in inner]
    assert said[:, 1].tolist() == [[2 * x, 0] for x in inner]
    assert context.last.tolist() == [2, 2]
    assert context.mean.tolist() == [0.125 + 1, 0.25 + 1]
    first, between = paths(arrays, fresh(arrays), np.array([0]))
    rest, after = paths(arrays, between, np.array([1, 9]))
    assert np.concatenate([first, rest]).tolist() == said.tolist()
    assert isinstance(after, Context)
    assert after.mean.tolist() == context.mean.tolist()


def test_perceptrons_by_hand() -> None:
    hidden = np.array([[1, -1]], np.float32)
    arrays = {
        "read": np.array([[[1, 0], [0, 1]], [[2, 0], [0, 2]]], np.float32),
        "read_bias": np.array([[0, 0], [0, 3]], np.float32),
        "say": np.array([[[1, 2, 3], [9, 9, 9]], [[1, 0, 0], [0, 1, 0]]], np.float32),
        "say_bias": np.array([[0, 0, 1], [5, 0, 0]], np.float32),
    }
    assert ahead(arrays, 0, hidden).tolist() == [[1, 2, 4]]
    assert ahead(arrays, 1, hidden).tolist() == [[7, 1, 0]]
    shared = {**arrays, "read": arrays["read"][0], "read_bias": arrays["read_bias"][0]}
    assert whole_path(shared, hidden).tolist() == [[[1, 2, 4], [6, 0, 0]]]
    gate = {"gate": arrays["say"], "bias": arrays["say_bias"]}
    assert pre_gate(gate, 1, hidden).tolist() == [[6, -1, 0]]


def test_judged_by_hand() -> None:
    scores = np.array([[[3, 1, 2, 1]], [[1, 1, 1, 1]]], np.float32)
    named = top(scores, 2)
    assert named.tolist() == [[[True, False, True, False]], [[True, True, False, False]]]
    needed = np.array([[[True, False, False, False]], [[False, True, True, True]]])
    found = judged(named, needed)
    assert found == {"precision": (0.5,), "recall": (0.5,), "f1": pytest.approx((0.5,))}


# --- MoE-Infinity and fMoE


def test_matrices_count_tokens() -> None:
    one = choosing([[0, 1], [2, 3]], [[0, 2], [2, 9]])
    found = stores.counts_of(one, 4)
    assert found[0].tolist() == [0.5, 0.25, 0.25, 0]
    assert found[1].tolist() == pytest.approx([0, 0, 2 / 3, 1 / 3])


def test_what_is_kept_stands_for_all() -> None:
    texts = [choosing([[e]], [[e]]) for e in (0, 0, 0, 1, 2)]
    kept = stores.moe_infinity(texts, 4, most=3)["matrices"][:, 0].argmax(axis=1)
    assert sorted(kept.tolist()) == [0, 1, 2]
    assert len(stores.moe_infinity(texts, 4)["matrices"]) == 5


@pytest.mark.parametrize("seed", range(4))
def test_a_full_store_gives_up_what_it_has_twice(seed: int) -> None:
    """Of three tokens of an answer two are alike; beside the prompt there is room for two."""
    one = World().text(1, "a", tokens=6)
    scores = np.zeros((6, ROWS, EXPERTS), np.float16)
    for token, expert in ((3, 1), (4, 1), (5, 2)):
        scores[token, :, expert] = 1
    found = stores.fmoe([replace(one, scores=scores)], seed, most=3)
    assert found["maps"][0] == pytest.approx(one.prompt_scores)
    assert sorted(found["maps"][1:, 0].argmax(axis=1).tolist()) == [1, 2]
    assert (found["embeddings"] == one.embedding).all()


def test_prompts_come_first_in_a_store() -> None:
    texts = World().texts(4)
    found = stores.fmoe(texts, 0)
    assert found["maps"].shape == (4 + 4 * 20, ROWS, EXPERTS)
    assert found["embeddings"].shape == (4 + 4 * 20, HIDDEN)
    prompts = {tuple(one.prompt_scores[0].tolist()) for one in texts}
    assert {tuple(row) for row in found["maps"][:4, 0].tolist()} == prompts
    # The same embedding finds the prompt, not a token of its answer.
    said = stores.nearest_map(found, texts[2], ROWS)
    assert said[0] == pytest.approx(texts[2].prompt_scores)


# --- AdapMoE


def test_the_tails_of_tokens() -> None:
    one = choosing([[0, 1, 2]], weights=0.5)
    assert adapmoe.tails_of([one]).tolist() == [[[pytest.approx(3 / 7), pytest.approx(1 / 7)]]]


def test_a_quarter_of_the_choices_goes() -> None:
    texts = World().texts()
    measured = np.array([8, 4, 2, 1], np.float32)
    found = adapmoe.adapmoe(texts, measured, np.full(ROWS, 0.8))
    sensitivity = found["sensitivity"]
    assert sensitivity / sensitivity[-1] == pytest.approx(measured)
    gone = adapmoe.dropped(adapmoe.tails_of(texts), sensitivity)
    assert gone.mean() == pytest.approx(0.25, abs=0.01)
    assert gone[0] < gone[-1]
    # r_l: of two experts one goes where the share of the second is below sqrt(T / S_l).
    tails = adapmoe.tails_of(texts)[..., 0]
    rule = (tails < np.sqrt(adapmoe.TOLERANCE / sensitivity)).mean(axis=0)
    assert found["single"] == pytest.approx(rule)
    assert found["accuracy"].tolist() == [0, 0.8, 0.8, 0.8]
    # A layer that gained by losing an expert is not insensitive without bound.
    odd = adapmoe.adapmoe(texts, np.array([1, -3, 0, 1], np.float32), np.full(ROWS, 0.8))
    assert odd["sensitivity"].min() > 0


# --- EdgeMoE


def test_keys_are_the_heaviest_of_two_rows_before() -> None:
    one = choosing([[5, 1], [6, 2], [7, 3]])
    assert edgemoe.keys_of(one).tolist() == [[[0, -1, -1], [1, -1, 5], [2, 5, 6]]]


def test_a_path_says_how_often_each_follows() -> None:
    texts = [choosing([[1], [2], [3]], [[1], [2], [3]], [[1], [2], [0]], [[4], [2], [6]])]
    made = edgemoe.dictionary(texts, 8, 1)
    at = made["keys"].tolist().index([2, 1, 2])
    assert made["ids"][at].tolist() == [3, 0]
    assert made["shares"][at].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert made["anywhere"][0].tolist() == [0, 0.75, 0, 0, 0.25, 0, 0, 0]
    named = edgemoe.dictionary_names(made, [choosing([[4], [2], [6]], [[5], [5], [5]])], 1)
    # The second token's paths are unknown: what is most used in the row.
    assert named.argmax(axis=-1).tolist() == [[1, 2, 6], [1, 2, 3]]


@pytest.mark.parametrize(
    ("share", "lowered"), [(1.0, 0.5), (0.1, None), (100.0, 0.0)], ids=["half", "all", "none"]
)
def test_the_least_important_get_fewer_bits(share: float, lowered: float | None) -> None:
    """`share` of all importance is as much as is tolerated; about what part of it is borne."""
    importances = np.linspace(1, 2, ROWS * EXPERTS, dtype=np.float32).reshape(ROWS, EXPERTS)
    importances *= share * 2 * np.log(1.02) / importances.sum()
    whole: Any = Whole(importances)
    bits = edgemoe.widths(whole, [[1, 2]], importances)
    if lowered is None:
        assert (bits == 2).all()
        return
    low = bits == 2
    assert (bits[~low] == 4).all()
    assert importances[low].sum() <= np.log(1.02)
    assert importances[low].sum() == pytest.approx(lowered * importances.sum(), rel=0.05, abs=0.1)
    if low.any():
        assert importances[low].max() < importances[~low].min()
    assert whole.asked < 12


def test_importance_is_the_gradient_times_the_distance() -> None:
    importances = np.ones((ROWS, EXPERTS), np.float32)
    whole: Any = Whole(importances)
    assert edgemoe.importance(whole, []) == pytest.approx(importances)


# --- HOBBIT


def test_all_weights_are_tried_in_quarters() -> None:
    tried = hobbit.combinations()
    assert tried.shape == (35, 4)
    assert len(np.unique(tried, axis=0)) == 35
    assert (tried.sum(axis=1) == 1).all()
    assert tried[:2].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_a_replay_by_hand() -> None:
    """One row of 8 experts, room for 2: recency loses what use keeps."""
    stream = [0, 0, 0, 1, 2, 0]
    texts = [choosing(*[[[expert]] for expert in stream])]
    tried = hobbit.combinations()[:2]
    # By recency 0, 1, 2 and again 0 are read; by use 1 leaves for 2, and 0 stays.
    assert (hobbit.penalties(texts, 8, tried) * len(stream)).tolist() == pytest.approx([4, 3])


def test_lower_precision_costs_a_quarter_and_the_tail_nothing() -> None:
    # Shares 0.68, 0.27 and 0.05, with 0, 0.68 and 0.95 before them: high, low, skipped.
    one = choosing([[0, 1, 2]])
    texts = [replace(one, weights=np.array([[[0.68, 0.27, 0.05]]], np.float32))]
    assert hobbit.penalties(texts, 8, hobbit.combinations()[:1]).tolist() == [1.25]
    # What came in low precision and is needed in high is missing.
    again = choosing([[1, 0, 2]], weights=0.3)
    both = hobbit.penalties([*texts, again], 8, hobbit.combinations()[:1])
    assert both.tolist() == [pytest.approx((1.25 + 1) / 2)]


def test_the_weights_that_cost_least_are_kept(made: dict[str, Part]) -> None:
    worth, texts = made["hobbit"].worth, World().texts()
    chosen = hobbit.hobbit(texts, EXPERTS)["weights"][None]
    costs = hobbit.penalties(texts, EXPERTS, hobbit.combinations())
    assert hobbit.penalties(texts, EXPERTS, chosen)[0] == costs.min()
    assert set(worth) == {"penalty", "by recency", "by use"}


# --- what is tried on the model


def test_a_few_texts_from_all_over() -> None:
    texts = [choosing(*[[[at % 4]]] * 3) for at in range(50)]
    assert len(some(texts)) == TEXTS
    assert len(some(texts[:3])) == 3
    assert len(some([choosing(*[[[0]]] * (MOST_TOKENS + 9))])[0]) == MOST_TOKENS


def test_without_the_model_nothing_is_tried() -> None:
    nothing = Measures(hint="run it")
    for ask in (nothing.sensitivity, nothing.bits):
        with pytest.raises(Refused, match="whole model in fp32") as caught:
            ask([])
        assert caught.value.hint == "run it"
    tried = np.ones(ROWS, np.float32)
    assert Measures(without_last=tried).sensitivity([]) is tried
