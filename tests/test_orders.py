"""Who goes first, by hand: a prompt of 100 tokens takes 2 s, a pass of n tokens 0.1 + 0.01 n."""

import pytest

from jobs import Waiting, decoding, due, learnt, queues
from retinue.config import ALIKE, ORDERS
from retinue.policy.order.base import Order
from retinue.policy.order.emoe import LEAST_CHUNK, SAFE, SAFE_FIRST, Emoe
from retinue.policy.order.estimate import PATIENCE_S, Estimate
from retinue.policy.order.fcfs import Fcfs
from retinue.policy.order.named import order_named
from retinue.policy.order.shortest import Shortest


@pytest.mark.parametrize("name", [*ORDERS, ALIKE])
def test_every_order_has_its_name(name: str) -> None:
    order: Order = order_named(name, Estimate(), lambda prompt: prompt > 0)
    assert type(order).__name__.lower() == name


# --- first come, first served, and what equals it


def orders() -> list[Order]:
    return [Fcfs(), Emoe(learnt()), Emoe(Estimate())]


@pytest.mark.parametrize("order", orders())
def test_without_deadlines_it_is_the_order_of_arrival(order: Order) -> None:
    waiting = [Waiting(arrived=3.0), Waiting(arrived=1.0, longest=1)]
    assert order.first(queues(waiting)) == 0
    assert order.first(queues(waiting, [decoding()], now=99.0)) == 0
    assert order.refuse(Waiting(), queues(waiting * 500, [decoding()] * 4)) is None
    assert order.rank(waiting, "prefill") == order.rank(waiting, "decode") == [0, 1]
    both = queues([], [Waiting(), decoding()])
    assert (order.chunk(both, "decode"), order.chunk(both, "prefill")) == (200, 0)


def test_without_deadlines_who_shares_experts_goes_before_who_came_a_little_sooner() -> None:
    """Task `new` lacks four experts, four seconds of reads; three wait: twelve seconds in all."""
    order = Emoe(learnt(loads={"new": 4, "old": 0}.get))  # type: ignore[arg-type]
    new, old, older = Waiting("new", arrived=0.0), Waiting("old", 11.0), Waiting("old", 13.0)
    assert order.first(queues([new, old, older], now=20.0)) == 1
    assert order.first(queues([new, older, older], now=20.0)) == 0  # they came too late for that
    assert order.first(queues([new, old], now=20.0)) == 0  # two: eight seconds
    assert order.first(queues([Waiting("new"), Waiting("new")], now=20.0)) == 0


def test_who_has_waited_long_goes_before_who_shares_experts() -> None:
    order = Emoe(learnt(loads={"new": 40, "old": 0}.get))  # type: ignore[arg-type]
    for later, first in ((PATIENCE_S - 0.1, 1), (PATIENCE_S + 0.1, 0)):
        waiting = [Waiting("new", arrived=0.0), Waiting("old", arrived=later)]
        assert order.first(queues(waiting, now=99.0)) == first


def test_until_costs_are_known_it_is_the_order_of_arrival() -> None:
    waiting = [due(50.0), due(0.001)]
    assert Emoe(Estimate()).first(queues(waiting)) == 0
    assert Emoe(Estimate()).refuse(due(0.001), queues(waiting)) is None
    assert Shortest(Estimate()).first(queues([Waiting(), Waiting(longest=1)])) == 0


# --- the shortest first


def test_the_shortest_first() -> None:
    waiting = [Waiting(longest=50), Waiting(longest=5), Waiting(longest=5, prompt_left=300)]
    assert Shortest(learnt()).first(queues(waiting)) == 1


def test_who_has_waited_long_goes_before_the_shortest() -> None:
    waiting, order = [Waiting(longest=50), Waiting(longest=5)], Shortest(learnt())
    assert order.first(queues(waiting, now=PATIENCE_S - 0.1)) == 1
    assert order.first(queues(waiting, now=PATIENCE_S)) == 0


# --- the paper's estimate


