"""Nothing happens in silence, and no option of a verb is without effect."""

import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import models
from command import MEMORY, Call, caller
from hub_fixtures import NAME, hub, repositories
from hub_server import Hub
from retinue.memory.machine import Speeds
from retinue.policy.base import Running

__all__ = ["hub", "repositories"]

SHORT = ("--max-new-tokens", "1", "--no-self-check", "--experts", "40%", *MEMORY)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    speeds = Speeds(disk_bytes_per_s=2e9, memory_bytes_per_s=9e9)
    for verb in ("doctor", "plan"):
        monkeypatch.setattr(f"retinue.cli.{verb}.known_speeds", lambda folder, **options: speeds)
    monkeypatch.setattr("retinue.cli.doctor._direct_note", lambda folder: "")
    monkeypatch.setattr("retinue.cli.doctor.fast_paths", lambda *_: [])
    monkeypatch.setattr("retinue.cli.bench.known_rates", lambda *_, **__: {})
    return caller(capsys)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (["--task", "nonsense"], "no task `nonsense`"),
        (["--infer-task", "none"], "no task was given"),
        (["--task", "dialogue"], ""),
        ([], ""),
    ],
)
def test_a_task_that_the_first_request_lacks(
    call: Call, caplog: pytest.LogCaptureFixture, task: list[str], said: str
) -> None:
    with caplog.at_level(logging.WARNING, "retinue"):
        done = call("run", "sample", "A:", "--preset", "popular-by-task", *task, *SHORT)
    assert done.code == 0, done.err
    assert [said in record.message for record in caplog.records] == [True] * bool(said)


def test_bench_says_what_the_engine_does_the_safe_way(
    call: Call, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinue.cli.bench.measure_disk", lambda files: 1e9)
    monkeypatch.setattr("retinue.cli.bench.measure_memory", lambda **options: 1e9)
    words = ("--prompt-tokens", "4", "--new-tokens", "1", "--preset", "random")
    done = call("bench", olmoe, *words, *MEMORY, "--json")
    assert done.code == 0, done.err
    assert "note: this preset is approximate" in done.err


def test_doctor_counts_no_note_as_a_problem(call: Call, olmoe: Path) -> None:
    done = call("doctor", olmoe, "--preset", "random", "--threads", "1", *MEMORY, "--json")
    notes = [row for row in done.document["findings"] if row["name"] == "note"]
    assert any("approximate" in row["value"] for row in notes)
    assert all(row["ok"] for row in notes)


@pytest.mark.parametrize("verb", ["eval", "profile"])
def test_a_download_for_a_measurement_is_said(
    hub: Hub, call: Call, tmp_path: Path, verb: str
) -> None:
    row = {"task": "a", "prompt": models.prompt_of(4), "continuation": models.prompt_of(2)}
    (tmp_path / "texts.jsonl").write_text(json.dumps(row))
    done = call(verb, NAME, "--data", tmp_path / "texts.jsonl", *MEMORY)
    assert done.code == 0, done.err
    assert f"of `{NAME}`" in done.err


@pytest.mark.parametrize(
    ("settings", "fewer"),
    [
        (["--kv-tokens", "400000"], True),
        (["--experts", "50%"], True),
        (["--preset", "random", "--experts", "1"], None),
        ([], False),
    ],
)
def test_doctor_of_a_repository_divides_memory_as_everyone_does(
    hub: Hub, call: Call, settings: list[str], fewer: bool | None
) -> None:
    words = (NAME, "--memory", "620MiB", *settings, "--json")
    doctor, plan = call("doctor", *words), call("plan", *words)
    found = {row["name"]: row["value"] for row in doctor.document["findings"]}
    if plan.document["fits"]:
        resident = plan.document["resident_experts"]
        assert found["fits"] == f"{resident} of 32 experts resident"
        assert fewer is (resident < 32)
    else:
        assert "fits" not in found
        assert fewer is not False


def test_plan_names_the_tokens_that_it_counted(call: Call) -> None:
    done = call("plan", "sample", "--context", "96", "--kv-tokens", "960", *MEMORY)
    assert "for 960 tokens" in done.out
    assert "(a prompt of 96)" in done.out


@pytest.mark.parametrize("option", ["--batch", "--kv-tokens", "--task"])
def test_eval_takes_no_option_that_it_cannot_use(call: Call, option: str) -> None:
    with pytest.raises(SystemExit) as caught:
        call("eval", "sample", option, "2")
    assert caught.value.code == 2


def test_the_hint_of_what_no_machine_holds_names_the_options(call: Call) -> None:
    done = call("plan", "sample", "--kv-tokens", 10**12)
    assert done.code == 3
    assert "`--kv-tokens`" in done.err


def test_the_time_in_which_a_set_of_experts_is_loaded_counts(olmoe: Path) -> None:
    with models.open_llm(olmoe) as llm:
        begin = llm.assembly.host.begin

        def slowly(running: Sequence[Running]) -> int:
            time.sleep(0.05)
            return begin(running)

        llm.assembly.host.begin = slowly
        (output,) = llm.generate([models.prompt_of(4)], models.greedy(4))
    assert output.stats.prefill_s > 0.05
    assert output.stats.decode_s > 3 * 0.05


def test_a_context_that_takes_the_room_of_many_experts(call: Call, olmoe: Path) -> None:
    """The proposed one holds as many experts as was said, and who chose one is told nothing.

    Nor is anybody to whom that room is lent.
    """
    memory = models.short_of_room(olmoe, 0.25)
    common = ("run", olmoe, "1 2 3", "--token-ids", "--max-new-tokens", "1")
    assert "instead of" not in call(*common, "--memory", memory).err
    settings = (*common, "--preset", "cache-prior", "--memory", memory)
    said = re.search(
        r"tokens; with `--context (\d+)` .* for (\d+) experts instead of (\d+)", call(*settings).err
    )
    assert said is not None
    shorter, more, fewer = map(int, said.groups())
    assert more >= 1.25 * fewer
    own = call(*settings, "--context", shorter).err
    assert f"room for {more} of" in own
    assert "instead of" not in own
    assert "instead of" not in call(*settings[:-1], models.MEMORY).err
