"""The cache's rules as small scenes: who is read, who stays, who leaves, what a failure leaves."""

import numpy as np
import pytest

from disk import PATIENCE_S, Rig, eventually, ids
from retinue.errors import Cancelled, CheckpointError, ReadError, RetinueError
from retinue.memory.cache import ABSENT, LOADING
from retinue.memory.placing import place
from retinue.types import Want


def want(layer: int, *experts: int) -> Want:
    return Want(layer, ids(*experts), np.ones(len(experts), dtype=np.float32))


# --- reading


def test_an_expert_that_a_layer_does_not_have_is_not_read_ahead() -> None:
    """Who asks for whole layers asks for as many experts as the largest one has."""
    with Rig((2, 3), slots=4) as rig:
        rig.begin("decode", 1)
        rig.cache.want(want(0, 0, 1, 2), limit=9)
        rig.settle()
        assert (rig.resident(0), rig.tier.free) == ([0, 1], 2)


def test_fetched_experts_are_there_with_their_bytes() -> None:
    with Rig((4, 4), slots=3) as rig:
        assert rig.load(1, 2, 0) == []
        assert rig.resident(1) == [0, 2]
        assert rig.is_right(1, 0)
        assert rig.is_right(1, 2)
        slots = rig.cache.lookup(1, ids(0, 1, 2))
        assert slots[1] == ABSENT
        assert len({*slots.tolist()}) == 3
        assert (rig.cache.resident, rig.cache.slots, rig.tier.free) == (2, 3, 1)
        rig.cache.check()


def test_resident_experts_are_not_read_again() -> None:
    with Rig((4,), slots=4) as rig:
        rig.load(0, 1, 2)
        calls = len(rig.disk.calls)
        assert rig.load(0, 2, 1) == []
        assert len(rig.disk.calls) == calls


def test_what_finds_no_room_is_left_over_in_order() -> None:
    with Rig((6,), slots=3) as rig, rig.cache.pin(0, [0, 1, 2, 3, 4]) as lease:
        assert rig.load(0, 4, 3, 0, 2, 1) == [2, 1]
        lease.release([3])
        assert rig.load(0, 2, 1) == [1]
        assert rig.resident(0) == [0, 2, 4]
        lease.release([4])
        assert rig.load(0, 1) == []


def test_layers_may_differ_in_size() -> None:
    with Rig((2, 0, 5), slots=7) as rig:
        assert rig.cache.holds_everything
        rig.load(0, 0, 1)
        rig.load(2, 0, 1, 2, 3)
        assert [rig.cache.has_all(layer) for layer in range(3)] == [True, True, False]
        rig.load(2, 4)
        assert rig.cache.has_all(2)
        assert rig.cache.resident == rig.cache.total == 7


