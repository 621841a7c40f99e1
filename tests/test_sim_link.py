"""The simulated link: times by hand, the mover's order, cancelled and hurried reads."""

import numpy as np
import pytest

from retinue.memory.base import (
    CHUNK_BYTES,
    READERS,
    UNDER_WAY_BYTES,
    Sizes,
    Ticket,
    TicketState,
    Urgency,
)
from retinue.sim.link import Roads, SimulatedLink
from retinue.types import Expert

UNIT = 1 << 18  # so small that each reader may take one


IN_TURN = Roads(UNIT, in_turn=True)


def link_of(size: int, roads: Roads, experts: int = 16) -> SimulatedLink:
    sizes = np.full((1, 1, experts), size, dtype=np.int64)
    return SimulatedLink(roads, Sizes(sizes, sizes))


def read(link: SimulatedLink, index: int, urgency: Urgency = Urgency.DEMAND) -> Ticket:
    return link.submit(Expert(0, index), index, urgency, 0)


def test_one_read_takes_latency_and_bytes() -> None:
    roads = Roads(UNIT, latency_s=0.5, bus_bytes_per_s=2 * UNIT)
    link = link_of(UNIT, roads)
    ticket = read(link, 0)
    assert link.wait([ticket], 1.9) == 1.9
    assert not ticket.settled
    assert link.wait([ticket], 9.0) == pytest.approx(0.1)  # 0.5 + 1 + 0.5
    assert (ticket.settled, ticket.state, link.bytes_read) == (True, TicketState.DONE, UNIT)
    assert link.clock() == pytest.approx(roads.read_s(UNIT)) == 2.0
    assert link.wait([ticket], 1.0) == 0.0


def test_bits_of_another_precision_are_expanded_by_their_reader() -> None:
    sizes = np.full((2, 1, 2 * READERS), UNIT, dtype=np.int64)
    link = SimulatedLink(IN_TURN, Sizes(sizes, sizes), expand_s=0.25)
    own, other, last = (link.submit(Expert(0, at), at, Urgency.DEMAND, at % 2) for at in range(3))
    assert link.wait([own], 9.0) == 1.0
    assert link.wait([other], 9.0) == 1.25
    link.advance(0.7)
    assert (link.now, last.settled) == (2.95, False)
    link.advance(0.05)
    assert last.settled, "the disk went on meanwhile"
    assert link.busy() == 3.0
    tickets = [link.submit(Expert(0, at), at, Urgency.DEMAND, 1) for at in range(READERS + 1)]
    link.wait([tickets[READERS]], 99.0)
    # One more than there are readers begins when the first of them has expanded its bits.
    assert link.now == pytest.approx(3.0 + READERS + 1 + 0.25)
    dropped = link.submit(Expert(0, 1), 1, Urgency.DEMAND, 1)
    link.advance(1.1)
    link.cancel(dropped)
    assert not dropped.settled, "its slot is still written to"
    link.advance(0.2)
    assert (dropped.settled, dropped.state) == (True, TicketState.CANCELLED)


def test_reads_share_the_disk_and_wait_for_its_answer_together() -> None:
    link = link_of(UNIT, Roads(UNIT, latency_s=0.5, in_turn=True))
    tickets = [read(link, index) for index in range(3)]
    link.advance(2.5)
    assert [ticket.settled for ticket in tickets] == [True, True, False]
    link.advance(1.0)
    assert tickets[2].settled
    assert link.now == 3.5
    beside = link_of(UNIT, Roads(UNIT, latency_s=0.5))
    tickets = [read(beside, index) for index in range(3)]
    beside.advance(3.4)
    assert [ticket.settled for ticket in tickets] == [False] * 3
    assert beside.wait([tickets[1]], 9.0) == pytest.approx(0.1)
    assert [ticket.settled for ticket in tickets] == [True] * 3, "those that end as it wakes too"


def test_a_demand_waits_for_what_has_begun_and_for_nothing_else() -> None:
    link = link_of(UNIT, IN_TURN)
    ahead = [read(link, index, Urgency.LATER) for index in range(READERS + 3)]
    link.advance(1e-9)  # the engine computes, and readers take their chunks
    demand = read(link, 15)
    link.wait([demand], 100.0)
    assert link.now == pytest.approx(READERS + 1)
    assert sum(ticket.settled for ticket in ahead) == READERS
    hurried = ahead[-1]
    link.raise_urgency(hurried, Urgency.DEMAND)
    link.wait([hurried], 100.0)
    # Those that readers had taken meanwhile come first.
    assert link.now <= 2 * READERS + 1


