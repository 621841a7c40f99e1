"""Coming layers' routers, asked early: what is made of their answers."""

import numpy as np
import pytest

from disk import ids
from retinue.policy.base import SIGNALS, Ahead
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import Policies
from retinue.policy.predict.drift import ALWAYS, EVERY, Drift
from retinue.policy.predict.proven import Proven
from retinue.policy.predict.stacked_gates import StackedGates
from retinue.types import Demand, FloatArray
from test_attendance import Rig
from test_policies import EXPERTS, LAYERS, view


@pytest.mark.parametrize(
    ("scores", "top_k", "experts", "sums"),
    [
        ([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], 2, [1, 3], [0.5, 0.3]),
        ([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], 1, [1], [0.5]),
        ([[0.6, 0.4, 0, 0, 0, 0], [0, 0.4, 0.6, 0, 0, 0]], 2, [1, 0, 2], [0.8, 0.6, 0.6]),
        ([[0.9, 0, 0, 0, 0, 0.1], [0, 0, 0, 0.2, 0.3, 0]], 1, [0, 4], [0.9, 0.3]),
        ([[0.1, 0.2, 0.3, 0.15, 0.13, 0.12]], 6, [2, 1, 3, 4, 5, 0], None),
    ],
)
def test_next_gate(
    scores: list[list[float]], top_k: int, experts: list[int], sums: list[float] | None
) -> None:
    array = np.array(scores, dtype=np.float32)
    (want,) = StackedGates().forecast(view(ahead=(Ahead(2, array),), top_k=top_k))
    assert want.layer == 2
    assert want.experts.tolist() == experts
    assert len(want.scores) == len(experts)
    if sums is not None:
        assert want.scores == pytest.approx(sums)


def test_next_gate_without_scores_is_silent() -> None:
    assert StackedGates().forecast(view(ahead=(Ahead(2),))) == []
    assert StackedGates.needs == {"next_scores"}
    assert StackedGates.needs <= set(SIGNALS)


def drifting(drift: Drift, said: FloatArray, in_turn: FloatArray, steps: range) -> list[int]:
    """Let a model decode for so many steps in which layer 2 is told early and answers in turn."""
    asked = []
    for step in steps:
        drift.forecast(view(ahead=(Ahead(2, said),), step=step))
        if drift.checks(2, view(layer=2, step=step)):
            drift.check(2, in_turn)
            asked.append(step)
    return asked


def test_what_lies_between_is_learnt_and_added() -> None:
    """The router says early what it will say in its turn, but for a factor of each expert."""
    random = np.random.default_rng(0)
    drift, factors = Drift(StackedGates()), np.exp(random.normal(size=EXPERTS))
    for step in range(40):
        said = random.dirichlet(np.ones(EXPERTS), size=1).astype(np.float32)
        in_turn = (said * factors / (said * factors).sum()).astype(np.float32)
        (want,) = drift.forecast(view(ahead=(Ahead(2, said),), step=step))
        best = (-in_turn[0]).argsort()[: len(want.experts)].tolist()
        assert step == 0 or want.experts.tolist() == best
        if drift.checks(2, view(layer=2, step=step)):
            drift.check(2, in_turn)
    before = view(ahead=(Ahead(3, said),), step=40)
    (want,) = drift.forecast(before)
    assert want.experts.tolist() == (-said[0]).argsort()[: len(want.experts)].tolist(), "another"
    assert before.ahead[0].scores is said, "what it was shown is left as it was"


def test_a_drift_that_is_known_is_asked_for_now_and_then() -> None:
    said = np.full((1, EXPERTS), 1 / EXPERTS, dtype=np.float32)
    asked = drifting(Drift(StackedGates()), said, said, range(200))
    assert asked[:ALWAYS] == list(range(ALWAYS))
    assert len(asked) == ALWAYS + (200 - ALWAYS) // EVERY


def test_a_drift_that_changes_is_followed_and_extremes_do_no_harm() -> None:
    drift, said = Drift(StackedGates()), np.full((1, EXPERTS), 1 / EXPERTS, dtype=np.float32)
    for favourite in (4, 1):
        in_turn = np.zeros((1, EXPERTS), dtype=np.float32)  # of all others nothing at all
        in_turn[0, favourite] = 1.0
        drifting(drift, said, in_turn, range(favourite * 1000, favourite * 1000 + 200))
        (want,) = drift.forecast(view(ahead=(Ahead(2, said),)))
        assert want.experts[0] == favourite
        assert np.isfinite(want.scores).all()