def test_demand_moves_a_read_that_is_on_its_way_to_the_front() -> None:
    with Rig((8, 8), slots=8, held=True) as rig:
        rig.cache.want(want(1, 0, 1, 2, 3), limit=4)
        rig.disk.await_calls(2)
        assert rig.cache.fetch(1, ids(3)).tolist() == []
        rig.disk.allow()
        rig.settle()
        order = [offset // 16384 for _, offset in rig.disk.calls]
        assert order.index(3) < order.index(1)
        assert order.count(3) == 2, "each chunk is read once"


def test_reads_are_counted_once_they_are_used() -> None:
    with Rig((4,), slots=2) as rig:
        rig.load(0, 0, 1)
        assert rig.cache.used_bytes_read == 0
        for _ in range(2):
            (slot,) = rig.cache.use(0, [1]).tolist()
            assert rig.link.views(0, 1, slot)["w"][0].shape == (1500,)
            assert rig.cache.used_bytes_read == 6000
        rig.load(0, 2)  # the evictor sends 0 away, which was never used
        rig.load(0, 0)
        rig.cache.use(0, [0])
        assert rig.cache.used_bytes_read == 12000


# --- staying and leaving


def test_the_evictor_says_who_leaves() -> None:
    with Rig((4, 4), slots=4) as rig:
        rig.load(1, 0, 3)
        rig.load(0, 3, 1)
        rig.load(1, 1)
        assert (rig.resident(0), rig.resident(1)) == ([3], [0, 1, 3])
        rig.load(1, 2)
        assert (rig.resident(0), rig.resident(1)) == ([], [0, 1, 2, 3])


def test_pinned_experts_stay() -> None:
    with Rig((6,), slots=3) as rig:
        rig.load(0, 0, 1, 2)
        with rig.cache.pin(0, [0, 1]):
            with rig.cache.pin(0, [1]) as second:
                second.release([1])
            assert rig.load(0, 3) == []  # 2 leaves, though 0 and 1 would be first
            assert rig.resident(0) == [0, 1, 3]
            with pytest.raises(AssertionError, match="pinned"):
                rig.cache.check()
        rig.load(0, 4)
        assert rig.resident(0) == [1, 3, 4]


def test_a_lease_ends_with_an_exception() -> None:
    with Rig((4,), slots=2) as rig:
        rig.load(0, 0, 1)
        with pytest.raises(KeyError), rig.cache.pin(0, [0, 1]) as lease:
            lease.release([7])
        rig.cache.check()


def test_room_is_all_or_nothing() -> None:
    with Rig((6,), slots=4) as rig:
        rig.load(0, 0, 1, 2)
        assert rig.cache.room(1)
        assert rig.resident(0) == [0, 1, 2]
        with rig.cache.pin(0, [0]):
            before = rig.cache.slot_of.copy()
            assert not rig.cache.room(4)
            assert (rig.cache.slot_of == before).all()
            assert rig.cache.room(3)
            assert rig.resident(0) == [0]
            assert rig.tier.free == 3


@pytest.mark.parametrize(
    ("ended_by", "kept"),
    [("nothing", [0, 2, 3]), ("its layer", [1, 2, 3]), ("a step", [1, 2, 3])],
)
def test_expected_experts_leave_last(ended_by: str, kept: list[int]) -> None:
    with Rig((4, 4), slots=4) as rig:
        rig.begin("decode", layer=1)
        rig.load(0, 0, 1, 2, 3)
        rig.cache.want(want(0, 0), limit=2)
        if ended_by == "its layer":
            rig.cache.begin_layer(0)
        elif ended_by == "a step":
            rig.cache.begin_step("decode")
        assert rig.cache.room(1)
        assert rig.resident(0) == kept
        assert rig.cache.room(4), "if nobody else is left, they leave too"


def test_expected_experts_give_way_in_prefill_too() -> None:
    """The ring is full of experts that a forecast expects; a demand still finds room."""
    with Rig((8, 8), slots=8, top_k=2) as rig:
        rig.load(0, 0, 1, 2, 3)
        rig.begin("prefill")
        rig.cache.want(want(1, 0, 1, 2, 3), limit=4)
        rig.settle()
        assert rig.load(0, 4) == []
        assert len(rig.resident(1)) == 3


# --- reading ahead


def test_reads_ahead_are_limited() -> None:
    with Rig((8, 8), slots=8, held=True) as rig:
        rig.cache.want(want(1, 5, 1, 2, 3), limit=2)
        assert rig.loading(1) == [1, 5]
        rig.cache.want(want(1, 3), limit=2)
        assert rig.loading(1) == [1, 5]
        rig.cache.fetch(1, ids(5))  # now a demand, which the limit does not count
        rig.cache.want(want(1, 3, 2), limit=2)
        assert rig.loading(1) == [1, 3, 5]


def test_reading_ahead_takes_what_is_free_or_idle_only() -> None:
    with Rig((4, 4), slots=3) as rig:
        rig.load(0, 0, 1)
        with rig.cache.pin(0, [0, 1]):
            rig.cache.want(want(1, 0, 1), limit=9)
            rig.settle()
            assert (rig.resident(0), rig.resident(1)) == ([0, 1], [0])
        rig.cache.want(want(1, 1), limit=9)
        rig.settle()
        assert (rig.resident(0), rig.resident(1)) == ([1], [0, 1])


def test_a_forecast_never_evicts_what_it_expects() -> None:
    with Rig((4, 4), slots=4) as rig:
        rig.load(0, 0, 1)
        rig.load(1, 0, 1)
        with rig.cache.pin(0, [0, 1]):
            rig.cache.want(want(1, 2, 0, 1, 3), limit=9)
            rig.settle()
        assert rig.resident(1) == [0, 1]


def test_dropped_reads_give_their_slots_back() -> None:
    with Rig((8, 8), slots=6, held=True) as rig:
        rig.cache.want(want(1, 0, 1, 2, 3), limit=9)
        rig.cache.want(want(0, 5), limit=9)
        rig.disk.await_calls(2)
        rig.cache.drop_wants(1, ids(1, 3, 7))
        assert rig.loading(1) == [1, 3]
        assert rig.loading(0) == [5]
        rig.disk.allow()
        rig.settle()
        while rig.tier.free < 3:  # what was being read drains first
            rig.cache.wait(PATIENCE_S)
        assert (rig.resident(0), rig.resident(1)) == ([5], [1, 3])
        assert rig.is_right(1, 3)
        rig.cache.check()


@pytest.mark.parametrize(("slots", "kept"), [(4, [0, 1]), (3, [])])
def test_demand_without_room_cancels_reads_ahead_of_other_layers(
    slots: int, kept: list[int]
) -> None:
    with Rig((8, 8), slots=slots, held=True) as rig:
        rig.begin("decode")
        rig.cache.want(want(1, 0, 1), limit=9)
        rig.cache.want(want(0, 7), limit=9)
        rig.disk.await_calls(2)
        assert rig.cache.fetch(0, ids(3)).tolist() == []  # in the slot of one not begun
        assert rig.loading(1) == kept
        assert rig.loading(0) == [3, 7], "its own layer's reads go on"
        rig.disk.allow()
        rig.settle()
        assert rig.is_right(0, 3)
        rig.cache.check()


def test_slot_of_a_cancelled_read_is_not_reused_while_it_is_written() -> None:
    with Rig((8, 8), slots=1, held=True) as rig:
        rig.begin("decode")
        rig.cache.want(want(1, 0), limit=9)
        rig.disk.await_calls(2)
        assert rig.cache.fetch(0, ids(3)).tolist() == [3]
        assert rig.loading(1) == []
        rig.cache.wait(0.01)
        assert rig.cache.fetch(0, ids(3)).tolist() == [3]
        rig.disk.allow()
        rig.cache.wait(PATIENCE_S)
        assert rig.load(0, 3) == []
        assert rig.is_right(0, 3)
        rig.cache.check()


def test_cancel_all() -> None:
    with Rig((8, 8), slots=6, held=True) as rig:
        rig.cache.fetch(0, ids(0, 1))
        rig.cache.want(want(1, 2, 3), limit=9)
        rig.cache.cancel_all()
        assert not (rig.cache.slot_of == LOADING).any()
        rig.cache.check()
        rig.disk.allow()
        while rig.tier.free < 6:
            rig.cache.wait(PATIENCE_S)
        assert rig.cache.resident == 0
        rig.cache.check()
        assert rig.load(0, 0) == []
        assert rig.is_right(0, 0)


def test_waiting_for_nothing_is_a_mistake_of_ours() -> None:
    with Rig((2,), slots=1) as rig, pytest.raises(AssertionError, match="nothing to wait for"):
        rig.cache.wait(0)


# --- failures


@pytest.mark.parametrize("fault", [ReadError("the disk broke"), 10, KeyError("odd")])
def test_failed_read_gives_the_slot_back_and_is_raised_once(fault: Exception | int) -> None:
    with Rig((4, 4), slots=2) as rig, rig.cache.pin(0, [2]):
        rig.disk.faults["layer0", 2 * 16384] = fault
        rig.load(0, 2)
        assert rig.cache.lookup(0, ids(2)).tolist() == [ABSENT]
        assert rig.tier.free == 2
        expected = {int: CheckpointError, ReadError: ReadError, KeyError: RetinueError}
        with pytest.raises(expected[type(fault)]):
            rig.cache.reads.raise_failure(0, range(8))
        rig.cache.reads.raise_failure(0, range(8))
        assert rig.load(0, 2) == []  # the fault has passed
        assert rig.is_right(0, 2)


def test_failures_of_other_layers_are_forgotten() -> None:
    with Rig((4, 4), slots=2) as rig, rig.cache.pin(1, [0]):
        rig.disk.faults["layer1", 0] = ReadError("the disk broke")
        rig.load(1, 0)
        rig.cache.reads.raise_failure(0, range(8))
        rig.cache.reads.raise_failure(1, range(8))


def test_failed_read_ahead_of_an_expert_that_nobody_needs_fails_nothing() -> None:
    with Rig((4, 4), slots=3) as rig:
        rig.disk.faults["layer1", 0] = ReadError("the disk broke")
        rig.cache.want(want(1, 0, 1), limit=9)
        rig.settle()
        rig.cache.begin_layer(1)
        with rig.cache.pin(1, [1, 2]):
            rig.cache.reads.raise_failure(1, {1, 2})


def test_failed_read_ahead_of_an_expert_that_is_needed_is_tried_again() -> None:
    with Rig((4, 4), slots=3) as rig:
        rig.disk.faults["layer1", 0] = ReadError("the disk broke")
        rig.cache.want(want(1, 0), limit=9)
        rig.settle()
        rig.cache.begin_layer(1)
        with rig.cache.pin(1, [0]):
            rig.load(1, 0)
            rig.cache.reads.raise_failure(1, {0})
            assert rig.is_right(1, 0)


# --- a set that is made resident


def rows(*wanted: int) -> np.ndarray:
    """Layer 0 without anybody, and `wanted` of layer 1, of eight each."""
    found = np.zeros((2, 8), dtype=bool)
    found[1, list(wanted)] = True
    return found


def test_a_set_is_placed_and_nothing_else() -> None:
    with Rig((8, 8), slots=4) as rig:
        rig.load(0, 0, 1)
        rig.load(1, 3)
        sizes = rig.cache.sizes.read_bytes[0]
        assert place(rig.cache, rows(2, 3, 5)) == sizes[1, [2, 5]].sum()
        assert (rig.resident(0), rig.resident(1)) == ([], [2, 3, 5])
        assert rig.cache.use(1, [2, 5]).min() >= 0
        assert rig.cache.used_bytes_read == 0  # no step had asked for them
        assert place(rig.cache, rows(2, 3, 5)) == 0
        rig.cache.check()


def test_reads_are_counted_by_layer_and_by_what_they_are_for() -> None:
    with Rig((8, 8), slots=6) as rig:
        size = int(rig.cache.sizes.read_bytes[0, 1, 0])
        rig.cache.begin_step("prefill")
        rig.load(0, 0, 1)
        rig.cache.begin_step("decode")
        rig.load(1, 7)
        place(rig.cache, rows(2, 3, 7))
        rig.load(1, 4)  # of the step again
        found = {reason: counts.tolist() for reason, counts in rig.cache.reads.counts.items()}
        assert found == {
            "prefill": [[2, 2 * size], [0, 0]],
            "decode": [[0, 0], [2, 2 * size]],
            "refresh": [[0, 0], [2, 2 * size]],
        }


def test_placing_ends_halfway_when_nobody_wants_it_any_more() -> None:
    with Rig((8, 8), slots=4, held=True) as rig:
        rig.disk.allow(2)  # of each expert's two reads: about one expert, and then nothing

        def stop() -> bool:
            return len(rig.disk.calls) >= 4

        with pytest.raises(Cancelled):
            place(rig.cache, rows(0, 1, 2, 3), stop)
        assert rig.cache.resident <= 1
        assert len(rig.disk.calls) == 4, "nothing more is read"
        rig.disk.allow()
        eventually(lambda: rig.cache.poll() or not rig.cache.reads.draining)
        rig.cache.check()
        place(rig.cache, rows(4, 5, 6, 7), lambda: False)
        assert rig.resident(1) == [4, 5, 6, 7]
        assert all(rig.is_right(1, expert) for expert in (4, 5, 6, 7))
        rig.cache.check()


def test_placing_that_is_cancelled_waits_for_no_read_of_before() -> None:
    with Rig((8, 8), slots=4, held=True) as rig:
        rig.cache.fetch(0, ids(0, 1))
        rig.disk.await_calls(2)
        with pytest.raises(Cancelled):
            place(rig.cache, rows(0, 1), lambda: True)
        rig.disk.allow()
        place(rig.cache, rows(0, 1))
        assert (rig.resident(0), rig.resident(1)) == ([], [0, 1])
        rig.cache.check()
