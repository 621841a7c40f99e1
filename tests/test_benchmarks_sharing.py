"""`batch` and `second-turn`: their commands, their rows from canned runs, a run on a tiny shape."""

from pathlib import Path
from typing import Any

import pytest
from benchmarks import shapes, sharing, sharing_child
from benchmarks.checkpoint import Checkpoint, inspect
from benchmarks.child import ChildFailedError
from benchmarks.results import Document
from benchmarks.setting import Setting

GIB = 1 << 30
TINY = shapes.Shape(64, 48, layers=2, heads=4, experts=8, top_k=2, vocabulary=512)
SMALL = Checkpoint(Path("small"), "olmoe", 1000, 800, experts=16, top_k=2)


def setting(checkpoint: Checkpoint = SMALL, **counts: Any) -> Setting:
    return Setting(checkpoint, GIB, runs=1, small=lambda: SMALL, **counts)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("shapes") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shapes.SHAPES, "tiny", TINY)
        shapes.write("tiny", folder)
    return inspect(folder)


# --- commands


def test_the_child_knows_its_commands() -> None:
    counts = {"prompt_tokens": 5, "new_tokens": 3}
    parser = sharing_child.build_parser()
    words = sharing.batch_command(setting(), 1, **counts)
    options = parser.parse_args(words[3:])
    assert words[1:3] == ["-m", "benchmarks.sharing_child"]
    assert options.measure is sharing_child.measure_batch
    assert (options.batch, options.requests) == (1, 8)
    assert (options.checkpoint, options.memory) == (Path("small"), str(GIB))
    assert (options.prompt_tokens, options.new_tokens) == (5, 3)
    for afresh in (True, False):
        words = sharing.turns_command(setting(), afresh=afresh, **counts)
        options = parser.parse_args(words[3:])
        assert options.measure is sharing_child.measure_turns
        assert (options.afresh, options.added_tokens) == (afresh, 32)


def test_prompts_differ_in_length() -> None:
    found = sharing_child.lengths(8, 64)
    assert (found[0], found[-1], len(set(found))) == (16, 64, 8)
    assert found == sorted(found)
    assert sharing_child.lengths(8, 1) == [1] * 8
    assert sharing_child.lengths(1, 64) == [64]


# --- rows, with canned runs


def canned_batch(command: list[str]) -> Document:
    together = command[command.index("--batch") + 1] == "8"
    run = {"peak_rss_bytes": 90, "budget_bytes": 100, "resident_experts": 3, "total_experts": 8}
    if together:
        return run | {"decode_tokens_per_s": 30.0, "answers_s": 2.0, "token_ids": [[1]] * 8}
    other = [[1]] * 7 + [[2]]
    return run | {"decode_tokens_per_s": 10.0, "answers_s": 8.0, "token_ids": other}


def test_together_against_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "timed", canned_batch)
    report = sharing.batch(setting())
    assert [(row.what, row.ratio, row.ok) for row in report.rows] == [
        ("decode", 3.0, None),
        ("prompts and answers", 4.0, None),
        ("peak memory", pytest.approx(100 / 90), True),
    ]
    assert "90 B of 100 B, with 3 of 8 experts" in report.notes[0]
    assert report.notes[1].startswith("7 of 8 answers")


def test_a_peak_over_the_budget_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sharing, "timed", lambda command: canned_batch(command) | {"peak_rss_bytes": 101}
    )
    assert [row.ok for row in sharing.batch(setting()).rows] == [None, None, False]


def test_ours_stays_where_the_other_side_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> Document:
        if command[command.index("--batch") + 1] == "1":
            raise ChildFailedError(command, 1, "no such thing")
        return canned_batch(command)

    monkeypatch.setattr(sharing, "timed", run)
    report = sharing.batch(setting())
    assert [row.what for row in report.rows] == ["peak memory"]
    assert report.notes[-1].startswith("one at a time is left out")


def test_second_turn_against_the_first_and_against_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str]) -> Document:
        second = 4.0 if "--afresh" in command else 0.5
        counts = {"second_prompt_tokens": 1048, "reused_tokens": 1008}
        return counts | {"first_turn_s": 5.0, "second_turn_s": second}

    monkeypatch.setattr(sharing, "timed", run)
    report = sharing.second_turn(setting())
    found = [(row.ours, row.against, row.ratio) for row in report.rows]
    assert found == [(0.5, "first turn", 10.0), (0.5, "computed afresh", 8.0)]
    assert report.notes == ["1008 of the second turn's 1048 tokens were reused"]


# --- real runs


@pytest.mark.slow
def test_eight_requests_on_a_tiny_shape(tiny: Checkpoint) -> None:
    report = sharing.batch(setting(tiny, prompt_tokens=16, new_tokens=4))
    assert [row.what for row in report.rows] == ["decode", "prompts and answers", "peak memory"]
    assert all(row.ours > 0 and row.other > 0 for row in report.rows)
    (mine,), (other,) = report.runs["ours"], report.runs["one at a time"]
    # The first token of an answer comes from the prompt's pass.
    assert mine["decode_tokens"] == other["decode_tokens"] == 8 * 3
    assert (mine["decode_passes"], other["decode_passes"]) == (3, 8 * 3)
    assert [len(ids) for ids in mine["token_ids"]] == [4] * 8
    assert mine["resident_experts"] == other["resident_experts"]
    assert 0 < mine["decode_s"] < mine["answers_s"] < mine["wall_s"]
    assert mine["budget_bytes"] == GIB


@pytest.mark.slow
def test_two_turns_on_a_tiny_shape(tiny: Checkpoint) -> None:
    report = sharing.second_turn(setting(tiny, prompt_tokens=64, new_tokens=4))
    (mine,), (other,) = report.runs["ours"], report.runs["afresh"]
    assert (mine["first_prompt_tokens"], mine["second_prompt_tokens"]) == (64, 64 + 4 + 32)
    assert (mine["reused_tokens"], other["reused_tokens"]) == (64, 0)
    assert all(row.ours > 0 and row.other > 0 for row in report.rows)
