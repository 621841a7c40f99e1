"""A faster replay is the same replay: recorded figures, and the ways of many tokens beside one's.

Where one token decodes, each call of numpy counts, so policies have a short way for it.
"""

import numpy as np
import pytest

from recordings import EXPERTS, HEAD, LAYERS, READ_BYTES, TOP_K, chance, setting, trace_of
from retinue.memory.attendance import demand_of
from retinue.policy.base import Choice
from retinue.policy.preset import Given
from retinue.policy.presets import PRESETS
from retinue.policy.ranks import before, shares
from retinue.policy.window import Window
from retinue.sim.candidates import Known, candidates
from retinue.sim.cells import Table
from retinue.sim.changed import Rows, choice_of, reroute
from retinue.sim.recorded import Recording

# Of decoding: hits, pending, misses, bytes; seconds of all; weight that was not served as chosen.
RECORDED = {
    "auto": (334, 4, 40, 51000, 0.13840000000000074, 0.0),
    "on-demand": (341, 0, 37, 37000, 0.12651000000000087, 0.0),
    "layer-stream": (230, 45, 103, 471000, 0.5271699999999989, 0.0),
    "mixtral-offloading": (344, 4, 30, 42000, 0.12700000000000078, 0.0),
    "se-moe": (228, 47, 103, 461000, 0.5194033333333318, 0.0),
    "freetoken": (341, 0, 37, 37000, 0.13147000000000095, 0.0),
    "hybrimoe": (319, 19, 40, 70000, 0.15476000000000065, 0.0),
    "belady": (359, 0, 19, 19000, 0.10971000000000078, 0.0),
    "random": (225, 0, 153, 0, 0.08619000000000042, 54.65773811750114),
    "hobbit": (329, 4, 23, 26182, 0.10586800000000074, 9.414714809739962),
    "d2moe": (341, 0, 37, 13893, 0.09030900000000056, 189.00309193041176),
    "cache-prior": (362, 0, 16, 16000, 0.10611000000000075, 8.500540698878467),
    "daop": (331, 14, 33, 53000, 0.13426000000000063, 0.9575185775756836),
    "swapmoe": (362, 0, 16, 20000, 0.107210000000001, 57.473161285044625),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[float, ...]]:
    signals = ("scores", "next_scores")
    requests = [chance(1, 40, prompt=6), chance(2, 30)]
    trace = trace_of(tmp_path_factory.mktemp("same") / "a.trace", requests, signals)
    given = Given(HEAD.model, LAYERS, EXPERTS, TOP_K, HEAD.routed)
    able, _ = candidates(PRESETS.values(), trace.head, lambda *_: Known(given), timed=False)
    table = Table(Recording(trace, signals), able, READ_BYTES)
    found = {}
    for each in able:
        outcome = table.replay(each, setting(9))
        decode = outcome.decode
        counts = decode.hits, decode.pending, decode.misses, decode.bytes_read
        found[each.preset.name] = (*counts, outcome.seconds, decode.degraded_weight)
    return found


@pytest.mark.parametrize("name", RECORDED)
def test_a_replay_is_what_it_was(outcomes: dict[str, tuple[float, ...]], name: str) -> None:
    found, wanted = outcomes[name], RECORDED[name]
    assert found[:4] == wanted[:4]
    assert found[4:] == pytest.approx(wanted[4:], rel=1e-9)


def rows_by_chance(tokens: int) -> tuple[Rows, np.ndarray]:
    """Some of them have fewer experts than others: id 8 means none."""
    random = np.random.default_rng(tokens)
    scores = random.random((tokens, 8)).astype(np.float16).astype(np.float32)
    experts = np.argsort(-scores, axis=1, kind="stable")[:, :3]
    experts[random.random(experts.shape) < 0.2] = 8
    weights = random.random((tokens, 3)).astype(np.float32)
    return Rows(experts, np.where(experts < 8, weights, 0).astype(np.float32)), scores


def test_one_token_ranks_as_among_many() -> None:
    rows, _ = rows_by_chance(50)
    part = shares(*rows, 8)
    assert (part[rows.experts == 8] == 0).all()
    above = before(part)
    for token in range(50):
        one = Rows(rows.experts[token : token + 1], rows.weights[token : token + 1])
        assert np.array_equal(shares(*one, 8)[0], part[token])
        assert np.array_equal(before(shares(*one, 8))[0], above[token])
    nothing = shares(np.array([[8, 8]]), np.ones((1, 2), np.float32), 8)
    assert nothing.tolist() == [[0, 0]]


def test_one_token_demands_as_among_many() -> None:
    rows, _ = rows_by_chance(50)
    for experts, weights in zip(*rows, strict=True):
        found = demand_of(2, experts[None], weights[None], 8)
        there = np.argsort(experts)[: np.count_nonzero(experts < 8)]
        assert found.experts.tolist() == experts[there].tolist()
        assert found.weight.tolist() == weights[there].tolist()
        assert found.tokens.tolist() == [1] * len(there)


class Backwards:
    """Ranks by number."""

    exact = False
    restricts = False
    needs = frozenset[str]()

    def rank(self, choice: Choice, resident: np.ndarray) -> np.ndarray:
        return np.tile(np.arange(8, dtype=np.float32), (len(choice.experts), 1))


def test_one_token_is_rerouted_as_among_many() -> None:
    rows, scores = rows_by_chance(50)
    there = np.ones(scores.shape, dtype=bool)

    def served(part: slice) -> tuple[np.ndarray, ...]:
        choice = choice_of(0, Rows(rows.experts[part], rows.weights[part]), scores[part], "decode")
        found = reroute(Backwards(), choice, there[part])  # type: ignore[arg-type]
        return (choice.scores, *found.rows, found.degraded)

    many = served(slice(0, 50))
    for token in range(50):
        one = served(slice(token, token + 1))
        assert np.array_equal(one[1][0], many[1][token])
        assert one[3][0] == pytest.approx(many[3][token])
        assert np.array_equal(one[0][0], many[0][token])


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_quantiles_of_the_last_numbers(count: int) -> None:
    numbers = np.random.default_rng(count).integers(0, 9, count) / 8
    window = Window(7)
    window.extend(numbers.tolist())
    last = numbers[-7:]
    assert len(window) == len(last)
    for place in (0.0, 0.3, 0.5, 0.9, 1.0):
        low, high, between = window.between(place)
        wanted = np.quantile(last, place)
        assert low + between * (high - low) == pytest.approx(wanted)
