"""ExpertFlow and HybriMoE: each rule against a case by hand from its paper's equation."""

from dataclasses import replace

import numpy as np
import pytest

import routes
from jobs import Waiting, decoding, learnt, queues
from passes import prompt, show
from retinue.policy.base import Ahead, Costs
from retinue.policy.evict.predicted_quota import PredictedQuota
from retinue.policy.evict.recent_score import RecentScore
from retinue.policy.order.alike import Alike, halves
from retinue.policy.order.estimate import PATIENCE_S
from retinue.policy.parts.paths import fresh, paths
from retinue.policy.predict.along_paths import AlongPaths
from retinue.policy.predict.gain import Gain
from retinue.policy.watch.paths import Paths
from retinue.policy.watch.scores import RecentScores
from retinue.types import FloatArray
from routes import LAYERS, floats, view
from test_policies import leaving

# --- expertflow: routing paths


def flow() -> Paths:
    return Paths(routes.learned()["expertflow"], range(LAYERS), LAYERS)


def test_paths_are_read_along_whatever_the_passes() -> None:
    arrays = routes.learned()["expertflow"]
    wanted, _ = paths(arrays, fresh(arrays), np.array([3, 1, 4, 1, 5]))
    chances = 1 / (1 + np.exp(-wanted))
    seen = flow()
    for number in (5, 6):
        seen.begin(prompt(number))
    show(seen, [[0, 1]] * 3, 0, step=1, sequences=[5] * 3, token_ids=[3, 1, 4])
    assert seen.chances == pytest.approx(chances[:3], abs=1e-6)
    # Two requests in one pass, tokens in turn; then a token of each.
    show(seen, [[0, 1]] * 3, 0, step=2, sequences=[6, 5, 6], token_ids=[3, 1, 1])
    assert seen.chances[[1]] == pytest.approx(chances[[3]], abs=1e-6)
    assert seen.chances[[0, 2]] == pytest.approx(chances[:2], abs=1e-6)
    show(seen, [[0, 1]] * 2, 0, step=3, sequences=[5, 6], token_ids=[5, 4])
    assert seen.chances == pytest.approx(chances[[4, 2]], abs=1e-6)
    # An expert is needed unless no token chooses it.
    assert seen.needed == pytest.approx(1 - (1 - chances[4]) * (1 - chances[2]), abs=1e-6)
    before = seen.chances
    show(seen, [[0, 1]] * 2, 1, step=3, sequences=[5, 6], token_ids=[5, 4])
    assert seen.chances is before, "once a pass"


def test_paths_without_ids_say_nothing() -> None:
    seen = flow()
    facts = show(seen, [[0, 1]], 0, sequences=[5])
    assert seen.chances is None
    assert AlongPaths(seen).forecast(facts) == []
    assert leaving(PredictedQuota(seen), [(0, 0), (1, 1)], facts)[0] == (0, 0), "by recency"


def test_the_most_probable_experts_along_the_path_come() -> None:
    seen = flow()
    seen.begin(prompt(5))
    facts = show(seen, [[0, 1]], 0, sequences=[5], token_ids=[7])
    wants = AlongPaths(seen).forecast(facts)
    assert [want.layer for want in wants] == [1, 2, 3]
    for want in wants:
        best = np.argsort(-seen.chances[0, want.layer])[:2]
        assert want.experts.tolist() == best.tolist()


