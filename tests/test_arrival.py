"""A new set is read while the pass runs that is served by it."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from disk import eventually
from retinue import LLM
from retinue.errors import ReadError
from retinue.memory.files import Reader
from retinue.model.profiles import write_profile
from retinue.policy.profile import Profile, TaskCounts

SHAPE = (models.LAYERS, models.EXPERTS)
LAST = models.LAYERS - 1
LOW, HIGH = [0, 1, 2, 3], [4, 5, 6, 7]
PROMPT = models.prompt_of(20)
Read = Callable[..., int]


def popularity(experts: list[int]) -> TaskCounts:
    weight = np.zeros(SHAPE, dtype=np.float32)
    weight[:, experts] = 1
    return TaskCounts(1, 10, weight.astype(np.int64), weight)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    tasks = {"low": popularity(LOW), "high": popularity(HIGH)}
    write_profile(Profile("tiny", *SHAPE, models.TOP_K, tasks), file)
    return file


@pytest.fixture(params=[True, False], ids=["eager", "prepared"])
def llm(request: pytest.FixtureRequest, olmoe: Path, profile: Path) -> Any:
    """Half of the experts, those of the task `low` first."""
    settings = {"experts": "50%", "profile": profile, "task": "low", "eager": request.param}
    with models.open_llm(olmoe, preset="popular-by-task", **settings) as opened:
        yield opened


def answer(llm: LLM, task: str) -> list[int]:
    (output,) = llm.generate([PROMPT], models.greedy(6), task=task)
    return list(output.token_ids)


def resident(llm: LLM) -> list[list[int]]:
    return [np.flatnonzero(row >= 0).tolist() for row in llm.assembly.cache.slot_of]


def of_last(llm: LLM, file: Path, offset: int) -> bool:
    """Whether a read is of an expert of the last layer."""
    extents = [
        extent for row in llm.assembly.network.experts.layouts[LAST] for extent in row.extents
    ]
    return any(each.file == file and each.start <= offset < each.stop for each in extents)


def instead(llm: LLM, patch: pytest.MonkeyPatch, last: Callable[[Read], int]) -> None:
    """Let reads of the last layer do `last`, which is given the plain read."""
    plain = Reader.read

    def read(self: Reader, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        def go() -> int:
            return plain(self, file, offset, into, direct=direct)

        return last(go) if of_last(llm, file, offset) else go()

    patch.setattr(Reader, "read", read)


def test_earlier_layers_compute_while_later_ones_are_read(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer's reads end only when the layer before it is due."""
    due, waited = threading.Event(), list[bool]()

    def last(plain: Read) -> int:
        waited.append(due.wait(10))
        return plain()

    def watch(layer: int, *_: Any) -> None:
        if layer == LAST - 1 and not due.is_set():
            assert not llm.assembly.cache.ready[LAST, HIGH].any()
            due.set()

    host, metrics = llm.assembly.host, llm.assembly.metrics
    used, before = llm.assembly.cache.used_bytes_read, metrics.refresh_s
    read = llm.assembly.cache.reads.counts["refresh"].copy()
    host.watch = watch
    with monkeypatch.context() as patch:
        instead(llm, patch, last)
        answer(llm, "high")
    assert waited
    assert all(waited)
    assert resident(llm) == [HIGH] * models.LAYERS
    assert not host.changes.books.astray
    read = llm.assembly.cache.reads.counts["refresh"] - read
    assert (read[:, 0] == len(HIGH)).all()
    assert llm.assembly.cache.used_bytes_read == used
    assert metrics.total.prefill.pending == 0
    assert metrics.refresh_s > before


def test_a_later_layers_read_that_fails_ends_the_request_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = answer(llm, "low")

    def last(plain: Read) -> int:
        raise ReadError("the disk is gone")

    with monkeypatch.context() as patch:
        instead(llm, patch, last)
        for _ in range(2):
            with pytest.raises(ReadError, match="gone"):
                answer(llm, "high")
            llm.assembly.engine.idle()
        assert llm.assembly.host.changes.books.astray
    answer(llm, "high")
    assert resident(llm) == [HIGH] * models.LAYERS
    assert answer(llm, "low") == low
    llm.assembly.engine.idle()


def test_a_failure_that_another_layer_forgot_is_read_again(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an earlier layer waits for what it fetches, and asks only for its own failures."""
    cache, failed = llm.assembly.cache, list[int]()

    def last(plain: Read) -> int:
        if not failed:
            failed.append(1)
            raise ReadError("once")
        return plain()

    def watch(layer: int, *_: Any) -> None:
        if layer == LAST - 1:
            eventually(lambda: cache.poll() or not cache.reads.loading)
            cache.reads.raise_failure(layer, ())

    llm.assembly.host.watch = watch
    with monkeypatch.context() as patch:
        instead(llm, patch, last)
        answer(llm, "high")
    assert failed
    assert resident(llm) == [HIGH] * models.LAYERS