def test_the_time_until_the_last_token() -> None:
    """t_i = prompts + passes of i + tokens of all while i runs + what it has spent."""
    running = [decoding(4, arrived=-3.0), decoding(8, arrived=-5.0)]  # 6 and 2 left
    known = learnt()
    first, second = known.latencies(queues([], running))
    assert first == pytest.approx(6 * 0.1 + (6 + 2) * 0.01 + 3)
    assert second == pytest.approx(2 * 0.1 + (2 + 2) * 0.01 + 5)
    first, second = known.latencies(queues([], running), Waiting())
    assert first == pytest.approx(2 + 6 * 0.1 + (6 + 2 + 6) * 0.01 + 3)
    assert second == pytest.approx(2 + 2 * 0.1 + (2 + 2 + 2) * 0.01 + 5)


def test_loading_is_part_of_it() -> None:
    known = learnt(loads={"new": 4}.get)  # type: ignore[arg-type]
    plain, loading = (known.latencies(queues([], [decoding()]), Waiting(t)) for t in ("", "new"))
    assert loading[0] - plain[0] == pytest.approx(4.0)


def test_few_that_decode_together_take_more_passes() -> None:
    running = [decoding(0), decoding(0)]
    alone = learnt().latencies(queues([], running, together=1))
    assert alone[0] == pytest.approx(20 * 0.1 + 20 * 0.01)


def test_when_first_tokens_come() -> None:
    """Two seats: the third waits for the first answer's end, after nine more steps."""
    waiting = [Waiting(), Waiting(), Waiting()]
    first, second, third = learnt().first_tokens(queues(waiting, seats=2), waiting)
    assert first == pytest.approx(2.0)
    assert second == pytest.approx(2.0 + 2.0)
    # Each one's step beside the other's prompt was one of its ten.
    nine = 9 * (0.1 + 2 * 0.01)
    assert third == pytest.approx(4.0 + 0.11 + nine + 2.0)


# --- eMoE: who goes first


def test_the_least_time_left_goes_first() -> None:
    """Not the earliest deadline: the long prompt has to begin sooner."""
    waiting = [due(20.0), due(21.0, prompt_left=400), Waiting()]
    assert Emoe(learnt()).first(queues(waiting)) == 1  # 18, 21 - 6 = 15, and PATIENCE_S


def test_who_is_late_already_makes_nobody_else_late() -> None:
    waiting = [due(1.0), due(20.0)]
    assert Emoe(learnt()).first(queues(waiting)) == 1


def test_who_has_waited_long_goes_before_all() -> None:
    """Whoever comes at the end of its patience comes too late to overtake."""
    order, late = Emoe(learnt()), due(1.0)
    overtakes, does_not = (due(2.1, arrived=PATIENCE_S - at) for at in (2.0, 0.0))
    assert order.first(queues([late, overtakes], now=PATIENCE_S - 2)) == 1
    assert order.first(queues([late, does_not], now=PATIENCE_S)) == 0


def test_of_equally_urgent_ones_those_go_first_whose_experts_are_there() -> None:
    order = Emoe(learnt(loads={"away": 3, "here": 0}.get))  # type: ignore[arg-type]
    waiting = [due(20.0, task="away"), due(21.0, task="here"), due(22.9, task="here")]
    assert order.first(queues(waiting)) == 1
    # Three seconds of loading are worth three seconds, and no more.
    waiting[1:] = [due(23.1, task="here")]
    assert order.first(queues(waiting)) == 0


# --- eMoE: who is kept waiting for those that run


def test_nobody_is_admitted_that_makes_a_first_token_late() -> None:
    reading, order = due(3.0, prompt_left=100), Emoe(learnt())
    assert order.first(queues([due(10.0, prompt_left=50)], [reading])) == 0  # 1 + 1.5 s
    assert order.first(queues([due(10.0, prompt_left=150)], [reading])) is None  # 2 + 2.5 s
    reading.deadline = due(1.5).deadline  # it is late without them as well
    assert order.first(queues([due(10.0, prompt_left=150)], [reading])) == 0