def test_slots_go_where_the_demand_is_predicted() -> None:
    seen = flow()
    seen.begin(prompt(5))
    facts = show(seen, [[0, 1]], 0, sequences=[5], token_ids=[7])
    # Twelve slots; demand 4, 1, 0.5 and 0.5 makes quotas of 8, 2, 1 and 1.
    seen.needed = floats(
        [[0.9, 0.9, 0.9, 0.9, 0.2, 0.2], [0.5, 0.5, 0, 0, 0, 0], *[[0.5] + [0] * 5] * 2]
    )
    held = [(0, 0), (0, 4), (1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    order = leaving(PredictedQuota(seen), held, replace(facts, resident=routes.there(*held)))
    # Layer 1 has three: its improbable ones leave first, and then (0, 4), the least of all others.
    assert order[:2] == [(1, 2), (1, 3)]
    assert order[2:4] == [(1, 0), (0, 4)]


def test_halves_of_what_is_alike() -> None:
    # Two kinds in turn, and one in between that has to balance.
    bits = floats(
        [[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 1]]
    )
    assert halves(bits).tolist() == [False, True, False, True, False, True]
    assert halves(bits[:3]).tolist() == [False, True, False]
    assert halves(np.ones((4, 3), np.float32)).sum() == 2, "balanced, though all are alike"


def bits_of(ids: np.ndarray) -> np.ndarray:
    """A path by hand: the experts with the ids of the prompt."""
    found = np.zeros((2, 5), dtype=bool)
    found[:, ids] = True
    return found


def test_alike_puts_the_first_one_s_half_first() -> None:
    order = Alike(learnt(), bits_of)
    jobs = [decoding(prompt=ids) for ids in ([0, 1], [3, 4], [1, 0], [4, 3], [0], [4])]
    assert order.rank(jobs, "decode") == [0, 2, 4, 1, 3, 5]
    assert order.rank(jobs[1:], "decode") == [0, 2, 4, 1, 3]
    assert order.rank(jobs, "prefill") == list(range(6))


def test_alike_admits_who_is_like_those_that_run() -> None:
    order = Alike(learnt(), bits_of)
    running = [decoding(prompt=[3, 4])]
    waiting = [Waiting(prompt=ids) for ids in ([0, 1], [0, 4], [4, 3], [3], [3, 4])]
    assert order.first(queues(waiting, running)) == 2
    assert order.first(queues(waiting[:2], running)) == 1
    assert order.first(queues(waiting)) == 0, "nothing runs"
    assert order.first(queues(waiting, running, now=PATIENCE_S)) == 0, "nobody waits for ever"
    assert order.first(queues(waiting, running, seats=2)) == 1, "no farther than the seats"
    assert order.refuse(waiting[0], queues(waiting, running)) is None


# --- hybrimoe: recent scores, and what a read gains


def test_recent_scores_are_a_mean_of_the_best() -> None:
    recent = RecentScores(alpha=0.25)
    scores = [0.1, 0.4, 0.05, 0.3, 0.15, 0.0]
    show(recent, [[1, 3]], 2, scores=[scores])
    # P = 2k = 4: experts 1, 3, 4 and 0.
    assert recent.scores[2].tolist() == pytest.approx([0.025, 0.1, 0, 0.075, 0.0375, 0])
    show(recent, [[1, 3], [5, 0]], 2, scores=[scores, [0.5, 0, 0, 0, 0, 0.5]])
    blended = 0.75 * recent.scores[2][1]
    show(recent, [[0, 5]], 2, scores=[[0.5, 0, 0, 0, 0, 0.5]])
    assert recent.scores[2][1] == pytest.approx(blended)
    assert not recent.scores[[0, 1, 3]].any()


def test_the_lowest_recent_scores_leave_first() -> None:
    recent = RecentScores()
    assert leaving(RecentScore(recent), [(0, 0), (2, 3)], view()) == [(0, 0), (2, 3)]
    facts = show(recent, [[1, 3]], 2, scores=[[0.1, 0.4, 0.05, 0.3, 0.15, 0.0]])
    order = leaving(RecentScore(recent), [(2, 1), (2, 3), (2, 4), (0, 0)], facts)
    assert order == [(0, 0), (2, 4), (2, 3), (2, 1)]


GATES: tuple[FloatArray, ...] = (
    floats([[0.1, 0.5, 0.0, 0.3, 0.1, 0.0]]),
    floats([[0.0, 0.0, 0.0, 0.1, 0.2, 0.7]]),
)
FORESEEN = (Ahead(2, GATES[0]), Ahead(3, GATES[1]))


def test_with_one_place_every_read_gains_itself() -> None:
    wants = Gain().forecast(view(ahead=FORESEEN))
    assert [(want.layer, want.experts.tolist()) for want in wants] == [(2, [1, 3]), (3, [5, 4])]
    assert (Gain.depth, Gain.needs) == (3, {"next_scores"})


def test_the_reads_that_shorten_a_layer_most_go_first() -> None:
    # The processor takes 3 for a token, the link 10, the accelerator 1. Layer 2 has one of its
    # two: the other takes the processor 3, cached the layer takes 2: a gain of 1. Layer 3 has
    # none, so the processor takes 6; with one of them cached 3, a gain of 3; then again 1.
    costs = Costs(read_s=10.0, expert_s=1.0, layer_s=0.0, elsewhere_s=3.0)
    wants = Gain().forecast(view(ahead=FORESEEN, costs=costs, resident=routes.there((2, 1))))
    found = [(want.layer, want.experts.tolist(), want.scores.tolist()) for want in wants]
    assert found == [(3, [5], [3.0]), (2, [3], [1.0]), (3, [4], [1.0])]
