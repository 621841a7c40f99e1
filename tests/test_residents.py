"""Presets that fetch nothing, in the real engine: what stays, what is read, what it costs."""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from disk import eventually
from retinue import LLM, PRESETS, DoesNotFit, Unsupported, UsageError
from retinue.engine.request import new_request
from retinue.errors import ReadError, Refused
from retinue.memory.files import Reader
from retinue.model.profiles import write_profile
from retinue.policy.base import Running
from retinue.policy.preset import Given
from retinue.policy.profile import Profile, TaskCounts

APPROXIMATE = [name for name, row in PRESETS.items() if row.fixed]
FETCHING_NOTHING = [name for name in APPROXIMATE if PRESETS[name].build(Given()).fetch_above >= 1]
SHAPE = (models.LAYERS, models.EXPERTS)
HALF = models.LAYERS * models.EXPERTS // 2
PROMPT = models.prompt_of(20)


def popularity(*experts: int) -> TaskCounts:
    """A task that uses `experts` alone, the first the most."""
    weight = np.zeros(SHAPE, dtype=np.float32)
    for rank, expert in enumerate(experts):
        weight[:, expert] = 10 - rank
    return TaskCounts(1, 10, weight.astype(np.int64), weight)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    tasks = {"low": popularity(0, 1, 2, 3), "high": popularity(7, 6, 5, 4)}
    tasks["both"] = popularity(0, 7, 1, 6)
    write_profile(Profile("tiny", *SHAPE, models.TOP_K, tasks), file)
    return file


def open_llm(folder: Path, profile: Path, preset: str, **settings: Any) -> LLM:
    if PRESETS[preset].profiled:
        settings["profile"] = profile
    return models.open_llm(folder, preset=preset, **settings)


def resident(llm: LLM, layer: int = 0) -> list[int]:
    return np.flatnonzero(llm.assembly.cache.slot_of[layer] >= 0).tolist()


def running(*tasks: str | None) -> list[Running]:
    return [Running(task, len(PROMPT), 12) for task in tasks]


def answer(llm: LLM, count: int = 12, **settings: Any) -> Any:
    return llm.generate([PROMPT], models.greedy(count), **settings)[0]


