"""`retinue reproduce`: what is measured, what survives an interruption, and what is refused."""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import models
from command import MEMORY, Call, caller, refused
from retinue import LLM
from retinue.cli.laboratory import said_once
from retinue.cli.main import main
from retinue.config import ORDERS, Config
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled, RetinueError
from retinue.lab.spread import mean
from retinue.reproduce.arrivals import LOADS
from retinue.reproduce.labels import mislabelled
from retinue.reproduce.memory import most
from retinue.reproduce.peak import Load, measure_peak
from retinue.reproduce.sensitivity import SIDES
from retinue.reproduce.studies import EMOE
from retinue.reproduce.workbench import Answer, Workbench

TINY = ("--threads", 1, *MEMORY)
FAST = "shares,labels,refresh"


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture(scope="module")
def study(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A command line for a tiny model with texts of two tasks and a profile of them."""
    folder = tmp_path_factory.mktemp("study")
    rows = [
        {"task": task, "prompt": models.prompt_of(12, seed), "continuation": models.prompt_of(6)}
        for seed, task in enumerate(["a", "b", "a"])
    ]
    data, profile = folder / "texts.jsonl", folder / "profile.json"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    words = ("profile", olmoe, "--data", data, *TINY, "--out", profile)
    assert main([str(word) for word in words]) == 0
    return ("reproduce", "emoe", olmoe, "--data", data, "--profile", profile, "--quick", *TINY)


def test_a_study_from_end_to_end(call: Call, study: tuple[object, ...], tmp_path: Path) -> None:
    done = call(*study, "--only", FAST, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert document == json.loads((tmp_path / "report.json").read_text())
    assert set(document["experiments"]) == set(FAST.split(","))
    for name, found in document["experiments"].items():
        assert found["done"]
        assert found["rows"]
        assert found["verdict"] in done.err or found["verdict"]
        assert f"{name}: " in done.err  # progress
    rows = document["experiments"]["shares"]["rows"]
    assert rows[0]["share"] == 100
    exact = [row for row in rows if row["exact"]]
    assert all(row["added"] == 0 and row["agreement"] == 1 for row in exact)
    assert {row["method"] for row in rows} >= {"emoe, running mean", "popularity by task"}
    left_out = document["experiments"]["shares"]["left_out"]
    assert "one token needs 8" in left_out["random set, 20 %"]
    assert "has to be trained" in left_out["eMoE-A, 40 %"]
    random = next(row for row in rows if row["method"] == "random set" and row["share"] == 40)
    assert 0 < random["degraded_share"] < 1
    assert random["resident"] == 12  # of 32, three in each of four layers
    assert random["agreement_low"] <= random["agreement"] <= random["agreement_high"]
    labels = document["experiments"]["labels"]["rows"]
    assert [row["wrong"] for row in labels] == [0, 20, 40, 60, 80, 100]
    text = (tmp_path / "report.html").read_text()
    assert "Left out: eMoE-A, 20 %" in text
    for experiment in EMOE.experiments:
        assert (f'id="{experiment.name}"' in text) == (experiment.name in FAST)


def test_a_killed_run_goes_on(
    call: Call, study: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that were finished are not measured again, and keep what was found."""
    command = (*study, "--only", "shares", "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "answers", falling(3))
        patch.setattr("retinue.cli.reproduce._write", lambda *_: pytest.fail("it was killed"))
        with pytest.raises(SystemExit):
            call(*command)
    kept = json.loads((tmp_path / "shares.json").read_text())
    assert "plain, 100 %" in kept["cells"]
    assert not kept["done"]
    done = call(*command, "--json")
    assert done.code == 0, done.err
    for key, rows in kept["cells"].items():
        assert f"shares: {key}" not in done.err
        assert all(row in done.document["experiments"]["shares"]["rows"] for row in rows)
    assert "shares: look-ahead, 40 %" in done.err
    assert "shares: random set, 40 %" not in call(*command).err  # nothing is left to do
    assert "shares: random set, 40 %" in call(*command, "--fresh").err


def test_the_other_experiments(call: Call, study: tuple[object, ...], tmp_path: Path) -> None:
    done = call(*study, "--only", "sensitivity,period,arrivals", "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    found = done.document["experiments"]
    assert {row["side"] for row in found["sensitivity"]["rows"]} == set(SIDES.values())
    assert [row["period"] for row in found["period"]["rows"]] == [1, 1]
    assert "has to be trained" in found["period"]["left_out"]["emoe-a, every 1"]
    rows = found["arrivals"]["rows"]
    assert {row["clock"] for row in rows} == {"simulated"}  # quick
    assert all(0 <= row["attainment"] <= 1 and row["p50"] <= row["p99"] for row in rows)
    alone = {row["order"]: row for row in rows if row["load"] == min(LOADS)}
    assert set(alone) == set(ORDERS)


def test_a_peak_is_of_a_process_of_its_own(olmoe: Path) -> None:
    config = Config(memory=models.MEMORY, context=17, kv_tokens=34, batch=2, threads=1)
    found = measure_peak(Load(str(olmoe), config, tokens=16, batch=2), Event())
    assert 100 << 20 < found < 2 << 30
    with pytest.raises(RetinueError, match="no such folder"):
        measure_peak(Load("nowhere", config, tokens=16, batch=2), Event())
    stopped = Event()
    stopped.set()
    with pytest.raises(Cancelled):
        measure_peak(Load(str(olmoe), config, tokens=16, batch=2), stopped)


def falling(after: int) -> Any:
    """`Workbench.answers`, but the process ends at its call number `after`."""
    answers, calls = Workbench.answers, []

    def fall(bench: Workbench, llm: LLM) -> list[Answer]:
        calls.append(1)
        if len(calls) == after:
            raise SystemExit
        return answers(bench, llm)

    return fall


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_an_interrupted_run_has_a_report(
    call: Call, study: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = Workbench.answers

    def interrupted(bench: Workbench, llm: LLM) -> list[Answer]:
        if llm.config.preset == "popular":
            os.kill(os.getpid(), signal.SIGTERM)
        return answers(bench, llm)

    monkeypatch.setattr(Workbench, "answers", interrupted)
    done = call(*study, "--only", "shares,labels", "--out", tmp_path)
    assert done.code == 1
    assert f"error: stopped by SIGTERM; what was measured is in `{tmp_path}" in done.err
    assert "hint: the same command goes on" in done.err
    assert "Not finished yet." in (tmp_path / "report.html").read_text()
    experiments = json.loads((tmp_path / "report.json").read_text())["experiments"]
    assert list(experiments) == ["shares"]
    assert not experiments["shares"]["done"]


def test_another_setting_is_another_study(
    call: Call, study: tuple[object, ...], tmp_path: Path
) -> None:
    command = (*study, "--only", "refresh", "--out", tmp_path)
    assert call(*command).code == 0
    refused(call(*command, "--per-task", 2), 2, "measured with another texts")
    others = (*study, "--only", "labels", "--per-task", 2, "--out", tmp_path)
    refused(call(*others), 2, "measured with another texts")  # one page shows both
    assert not (tmp_path / "labels.json").exists()
    assert call(*command, "--per-task", 2, "--fresh").code == 0
    (tmp_path / "refresh.json").write_text("{}")
    refused(call(*command), 2, "cannot read")


def test_unknown_names(call: Call, study: tuple[object, ...], tmp_path: Path) -> None:
    done = call("reproduce", "amoe", "sample")
    refused(done, 2, "unknown study: `amoe`")
    assert "hint: known: emoe" in done.err
    done = call(*study, "--only", "shares,colour", "--out", tmp_path)
    refused(done, 2, "unknown experiment: `colour`")
    assert ", ".join(each.name for each in EMOE.experiments) in done.err
    assert not list(tmp_path.iterdir())


def test_without_a_profile(call: Call, study: tuple[object, ...], tmp_path: Path) -> None:
    at = study.index("--profile")
    refused(call(*study[:at], *study[at + 2 :], "--out", tmp_path), 3, "no profile of")
    assert not list(tmp_path.iterdir())


def test_what_models_warn_of_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("retinue")
    with said_once():
        for task in ("a", "b", "a"):
            logger.warning("the profile has no task `%s`", task)
    assert [record.args for record in caplog.records] == [("a",), ("b",)]
    logger.warning("the profile has no task `%s`", "a")
    assert len(caplog.records) == 3


def test_without_the_extra_it_says_how_to_get_it(
    call: Call, study: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, package: str | None = None) -> Any:
        return None

    monkeypatch.setattr("importlib.util.find_spec", missing)
    done = call(*study, "--only", "labels", "--out", tmp_path)
    assert done.code == 0, done.err
    assert "note: without plots; to have it: pip install 'retinue[reproduce]'" in done.err
    assert "note: without similarity of answers" in done.err
    text = (tmp_path / "report.html").read_text()
    assert "<svg" not in text
    assert text.count("pip install &#x27;retinue[reproduce]&#x27;") == 2


# --- the parts


def test_a_mean_with_its_interval() -> None:
    found = mean([1.0, 2.0, 3.0, 10.0], [1, 1, 1, 3])
    assert found.value == 6.0
    assert 1.0 < found.low < found.value < found.high <= 10.0
    assert found == mean([1.0, 2.0, 3.0, 10.0], [1, 1, 1, 3])
    point = mean([2.5])
    assert (point.low, point.high, point.count) == (2.5, 2.5, 1)


@pytest.mark.parametrize("wrong", [0, 20, 50, 100])
def test_wrong_labels_are_as_many_as_asked_for(wrong: int) -> None:
    texts = [TaskIds(task, [1, 2, number], 1) for number in range(10) for task in ("a", "b", "c")]
    found = mislabelled(texts, wrong)
    changed = [now.task != was.task for now, was in zip(found, texts, strict=True)]
    assert sum(changed) == 30 * wrong // 100
    assert [text.ids for text in found] == [text.ids for text in texts]
    assert found == mislabelled(texts, wrong)


def test_wrong_labels_need_two_tasks() -> None:
    texts = [TaskIds("a", [1, 2], 1)]
    assert mislabelled(texts, 100) == texts


@pytest.mark.parametrize("limit", [4, 5, 7, 8, 9, 1000])
def test_the_most_that_fits(limit: int) -> None:
    assert most(lambda count: count <= limit, 4) == limit
