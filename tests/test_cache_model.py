"""Ten thousand random operations on a cache over a faulty disk, next to a model of its rules.

The readers are real threads, so what finishes when differs from run to run. The model therefore
does not say what state an expert is in, but which changes each operation may make; that holds
in every order.
"""

import random
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disk import PATIENCE_S, Rig, ids, pattern
from retinue.errors import ReadError, RetinueError
from retinue.memory.cache import LOADING
from retinue.memory.lease import Lease
from retinue.types import Demand, Expert, Want

OPERATIONS = 10_000
ROWS, SLOTS = (6, 5, 6), 8
State = dict[Expert, int]  # READY: the slot, or LOADING; what is ABSENT is not in it


class RandomDisk:
    """A Source that is sometimes late, sometimes short, and sometimes raises whatever it likes."""

    def __init__(self, seed: int) -> None:
        self._random, self._lock = random.Random(seed), threading.Lock()
        self.failed: Counter[Expert] = Counter()

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        with self._lock:
            fate = self._random.random()
            if fate < 0.05:
                self.failed[Expert(int(file.name[5:]), offset // 16384)] += 1
        if fate < 0.02:
            raise ReadError("the disk broke")
        if fate < 0.03:
            raise ZeroDivisionError
        if fate > 0.9:
            time.sleep(0.0003 * (fate - 0.9) / 0.1)
        got = 100 if fate < 0.05 else len(into)
        into[:got] = pattern(file.name, offset, got)
        return got


class Model:
    """Which changes of an expert's state are within the rules, whatever the readers did."""

    def __init__(self, disk: RandomDisk) -> None:
        self.pins: Counter[Expert] = Counter()
        self.changes: Counter[str] = Counter()
        self._disk = disk
        self._seen: Counter[Expert] = Counter()  # failures that a change was put down to
        self._demanded: set[Expert] = set()  # and still loading

    def check(self, before: State, after: State, operation: str, **facts: Any) -> None:
        for key in before.keys() | after.keys():
            old, new = before.get(key), after.get(key)
            if old == new:
                continue
            started = operation in ("fetch", "want") and key in facts["targets"]
            evicted = operation in ("fetch", "want", "room") and not self.pins[key]
            cancelled = key in facts.get("cancelled", ())
            if operation == "fetch" and key not in self._demanded:
                cancelled |= key.layer != facts["layer"]
            failed = self._disk.failed[key] > self._seen[key]
            kinds = ["absent" if s is None else "loading" if s < 0 else "ready" for s in (old, new)]
            change = "-".join(kinds)
            self.changes[change] += 1
            assert {
                "absent-loading": started,
                "absent-ready": started,  # and polled at once
                "loading-ready": True,
                "loading-absent": cancelled or failed,
                "ready-absent": evicted,
                "ready-loading": evicted and started,
                "ready-ready": evicted and started,
            }[change], f"{operation} made {key} {change}; {facts}"
            if old == LOADING:
                self._seen[key] = self._disk.failed[key]
        if operation == "fetch":
            self._demanded |= facts["targets"] - before.keys()
        self._demanded = {key for key in self._demanded if after.get(key) == LOADING}


class Run:
    """The cache, its model, and one method per operation."""

    def __init__(self, rig: Rig, disk: RandomDisk, seed: int) -> None:
        self.rig, self.cache, self.disk = rig, rig.cache, disk
        self.model, self.random = Model(disk), random.Random(seed)
        self.leases: list[tuple[ExitStack, Lease, set[Expert]]] = []
        self.layer = 0

    def state(self) -> State:
        slot_of = self.cache.slot_of
        held = np.argwhere((slot_of >= 0) | (slot_of == LOADING))
        return {Expert(*at): int(slot_of[tuple(at)]) for at in held.tolist()}

    def some(self, layer: int, most: int = 6) -> list[int]:
        count = self.random.randint(0, min(most, ROWS[layer]))
        return self.random.sample(range(ROWS[layer]), count)

    def any_layer(self) -> int:
        return self.random.randrange(len(ROWS))

    def fetch(self) -> dict[str, Any]:
        layer = self.any_layer()
        experts, keep = self.some(layer), self.random.choice([None, ids(*self.some(layer))])
        left = self.cache.fetch(layer, ids(*experts), keep).tolist()
        done = experts[: len(experts) - len(left)]
        assert done + left == experts
        now = self.state()
        pinned = {Expert(layer, e) for e in done if self.model.pins[layer, e]}
        assert pinned <= now.keys(), "what was fetched and is pinned is there or on its way"
        assert not left or self.rig.tier.free == 0
        return {"layer": layer, "targets": {Expert(layer, e) for e in done}}

    def want(self) -> dict[str, Any]:
        layer, limit = self.any_layer(), self.random.randint(0, 4)
        before = self.state()
        experts = self.some(layer)
        self.cache.want(Want(layer, ids(*experts), np.ones(len(experts), np.float32)), limit)
        begun = [k for k, slot in self.state().items() if slot == LOADING and k not in before]
        assert len(begun) <= limit
        return {"targets": {Expert(layer, e) for e in experts}}

    def drop_wants(self) -> dict[str, Any]:
        layer = self.any_layer()
        needed = {Expert(layer, e) for e in self.some(layer)}
        loading = {k for k, s in self.state().items() if s == LOADING and k.layer == layer}
        self.cache.drop_wants(layer, ids(*(key.index for key in needed)))
        kept = {k for k, s in self.state().items() if s == LOADING and k.layer == layer}
        assert kept == loading & needed
        return {"cancelled": loading - needed}

    def cancel_all(self) -> dict[str, Any]:
        before = self.state()
        self.cache.cancel_all()
        assert LOADING not in self.state().values()
        return {"cancelled": before.keys()}

    def room(self) -> dict[str, Any]:
        count, before = self.random.randint(1, SLOTS), self.state()
        if self.cache.room(count):
            assert self.rig.tier.free >= count
        else:
            assert self.state() == before
        return {}

    def poll(self) -> dict[str, Any]:
        self.cache.poll()
        return {}

    def wait(self) -> dict[str, Any]:
        if LOADING in self.state().values():
            self.cache.wait(0.0005)
        return {}

    def raise_failure(self) -> dict[str, Any]:
        layer = self.any_layer()
        try:
            self.cache.reads.raise_failure(layer, range(self.cache.experts))
        except RetinueError:
            assert any(key.layer == layer for key in self.disk.failed)
            self.model.changes["raised"] += 1
        self.cache.reads.raise_failure(layer, range(self.cache.experts))
        return {}

    def lease(self) -> dict[str, Any]:
        layer = self.any_layer()
        keys = {Expert(layer, e) for e in self.some(layer, most=3)}
        stack = ExitStack()
        lease = stack.enter_context(self.cache.pin(layer, (key.index for key in keys)))
        self.leases.append((stack, lease, keys))
        self.model.pins.update(keys)
        while len(self.leases) > 2:
            self.end(0)
        return {}

    def end(self, at: int) -> None:
        stack, _, keys = self.leases.pop(at)
        stack.close()
        self.model.pins.subtract(keys)

    def release(self) -> dict[str, Any]:
        if self.leases:
            at = self.random.randrange(len(self.leases))
            _, lease, keys = self.leases[at]
            if not keys:
                self.end(at)
            else:
                key = keys.pop()
                lease.release([key.index])
                self.model.pins[key] -= 1
        return {}

    def use(self) -> dict[str, Any]:
        ready = [key for key, slot in self.state().items() if slot >= 0]
        for key in ready[:2]:
            self.cache.use(key.layer, [key.index])
        layer, one = self.any_layer(), np.ones(1)
        demand = Demand(layer, ids(0), one.astype(np.int64), one.astype(np.float32))
        self.cache.touch(demand, tokens=1)
        return {}

    def begin(self) -> dict[str, Any]:
        if self.layer == 0:
            self.cache.begin_step(self.random.choice(["prefill", "decode"]))
        self.cache.begin_layer(self.layer)
        self.layer = (self.layer + 1) % len(ROWS)
        return {}

    def quiet(self) -> None:
        """End everything that goes on, and count."""
        while self.leases:
            self.end(0)
        while LOADING in self.state().values():
            self.cache.wait(PATIENCE_S)
        self.cache.check()
        assert all(self.rig.is_right(*key) for key in self.state())


WEIGHTS = {"fetch": 8, "want": 6, "poll": 5, "wait": 8, "lease": 4, "release": 8, "begin": 2}
WEIGHTS |= {"drop_wants": 2, "room": 1, "use": 2, "raise_failure": 1, "cancel_all": 0.3}


def check_slots(run: Run, state: State) -> None:
    ready = [slot for slot in state.values() if slot >= 0]
    assert len(set(ready)) == len(ready), "one slot for two experts"
    assert run.cache.resident == len(ready)
    loading = len(state) - len(ready)
    assert len(ready) + loading + run.rig.tier.free <= SLOTS, "a slot is held twice"


@pytest.mark.parametrize("seed", [1, 2])
def test_random_operations(seed: int) -> None:
    disk = RandomDisk(seed)
    with Rig(ROWS, SLOTS, source=disk) as rig:
        run = Run(rig, disk, seed)
        names = run.random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=OPERATIONS)
        state = run.state()
        for number, name in enumerate(names):
            facts = getattr(run, name)()
            before, state = state, run.state()
            run.model.check(before, state, name, **facts)
            check_slots(run, state)
            for key, slot in state.items():
                if slot >= 0 and (before.get(key) != slot or number % 50 == 0):
                    assert rig.is_right(*key), f"{key} shows other bytes after {name}"
            if number % 500 == 0:
                run.quiet()
                before, state = state, run.state()
                run.model.check(before, state, "quiet")
        run.quiet()
        # Far fewer than there are, so that this says only: it was no walk in the park.
        least = {"absent-loading": 300, "loading-ready": 200, "ready-absent": 100}
        least |= {"loading-absent": 50, "raised": 2}
        for change, count in least.items():
            assert run.model.changes[change] >= count, run.model.changes
