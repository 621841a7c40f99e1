"""Looking ahead goes on while it pays, stops while it does not, and is tried again."""

import pytest

from retinue.memory.payback import ENOUGH, FIRST, KEEP, LATELY, TRIAL, Patience, Payback


def run(
    gate: Payback, passes: int, with_s: float, without_s: float, *, waits: bool = True
) -> list[bool]:
    """What `passes` passes do that take so long."""
    done = []
    for _ in range(passes):
        gate.begin(waits=waits)
        done.append(gate.ahead)
        gate.end(with_s if gate.ahead else without_s)
    return done


def test_short_answers_see_no_trial() -> None:
    assert all(run(Payback(), FIRST, 1.0, 0.1))


@pytest.mark.parametrize(("without_s", "pays"), [(1.0, True), (0.99, True), (0.9, False)])
def test_a_trial_decides(without_s: float, pays: bool) -> None:
    gate = Payback()
    run(gate, FIRST, 1.0, without_s)
    trial = run(gate, TRIAL, 1.0, without_s)
    assert trial.count(False) == TRIAL // 2
    assert set(run(gate, KEEP, 1.0, without_s)) == {pays}


@pytest.mark.parametrize(("with_s", "pays"), [(0.9, True), (0.99, False), (1.0, False)])
def test_where_prompts_did_not_wait_it_is_doubted_and_tried_at_once(
    with_s: float, pays: bool
) -> None:
    gate = Payback()
    trial = run(gate, TRIAL, with_s, 1.0, waits=False)
    assert trial.count(True) == TRIAL // 4
    assert set(run(gate, KEEP, with_s, 1.0, waits=True)) == {pays}, "later prompts do not matter"


def test_a_trial_that_clearly_confirms_ends_early() -> None:
    gate = Payback()
    run(gate, FIRST, 1.0, 1.2)
    done = run(gate, FIRST + KEEP, 1.0, 1.2)
    assert done.count(False) == ENOUGH, "as many as there were with it"
    assert all(done[2 * ENOUGH :])
    doubted = Payback()
    done = run(doubted, TRIAL, 1.2, 1.0, waits=False)
    assert 0 < done.count(True) < TRIAL // 8


def test_what_is_no_clearer_than_chance_takes_the_whole_trial() -> None:
    gate = Payback()
    run(gate, FIRST, 1.0, 1.0)
    kinds = []
    for number in range(TRIAL):  # one in five of those without is much quicker
        gate.begin()
        kinds.append(gate.ahead)
        gate.end(1.0 if gate.ahead else 0.5 if number % 5 == 0 else 1.1)
    assert kinds.count(False) == TRIAL // 2


def test_it_is_tried_again_sooner_after_a_change() -> None:
    gate = Payback()
    run(gate, FIRST + TRIAL, 1.0, 0.9)
    assert not any(run(gate, KEEP, 1.0, 0.9))
    run(gate, TRIAL, 1.0, 1.0)
    assert not any(run(gate, 2 * KEEP, 1.0, 0.5)), "what was confirmed is kept for longer"
    run(gate, TRIAL, 0.5, 1.0)
    assert all(run(gate, KEEP, 0.5, 1.0))
    assert gate.pays


def test_passes_that_fail_say_nothing() -> None:
    gate = Payback()
    for _ in range(FIRST + TRIAL):
        gate.begin()
    gate.begin()
    assert gate.pays


def test_one_slow_pass_is_no_reason() -> None:
    gate = Payback()
    run(gate, FIRST, 1.0, 1.0)
    done = run(gate, TRIAL - 1, 1.0, 1.0)
    gate.begin()
    gate.end(0.001 if not gate.ahead else 1000.0)
    assert len(done) == TRIAL - 1
    gate.begin()
    assert gate.pays


def test_patience_is_as_long_as_looks_lately_took() -> None:
    patience = Patience()
    assert patience.takes_s == 0.0, "the first wait is taken for a look"
    patience.looked(4.0)
    assert patience.takes_s == 4.0
    patience.pays = False
    patience.looked(8.0)
    assert (patience.takes_s, patience.pays) == (4.0 + 4.0 * LATELY, True)