@pytest.mark.parametrize("preset", APPROXIMATE)
@pytest.mark.parametrize("family", ["olmoe", "qwen_holes"])
def test_everything_at_hand_is_the_plain_model(
    preset: str, family: str, profile: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    with models.open_llm(folder) as llm:
        plain = answer(llm).token_ids
    with open_llm(folder, profile, preset, experts="100%") as llm:
        output = answer(llm)
    assert output.token_ids == plain
    assert output.stats.degraded_share == 0
    assert output.stats.misses == 0


@pytest.mark.parametrize("preset", FETCHING_NOTHING)
@pytest.mark.parametrize("family", ["olmoe", "qwen_holes"])
def test_nothing_is_fetched_and_the_cost_is_said(
    preset: str, family: str, profile: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(family)
    with open_llm(folder, profile, preset, experts="50%") as llm:
        assert any("approximate" in note for note in llm.assembly.notes)
        before = llm.assembly.cache.slot_of.copy()
        answer(llm)  # of no task: the set may be loaded again, once
        read = llm.assembly.mover.bytes_read
        output = answer(llm)
        assert llm.assembly.mover.bytes_read == read
        assert ((llm.assembly.cache.slot_of >= 0) == (before >= 0)).all()
    stats = output.stats
    assert stats.bytes_read == stats.prefill_bytes_read == stats.used_bytes_read == 0
    assert 0 < stats.degraded_share < 1
    assert stats.misses > 0
    assert stats.pending == 0
    layers = {"olmoe": 4, "qwen_holes": 2}[family]
    assert stats.hits + stats.misses == 11 * layers * models.TOP_K


def test_popular_keeps_the_most_used(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "popular", experts="50%") as llm:
        assert llm.assembly.cache.resident == HALF
        for layer in range(models.LAYERS):
            assert resident(llm, layer) == [0, 1, 6, 7]
        answer(llm, task="low")
        assert resident(llm) == [0, 1, 6, 7]


def test_the_task_decides_and_its_switch_is_counted(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "popular-by-task", experts="50%", task="low") as llm:
        assert resident(llm) == [0, 1, 2, 3]
        used = llm.assembly.cache.used_bytes_read
        first = answer(llm)
        assert first.stats.prefill_bytes_read == 0
        assert llm.assembly.cache.used_bytes_read == used  # no step asked for the first set
        assert llm.assembly.metrics.total.prefill.bytes_read == 0
        high = answer(llm, task="high")
        assert resident(llm) == [4, 5, 6, 7]
        layouts = llm.assembly.network.experts.layouts
        bytes_moved = sum(row[e].read_bytes for row in layouts for e in (4, 5, 6, 7))
        assert high.stats.prefill_bytes_read == bytes_moved
        assert llm.assembly.metrics.total.prefill.bytes_read == bytes_moved
        assert answer(llm, task="both").stats.prefill_bytes_read < bytes_moved
        again = answer(llm)
        assert resident(llm) == [0, 1, 2, 3]
    assert again.token_ids == first.token_ids
    assert high.token_ids != first.token_ids


def test_requests_of_several_tasks_share_the_slots(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "popular-by-task", experts="50%") as llm:
        residents = llm.assembly.residents
        assert residents is not None
        settle = llm.assembly.host.arrival.settle  # as the pass would that comes next
        residents.begin(running("low", "high"))
        settle()
        assert resident(llm) == [0, 1, 6, 7]
        read = residents.bytes_read
        residents.begin(running("high", "low"))  # the same, whatever the order
        assert residents.bytes_read == read
        residents.begin(running("high", "high", "high", "low"))
        settle()
        assert resident(llm) == [4, 5, 6, 7]


def test_a_stream_has_its_task(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "popular-by-task", experts="50%") as llm:
        *_, last = llm.stream(PROMPT, models.greedy(3), task="high")
        assert resident(llm) == [4, 5, 6, 7]
        assert last.stats.prefill_bytes_read > 0


@pytest.mark.parametrize(
    ("task", "words"), [(None, "no task was given"), ("poetry", "no task `poetry`")]
)
def test_a_task_that_nobody_knows_is_said_once(
    task: str | None,
    words: str,
    olmoe: Path,
    profile: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with open_llm(olmoe, profile, "popular-by-task", experts="50%") as llm:
        caplog.set_level(logging.WARNING, "retinue")
        answer(llm, task=task)
        answer(llm, task="low")
        answer(llm, task=task)
        assert resident(llm) == [0, 1, 6, 7]
    assert [words in record.message for record in caplog.records] == [True]


def test_random_is_the_same_every_time(olmoe: Path, profile: Path) -> None:
    sets = []
    for _ in range(2):
        with open_llm(olmoe, profile, "random", experts="50%") as llm:
            sets.append(llm.assembly.cache.slot_of >= 0)
    assert (sets[0] == sets[1]).all()
    assert sets[0].sum(axis=1).tolist() == [4] * models.LAYERS


@pytest.mark.parametrize("preset", APPROXIMATE)
def test_too_few_slots_are_refused_before_loading(preset: str, olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, preset, experts="25%") as llm:  # two a layer: just enough
        assert 0 < answer(llm).stats.degraded_share < 1
    with pytest.raises(DoesNotFit, match="room for 7 experts; one token needs 8") as caught:
        open_llm(olmoe, profile, preset, experts="24%")
    assert "exact preset" in caught.value.hint


def test_no_profile_is_refused_with_the_command(olmoe: Path, tmp_path: Path) -> None:
    own = models.copy(olmoe, tmp_path / "own")
    with pytest.raises(Unsupported, match="no profile") as caught:
        models.open_llm(own, preset="popular")
    assert caught.value.exit_code == 3
    assert "retinue profile" in caught.value.hint


@pytest.mark.parametrize("preset", ["on-demand", "random"])
def test_a_profile_that_nobody_reads_is_refused(preset: str, olmoe: Path, profile: Path) -> None:
    with pytest.raises(UsageError, match="reads no profile"):
        models.open_llm(olmoe, preset=preset, profile=profile)


def test_a_failed_switch_ends_the_request_and_the_next_one_works(
    olmoe: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> int:
        raise ReadError("the disk is gone")

    with open_llm(olmoe, profile, "popular-by-task", experts="50%", task="low") as llm:
        before = answer(llm).token_ids
        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", broken)
            with pytest.raises(ReadError, match="gone"):
                answer(llm, task="high")
        llm.assembly.cache.check()
        assert answer(llm).token_ids == before
        assert resident(llm) == [0, 1, 2, 3]


@pytest.mark.parametrize("preset", ["popular-by-task", "emoe"])
def test_a_refresh_ends_halfway_with_the_request_that_it_is_for(
    preset: str, olmoe: Path, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client leaves during the fifth of many slow reads: the rest is not read."""
    plain, reads = Reader.read, list[int]()
    with open_llm(olmoe, profile, preset, experts="50%", task="low") as llm:
        before = answer(llm).token_ids
        assert resident(llm) == [0, 1, 2, 3]

        def slow(self: Reader, *args: Any, **keywords: Any) -> int:
            reads.append(1)
            if len(reads) == 5:
                llm.cancel()
            time.sleep(0.05)
            return plain(self, *args, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Reader, "read", slow)
            output = answer(llm, task="high")
            assert (output.finish_reason, output.token_ids) == ("cancelled", [])
            read = len(reads)
        assert read < HALF, "it went on to read the whole set"
        llm.assembly.engine.idle()
        eventually(lambda: llm.assembly.cache.poll() or not llm.assembly.cache.reads.draining)
        assert llm.assembly.cache.resident < HALF
        assert answer(llm).token_ids == before
        assert resident(llm) == [0, 1, 2, 3]
        assert answer(llm, task="high").finish_reason == "length"
        llm.assembly.engine.idle()


def test_prefill_and_decode_agree_under_restriction(olmoe: Path, profile: Path) -> None:
    """Teacher-forced decode gives the logits of one long prefill: the same experts serve both."""
    ids = models.prompt_of(24, seed=4)
    with open_llm(olmoe, profile, "random", experts="50%") as llm:
        stepwise = models.run_logits(llm, ids[:8], ids[8:])
        whole = models.run_logits(llm, ids[:23], ids[23:])
    assert np.allclose(stepwise[-1].numpy(), whole[-1].numpy(), atol=1e-4)


def test_the_counted_cost_is_the_decode_phases(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "random", experts="50%") as llm:
        request = new_request(PROMPT, models.greedy(1), None)
        for _ in llm.run(request):
            pass
        assert llm.stats(request).degraded_share == 0  # nothing was decoded
        assert request.costs.prefill.degraded_share > 0


@pytest.mark.parametrize("setting", [{"period": 5}, {"forecaster": "running-mean"}])
def test_what_a_preset_does_not_forecast_with_is_refused(
    setting: dict[str, Any], olmoe: Path, profile: Path
) -> None:
    with pytest.raises(UsageError, match="forecasts nothing"):
        open_llm(olmoe, profile, "popular", **setting)


def test_an_unknown_forecaster_is_refused_with_the_known_ones(olmoe: Path, profile: Path) -> None:
    with pytest.raises(UsageError, match="crystal") as caught:
        open_llm(olmoe, profile, "emoe", forecaster="crystal")
    assert "running-mean" in caught.value.hint


def test_emoe_serves_by_what_its_forecaster_says(olmoe: Path, profile: Path) -> None:
    with open_llm(olmoe, profile, "emoe", experts="50%", task="low", period=1) as llm:
        assert resident(llm) == [0, 1, 2, 3]
        answer(llm, task="high")
        assert resident(llm) == [4, 5, 6, 7]
        metrics = llm.assembly.metrics
        assert metrics.refreshes == 1
        assert metrics.refresh_bytes == metrics.total.prefill.bytes_read > 0


@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_a_learnt_forecaster_needs_its_predictor(name: str, olmoe: Path, profile: Path) -> None:
    with pytest.raises(Refused, match=f"`{name}` has to be trained") as caught:
        open_llm(olmoe, profile, "emoe", forecaster=name)
    assert f"retinue train-predictor MODEL --data FILE --kind {name}" in caught.value.hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["emoe-a", "emoe-l"])
def test_what_ships_with_the_sample_forecasts_at_once(name: str) -> None:
    settings = {"preset": "emoe", "forecaster": name, "period": 1, "experts": "40%"}
    with LLM("sample", memory=models.MEMORY, threads=1, **settings) as llm:
        for _ in range(2):
            (found,) = llm.generate("A: Hi!", models.greedy(2), task="dialogue", progress=False)
            assert 0 < found.stats.degraded_share < 1
        assert llm.assembly.metrics.refreshes == 2


def test_an_answer_is_served_by_what_its_own_prompt_used(olmoe: Path, profile: Path) -> None:
    with pytest.raises(UsageError, match="looks at each prompt: `--period 5`"):
        open_llm(olmoe, profile, "emoe", forecaster="own-prefill", period=5)
    with open_llm(olmoe, profile, "emoe", forecaster="own-prefill", experts="50%") as llm:
        sets = []
        residents = llm.assembly.residents
        assert residents is not None
        place = llm.assembly.host.arrival.place

        def noted(wanted: np.ndarray, popularity: np.ndarray) -> int:
            sets.append(wanted.copy())
            return place(wanted, popularity)

        llm.assembly.host.arrival.place = noted  # type: ignore[method-assign]
        told: list[np.ndarray] = []
        observe = residents.observe

        def watched(task: str | None, used: np.ndarray) -> None:
            told.append(used)
            observe(task, used)

        llm.assembly.host.observe = watched
        answer(llm, task="high")
    (used,) = told
    own = sets[-1]
    assert (own != sets[0]).any()
    kept, left = used[own].reshape(len(used), -1), used[~own].reshape(len(used), -1)
    assert kept.sum() > left.sum()