def test_a_drift_is_that_of_the_same_tokens_in_decoding() -> None:
    drift, said = Drift(StackedGates()), np.full((2, EXPERTS), 1 / EXPERTS, dtype=np.float32)
    assert not drift.checks(2, view(layer=2)), "nothing was said of it"
    drift.forecast(view(ahead=(Ahead(2),), step=8))
    assert not drift.checks(2, view(layer=2, step=8)), "its router could not be asked"
    drift.forecast(view(ahead=(Ahead(2, said),), step=9))
    assert drift.checks(2, view(layer=2, step=9))
    assert not drift.checks(2, view(layer=2, step=10)), "of another step"
    assert not drift.checks(2, view(layer=2, step=9, phase="prefill"))
    drift.check(2, said[:1])  # of one of the two
    one = np.eye(EXPERTS, dtype=np.float32)[:2]
    drift.check(2, one)
    (want,) = drift.forecast(view(ahead=(Ahead(2, said),), step=10, top_k=1))
    assert set(want.experts.tolist()) <= {0, 1}


def needs(*experts: int) -> Demand:
    return Demand(2, ids(*experts), np.ones(len(experts), int), np.ones(len(experts), np.float32))


def test_ranks_that_prove_wrong_are_not_read_ahead() -> None:
    """The first choice is needed each time, the second never; who is resident is no matter."""
    proven = Proven(Drift(StackedGates()))
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    forecasts, resident = [], np.zeros((LAYERS, EXPERTS), dtype=bool)
    for step in range(9, 19):
        facts = view(ahead=(Ahead(2, scores),), step=step, resident=resident)
        (want,) = proven.forecast(facts)
        forecasts.append(want.experts.tolist())
        assert want.scores.tolist() == scores[0, want.experts].tolist()
        proven.observe(needs(1, 5), facts)
    assert forecasts[0] == [1, 3]
    assert forecasts[-1] == [1]
    changed = forecasts.index([1])
    assert forecasts == [[1, 3]] * changed + [[1]] * (10 - changed), "it keeps counting"
    (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), resident=resident, busy=0.0))
    assert want.experts.tolist() == [1, 3], "a link that is idle has time for the unlikely"
    resident[2, 3] = True  # it costs no read, and is better not evicted
    (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), resident=resident))
    assert want.experts.tolist() == [1, 3]


def test_a_rank_that_proves_right_again_is_read_again() -> None:
    proven = Proven(Drift(StackedGates()))
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    found = []
    for step in range(120):
        facts = view(ahead=(Ahead(2, scores),), step=step)
        (want,) = proven.forecast(facts)
        found.append(want.experts.tolist())
        proven.observe(needs(1, 3) if step >= 40 else needs(1, 5), facts)
    assert found[39] == [1]
    assert found[-1] == [1, 3]


def test_what_is_never_right_is_not_asked_for_at_all() -> None:
    proven = Proven(Drift(StackedGates()))
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    for step in range(20):
        facts = view(ahead=(Ahead(2, scores),), step=step)
        wants = proven.forecast(facts)
        proven.observe(needs(5), facts)
    assert wants == []


def test_forecasts_count_for_their_own_step_and_for_decoding_alone() -> None:
    proven = Proven(Drift(StackedGates()))
    scores = np.array([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]], dtype=np.float32)
    for step in range(20):  # what it said is asked for in a later step, or in a prompt
        for phase in ("decode", "prefill"):
            (want,) = proven.forecast(view(ahead=(Ahead(2, scores),), step=step, phase=phase))
            assert want.experts.tolist() == [1, 3]
        proven.observe(needs(5), view(step=step + 1))


def test_routers_are_asked_in_their_turn_by_who_compares() -> None:
    asked = []

    def scores_of(layer: int) -> FloatArray | None:
        asked.append(layer)
        return np.full((1, EXPERTS), 1 / EXPERTS, dtype=np.float32)

    rig = Rig(9, Policies(Recency(), Proven(Drift(StackedGates())), FetchAll()))
    rig.attendance.begin_pass("decode")
    rig.run(0, 1, scores_of=scores_of)
    assert asked == [1], "nothing was said of the first layer"
    rig.run(1, 2, scores_of=scores_of)
    assert asked == [1, 2, 1], "first the forecast for the next, as its reads may begin then"
    rig.attendance.begin_pass("decode")
    rig.run(1, 2, scores_of=lambda layer: None)  # nothing to compare with


def test_only_a_predictor_that_compares_is_taken_for_one() -> None:
    drift = Drift(StackedGates())
    assert Policies(Recency(), drift, FetchAll()).checking is drift
    assert Policies(Recency(), StackedGates(), FetchAll()).checking is None