def test_nobody_is_admitted_that_makes_the_last_token_late() -> None:
    """Nine tokens at 0.11 s are left; it may take 1 + 9 * 0.3 s in all."""
    order, joining = Emoe(learnt()), due(30.0, prompt_left=300)
    running = due(1.0, 0.3, prompt_left=0, answered=1)
    slow = due(1.0, 2.0, prompt_left=0, answered=1)
    assert order.first(queues([joining], [slow])) == 0
    assert order.first(queues([joining], [running])) is None


def test_a_gap_that_no_prompt_fits_into_keeps_prompts_out() -> None:
    order = Emoe(learnt())
    needs_s = 0.12 + 1.0 + 0.01 * LEAST_CHUNK
    tight = due(None, needs_s / SAFE - 0.01, prompt_left=0, answered=1)
    loose = due(None, needs_s / SAFE + 0.01, prompt_left=0, answered=1)
    waiting = [due(40.0)]
    assert order.first(queues(waiting, [loose])) == 0
    assert order.first(queues(waiting, [tight])) is None
    assert order.first(queues(waiting, [tight], now=PATIENCE_S)) == 0, "after some time, it is"


def test_a_pass_that_is_full_takes_nobody_more() -> None:
    order, waiting = Emoe(learnt()), [due(40.0)]
    assert order.first(queues(waiting, [Waiting(prompt_left=199)])) == 0
    assert order.first(queues(waiting, [Waiting(prompt_left=200)])) is None
    assert order.first(queues(waiting, [Waiting(prompt_left=101)], whole=True)) is None


# --- eMoE: who is refused


def test_who_would_come_too_late_is_refused() -> None:
    """Four seats are taken for nine steps of four tokens; then a prompt takes 2 s."""
    order, running = Emoe(learnt()), [decoding() for _ in range(4)]
    comes = 9 * 0.14 + 2
    assert order.refuse(due(comes / SAFE_FIRST + 0.01), queues([], running)) is None
    late_s = order.refuse(due(2.0), queues([], running))
    assert late_s == pytest.approx(comes - SAFE_FIRST * 2.0)
    assert order.refuse(due(None, 0.001), queues([], running)) is None, "no first token is due"
    assert order.refuse(Waiting(), queues([], running)) is None


def test_who_makes_one_late_that_waits_already_is_refused() -> None:
    order, running = Emoe(learnt()), [decoding() for _ in range(4)]
    waiting = due(6.0)  # comes at 3.26, behind one more at 5.4
    urgent = due(5.5)
    assert order.refuse(urgent, queues([waiting], running)) is None
    waiting.deadline = due(5.0).deadline
    assert order.refuse(due(4.8), queues([waiting], running)) == pytest.approx(0.4, abs=0.03)


def test_alone_everybody_may_try() -> None:
    """Costs that were learnt wrongly are put right only by what runs."""
    assert Emoe(learnt()).refuse(due(0.001), queues()) is None


# --- eMoE: what the next pass is for


def test_a_chunk_is_no_longer_than_those_that_decode_have_time_for() -> None:
    order, reading = Emoe(learnt()), Waiting(prompt_left=150)
    running = due(None, 2.505, prompt_left=0, answered=1)
    # Of 2.505 * 0.9 s the pass needs 1 s, and the next token, of two requests, 0.12 s.
    room = int((2.2545 - 1.12) / 0.01)
    assert order.chunk(queues([], [running, reading]), "decode") == room
    assert order.chunk(queues([], [running, reading]), "prefill") == 0
    assert order.chunk(queues([], [running, reading], now=1.0), "decode") == 0, "no time at all"
    assert order.chunk(queues([], [running, reading], now=PATIENCE_S), "decode") == 200


def test_a_gap_that_cannot_be_kept_holds_nobody_up() -> None:
    hopeless = due(None, 0.2, prompt_left=0, answered=1)
    assert Emoe(learnt()).chunk(queues([], [hopeless, Waiting()]), "decode") == 200


def test_passes_take_those_first_that_are_due_first() -> None:
    order = Emoe(learnt())
    prompts = [Waiting(), due(9.0), due(5.0)]
    assert order.rank(prompts, "prefill") == [2, 1, 0]
    answers = [decoding(), due(None, 2.0, last_token_at=1.0), due(None, 1.0, last_token_at=1.5)]
    assert order.rank(answers, "decode") == [2, 1, 0]