def test_side_by_side_a_demand_shares_the_disk_with_what_readers_took_beside_it() -> None:
    link = link_of(UNIT, Roads(UNIT))
    ahead = [read(link, index, Urgency.LATER) for index in range(READERS + 3)]
    link.advance(1e-9)
    demand = read(link, 15)
    link.wait([demand], 100.0)
    assert link.now == pytest.approx(READERS + 4), "the demand, and three that were read ahead"
    assert all(ticket.settled for ticket in ahead[:READERS])


def test_no_read_begins_while_the_disk_is_busy() -> None:
    """Large ones come one after the other instead of all at the end."""
    link = link_of(UNDER_WAY_BYTES, Roads(UNDER_WAY_BYTES))
    tickets = [read(link, index) for index in range(READERS)]
    link.wait([tickets[0]], 99.0)
    assert link.now < 1.0 + CHUNK_BYTES / UNDER_WAY_BYTES
    assert not any(ticket.settled for ticket in tickets[2:])
    link.wait([tickets[-1]], 99.0)
    assert link.now == pytest.approx(READERS)


def test_the_time_in_which_it_reads() -> None:
    link = link_of(UNIT, IN_TURN)
    for index in range(2):
        read(link, index)
    link.advance(1.5)
    assert link.busy() == 1.5
    link.advance(3.0)
    assert link.busy() == 2.0
    link.wait([read(link, 2)], 9.0)
    assert (link.busy(), link.now) == (3.0, 5.5)


def test_large_reads_go_chunk_by_chunk() -> None:
    link = link_of(8 * READERS * CHUNK_BYTES, Roads(CHUNK_BYTES, in_turn=True))
    ahead = read(link, 0, Urgency.NEXT_LAYER)
    link.advance(0.5)
    demand = link_of(1, Roads(1))  # another link knows nothing of it
    assert demand.now == 0
    urgent = read(link, 1)
    link.advance(READERS - 0.4)
    assert not ahead.settled
    link.cancel(ahead)
    assert ahead.state is TicketState.CANCELLED
    link.wait([urgent], 1e6)
    assert ahead.settled
    begun = -(-UNDER_WAY_BYTES // CHUNK_BYTES)  # of the other one, before it came
    assert link.now == pytest.approx(8 * READERS + begun)


def test_what_is_cancelled_in_the_queue_is_never_read() -> None:
    link = link_of(UNIT, IN_TURN)
    tickets = [read(link, index) for index in range(READERS + 2)]
    link.advance(1e-9)
    link.cancel(tickets[-1])
    assert tickets[-1].settled
    link.cancel(tickets[0])
    assert not tickets[0].settled, "it has begun"
    link.advance(100.0)
    assert tickets[0].settled
    assert tickets[0].state is TicketState.CANCELLED
    assert link.bytes_read == (READERS + 1) * UNIT
    now = link.now
    link.advance_to(1.0)
    assert link.now == now >= 100.0, "time never goes back"


def test_readers_get_no_turn_while_the_engine_holds_the_interpreter() -> None:
    link = link_of(UNIT, IN_TURN)
    first = read(link, 0)
    link.hold(5.0)
    link.wait([first], 9.0)
    assert link.now == 6.0, "it began when somebody waited for it"
    second, third = read(link, 1), [read(link, index) for index in range(2, READERS + 2)]
    link.advance(0.5)
    link.hold(9.5)
    assert not second.settled, "nobody has said so"
    assert link.wait([second], 9.0) == 0.0
    assert (second.settled, link.now) == (True, 16.0)
    assert link.wait([third[-1]], 9.0) == 1.0, "it was taken when a reader had its turn"


def test_starting_a_read_takes_its_time() -> None:
    sizes = np.full((1, 1, 4), UNIT, dtype=np.int64)
    link = SimulatedLink(IN_TURN, Sizes(sizes, sizes), start_s=0.25)
    tickets = [read(link, index) for index in range(2)]
    assert link.now == 0.5
    link.wait([tickets[1]], 9.0)
    assert link.now == 2.5
