"""`retinue compare`: what is measured, what survives an interruption, and what is refused."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import models
from command import MEMORY, Call, caller, refused
from retinue.compare import live
from retinue.policy.presets import PRESETS

TINY = ("--threads", 1, *MEMORY, "--new-tokens", 3, "--experts", "40%")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture(scope="module")
def command(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A command line for a tiny model with texts of two tasks."""
    rows = [
        {"task": task, "prompt": models.prompt_of(12, seed), "continuation": models.prompt_of(6)}
        for seed, task in enumerate(["a", "b", "a"])
    ]
    data = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    return ("compare", olmoe, "--data", data, *TINY)


def test_a_comparison_from_end_to_end(
    call: Call, command: tuple[object, ...], tmp_path: Path
) -> None:
    presets = ("--presets", "random,popular")
    done = call(*command, *presets, "--runs", 2, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1
    document = done.document
    assert document == json.loads((tmp_path / "compare.json").read_text())
    cells = {row["preset"]: row for row in document["cells"]}
    assert list(cells) == ["auto", "on-demand", "random"]
    assert (document["runs"], document["read_limits"]) == (2, [None])
    for row in cells.values():
        assert row["decode_tokens"] == 2 * 3  # one text of each task
        assert row["prefill_tokens"] == 2 * 12
        assert row["hits"] + row["pending"] + row["misses"] > 0
        assert row["decode_tokens_per_s_min"] <= row["decode_tokens_per_s"]
        assert 0 < row["peak_rss_bytes"] <= row["budget_bytes"]
        assert row["slots"] == 12
        assert 0 <= row["simulated_hit_rate"] <= 1
        assert row["simulated_decode_tokens_per_s"] > 0
        assert row["belady_hit_rate"] >= cells["on-demand"]["simulated_hit_rate"]
    base = cells["on-demand"]
    assert abs(base["simulated_hit_rate"] - base["hit_rate"]) < 0.05
    assert base["simulated_reads_over_belady"] >= 1
    assert cells["auto"]["agreement"] == 1
    assert cells["auto"]["nll"] == cells["auto"]["nll_plain"]
    assert cells["on-demand"]["degraded_share"] == 0
    assert 0 < cells["random"]["degraded_share"] < 1
    assert cells["random"]["bytes_read_per_token"] == 0
    assert cells["random"]["nll"] != cells["random"]["nll_plain"]
    assert {row["task"] for row in document["tasks"]} == {"a", "b"}
    assert [row["preset"] for row in document["refused"]] == ["popular"]
    assert "no profile of" in document["refused"][0]["reason"]
    assert len(document["foresight"]) == 3  # four layers, the first one is not foretold
    text = (tmp_path / "compare.html").read_text()
    assert "no profile of" in text
    assert "Never worse than on-demand" in (tmp_path / "compare.md").read_text()


def test_the_order_rotates(call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
    done = call(*command, "--presets", "random", "--runs", 3, "--out", tmp_path)
    assert done.code == 0, done.err
    lines = [line for line in done.err.splitlines() if line.startswith("live: ")]
    took = [line.removeprefix("live: ").partition(",")[0] for line in lines]
    names = ["auto", "on-demand", "random"]
    assert took == [*names, *names[1:], names[0], *names[2:], *names[:2]]


def falling(after: int, how: Any) -> Any:
    """`live._run`, but at its call number `after` something else happens first."""
    run, calls = live._run, []

    def fall(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == after:
            how()
        return run(*arguments)

    return fall


def leave() -> None:
    raise SystemExit


def test_a_killed_run_goes_on(
    call: Call, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells that were finished are not measured again, and keep what was found."""
    line = (*command, "--presets", "auto", "--runs", 2, "--out", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(live, "_run", falling(6, leave))
        with pytest.raises(SystemExit):
            call(*line)
    kept = json.loads((tmp_path / "live.json").read_text())["cells"]
    assert [key.partition(",")[0] for key in kept] == ["auto", "on-demand"]
    done = call(*line, "--json")
    assert done.code == 0, done.err
    assert all(f"live: {key}" not in done.err for key in kept)
    assert "live: auto, 2GiB, 40%, None, run 2" in done.err
    now = json.loads((tmp_path / "live.json").read_text())["cells"]
    assert all(now[key] == rows for key, rows in kept.items())
    assert "live: " not in call(*line).err  # nothing is left to do
    more = call(*line[:-4], "--runs", 3, "--out", tmp_path)
    assert more.err.count("live: ") == 2  # what is there counts for a larger comparison
    assert call(*line, "--fresh").err.count("live: ") == 4


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_an_interrupted_run_has_a_report(
    call: Call, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_run", falling(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    done = call(*command, "--presets", "auto", "--runs", 2, "--out", tmp_path)
    assert done.code == 1
    assert f"error: stopped by SIGTERM; what was measured is in `{tmp_path}" in done.err
    assert "hint: the same command goes on" in done.err
    document = json.loads((tmp_path / "compare.json").read_text())
    assert [row["preset"] for row in document["cells"]] == ["auto"]
    assert document["cells"][0]["runs"] == 1


def test_another_setting_is_another_comparison(
    call: Call, command: tuple[object, ...], tmp_path: Path
) -> None:
    line = (*command, "--presets", "auto", "--runs", 1, "--out", tmp_path)
    assert call(*line).code == 0
    refused(call(*line, "--per-task", 2), 2, "measured with another texts")
    (tmp_path / "live.json").write_text("{}")
    refused(call(*line), 2, "cannot read")
    assert call(*line, "--fresh").code == 0


@pytest.mark.parametrize(
    ("option", "value", "what"),
    [
        ("--presets", "fast", "unknown preset: `fast`"),
        ("--runs", "0", "runs is out of range: `0`"),
        ("--read-limits", "quick", "not a size: `quick`"),
        ("--experts", "some", "not a size: `some`"),
        ("--memory", ",", "an empty list: `,`"),
        ("--data", "nowhere.jsonl", "cannot read `nowhere.jsonl`"),
    ],
)
def test_wrong_values(
    call: Call, command: tuple[object, ...], option: str, value: str, what: str
) -> None:
    refused(call(*command, option, value), 2, what)


def test_several_budgets_and_disks(call: Call, command: tuple[object, ...], tmp_path: Path) -> None:
    places = ("--memory", "1GiB,2GiB", "--experts", "40%,50%", "--read-limits", "none,1GB")
    done = call(*command, *places, "--presets", "auto", "--runs", 1, "--out", tmp_path, "--json")
    assert done.code == 0, done.err
    where = [(row["memory"], row["experts"], row["read_limit"]) for row in done.document["cells"]]
    assert len(set(where)) == 8
    assert len(where) == 16
    verdicts = {row.get("decode_verdict") for row in done.document["cells"]}
    assert verdicts == {None}  # one run has no spread
    assert "No verdict" in (tmp_path / "compare.md").read_text()


def test_the_default_presets_are_the_exact_ones_and_one_more() -> None:
    from retinue.compare.grid import references

    assert set(references(None)) == {n for n, row in PRESETS.items() if row.exact} | {"emoe-fetch"}
