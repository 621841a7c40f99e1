"""`retinue simulate`: the table, the document, what it refuses, and what it advises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command import Call, caller, refused
from recordings import HEAD, chance, setting, trace_of
from retinue.cli import simulated
from retinue.config import Config
from retinue.memory.machine import Speeds
from retinue.model.profiles import read_profile
from retinue.policy.presets import PRESETS
from retinue.sim.cells import Cell
from retinue.sim.recommend import Advice, Try

TIMES = ("--expert-time", "1e-4", "--layer-time", "2e-4", "--disk", "1MB")
KEYS = (
    *("hit_rate", "pending_rate", "miss_rate", "stall_s", "bytes_read_per_token"),
    *("degraded_share", "hit_rate_below_belady", "reads_over_belady", "decode_tokens_per_s"),
)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def traced(tmp_path: Path) -> Path:
    requests = [chance(seed, 30, prompt=6) for seed in range(3)]
    return trace_of(tmp_path / "a.trace", requests, ("scores", "next_scores")).file


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """A profile of the traced model, which knows no expert as better than another."""
    file = tmp_path / "profile.json"
    zeros = [[0] * 8] * 3
    counts = {"texts": 1, "tokens": 1, "popularity": {"choices": zeros, "weight": zeros}}
    head = {"format": "retinue-profile", "version": 1, "model": "by-chance"}
    shape = {"layers": 3, "experts": 8, "top_k": 2, "tasks": {"a": counts}}
    file.write_text(json.dumps(head | shape))
    return file


def test_every_preset_that_the_trace_can_replay(call: Call, traced: Path) -> None:
    done = call("simulate", traced, "--experts", "40%", *TIMES, "--json")
    assert done.code == 0, done.err
    document = done.document
    rows, left_out = document["presets"], document["left_out"]
    assert rows.keys() | left_out.keys() == PRESETS.keys()
    assert not rows.keys() & left_out.keys()
    assert "profile" in left_out["popular"]
    assert "retinue train-predictor" in left_out["promoe"]
    for row in rows.values():
        assert set(KEYS) <= row.keys()
    assert document["belady"] == rows["belady"]
    assert rows["belady"]["reads_over_belady"] == 1
    assert (document["slots"], document["experts"]) == (9, "40%")
    assert not rows["random"]["exact"]
    assert rows["random"]["degraded_share"] > 0
    assert "recorded scores" in rows["random"]["notes"][0]
    for name, row in rows.items():
        if row["exact"]:
            assert row["degraded_share"] == 0
            assert rows["belady"]["misses"] <= row["misses"] + row["pending"], name
    assert "over belady" in done.err


def test_a_second_place_that_computes(call: Call, traced: Path, profile: Path) -> None:
    """Where a second place computes faster than the disk reads, Fiddler sends all misses there."""
    names = ("--presets", "fiddler,freetoken,on-demand", "--profile", profile)
    asked = ("simulate", traced, "--experts", "40%", *TIMES, *names, "--json")
    alone = call(*asked).document["presets"]
    quick = call(*asked, "--elsewhere-time", "1e-4").document["presets"]
    slow = call(*asked, "--elsewhere-time", "100").document["presets"]
    for name in ("fiddler", "freetoken"):
        assert quick[name]["bytes_read_per_token"] < alone[name]["bytes_read_per_token"]
        assert quick[name]["decode_tokens_per_s"] > alone[name]["decode_tokens_per_s"]
    assert slow["fiddler"] == alone["fiddler"], "nothing is sent where that takes longer"
    assert quick["on-demand"] == alone["on-demand"] == slow["on-demand"]


def test_a_trace_without_signals(call: Call, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "a.trace", [chance(0, 30, prompt=6)])
    done = call("simulate", trace.file, "--experts", "40%", *TIMES, "--json")
    assert done.code == 0, done.err
    assert set(done.document["presets"]) >= {"on-demand", "layer-stream", "belady"}
    assert done.document["left_out"]["auto"] == "needs a trace with `next_scores`"
    assert "needs a trace with `next_scores`" in done.err


def test_what_a_trace_lacks_of_what_a_preset_asks_is_said(call: Call, tmp_path: Path) -> None:
    """`auto` learns from what routers say in their turn, and does without where nobody wrote it."""
    file = trace_of(tmp_path / "a.trace", [chance(1, 30, prompt=6)], ("next_scores",)).file
    options = (file, "--experts", "40%", "--presets", "auto,on-demand", *TIMES, "--json")
    done = call("simulate", *options)
    assert done.code == 0, done.err
    text = "asks routers for more than the trace has, which lacks `scores`"
    assert done.err.count(f"auto {text}") == 1
    assert "on-demand asks" not in done.err
    rows = done.document["presets"]
    assert rows["auto"]["notes"] == [text]
    assert not rows["on-demand"]["notes"]


def test_rooms_and_disks_are_cells(call: Call, traced: Path) -> None:
    words = ("--presets", "on-demand, auto", "--experts", "25%,50%", *TIMES[:-1], "500KB,5MB")
    done = call("simulate", traced, *words, "--json")
    assert done.code == 0, done.err
    cells = done.document["cells"]
    places = [(cell["experts"], cell["slots"], cell["disk_bytes_per_s"]) for cell in cells]
    assert places == [("25%", 6, 5e5), ("25%", 6, 5e6), ("50%", 12, 5e5), ("50%", 12, 5e6)]
    assert done.document["presets"] == cells[0]["presets"]
    assert set(cells[0]["presets"]) == {"on-demand", "auto", "belady"}
    speeds = [cell["presets"]["on-demand"]["decode_tokens_per_s"] for cell in cells]
    assert speeds[0] < speeds[1]
    assert speeds[0] < speeds[2] < speeds[3]


def test_requests_together_and_by_chance(call: Call, traced: Path) -> None:
    words = ("simulate", traced, "--presets", "on-demand", "--experts", "50%", *TIMES, "--json")
    alone = call(*words).document["presets"]["on-demand"]
    together = call(*words, "--batch", 3).document["presets"]["on-demand"]
    assert together["seconds"] < alone["seconds"]
    done = call(*words, "--rate", 0.01, "--seed", 3)
    assert done.code == 0, done.err
    assert done.document["presets"]["on-demand"]["first_token_s"] < alone["first_token_s"]
    assert "depends on the speed" in done.document["left_out"]["belady"]
    assert done.document["belady"] == {}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--presets", "nobody"), 2, "unknown preset: `nobody`"),
        (("--experts", "1%"), 2, "one token needs 2 at once"),
        (("--experts", "many"), 2, "not a size: `many`"),
        (("--experts", "50%", "--disk", "0"), 2, "disk is out of range"),
        (("--rate", "0"), 2, "rate is out of range"),
        (("--layer-time", "-1"), 2, "a time is out of range: `-1.0`"),
        (("--latency", "nan"), 2, "a time is out of range: `nan`"),
        (("--pass-time", "inf"), 2, "a time is out of range: `inf`"),
        (("--expert-size", "0"), 2, "expert_size is out of range: `0`"),
        (("--bus", "0"), 2, "bus is out of range: `0`"),
        (("--presets", "popular,emoe"), 3, "no preset of `popular,emoe` can be replayed"),
        (("--model", "no/such/model/here"), 2, "no such model here"),
        (("--bench", "none.json"), 2, "cannot read `none.json`"),
        (("--context", "64"), 2, "`--context` is of no use where `--experts` alone says what fits"),
        (("--memory", "1KiB"), 3, "does not fit"),
    ],
)
def test_wrong_options(
    call: Call, traced: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    known = dict(zip(TIMES[::2], TIMES[1::2], strict=True)) | {"--experts": "40%"}
    if "--memory" in words:
        del known["--experts"]
    known |= dict(zip(words[::2], words[1::2], strict=True))
    flat = [word for pair in known.items() for word in pair]
    refused(call("simulate", traced, *flat), code, message)


def test_what_only_recommend_asks_for(call: Call, traced: Path) -> None:
    done = call("simulate", traced, "--experts", "40%", *TIMES, "--allow-approximate")
    refused(done, 2, "`--allow-approximate` is of no use without `--recommend`")


def test_the_room_may_come_from_the_environment(
    call: Call, traced: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINUE_EXPERTS", "40%")
    done = call("simulate", traced, *TIMES, "--presets", "on-demand")
    assert done.code == 0, done.err
    assert done.out.startswith("40%: room for 9 experts")


def test_damaged_traces(call: Call, traced: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.trace"
    whole = traced.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        words = ("simulate", cut, "--experts", "40%", *TIMES)
        refused(call(*words), 2, "cannot read the trace")
    refused(call("simulate", tmp_path / "none", *TIMES), 2, "cannot read the trace")
    empty = trace_of(tmp_path / "empty.trace", [])
    refused(call("simulate", empty.file, "--experts", "40%", *TIMES), 2, "has no tokens")
    sums = trace_of(tmp_path / "sums.trace", [chance(0, 9)], detail="histogram")
    refused(call("simulate", sums.file, "--experts", "40%", *TIMES), 2, "only sums")


def test_an_old_trace_needs_the_size_of_experts(call: Call, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "a.trace", [chance(0, 30, prompt=6)], facts=None, read_bytes=0)
    words = ("simulate", trace.file, "--experts", "50%", *TIMES, "--json")
    refused(call(*words), 2, "does not say how large experts are")
    done = call(*words, "--expert-size", "1KB")
    assert done.code == 0, done.err
    assert done.document["read_bytes"] == 1000


def test_times_from_a_run_of_bench(call: Call, traced: Path, tmp_path: Path) -> None:
    def bench() -> Path:
        stats = {
            "preset": "on-demand",
            "decode_tokens_per_s": 10.0,
            "decode_s": 10.0,
            "hits": 400,
            "pending": 0,
            "misses": 200,
            "expert_s": 0.6,
            "dense_s": 0.3,
            "overhead_s": 0.3,
            "stall_s": 0.5,
            "reads": 200,
            "lacking": 200,
            "looks": 0,
            "late_s": 1e-3,
            "start_s": 1e-3,
            "expand_s": 2e-3,
            "read_latency_s": 3e-4,
            "reads_bytes_per_s": 2e6,
            "prompt_tokens": 11,
            "prefill_expert_s": 0.1,
            "prefill_dense_s": 0.2,
            "prefill_overhead_s": 0.1,
        }
        file = tmp_path / "bench.json"
        file.write_text("something else\n" + json.dumps(stats))
        return file

    words = ("simulate", traced, "--experts", "50%", "--disk", "1MB", "--json")
    words += ("--presets", "on-demand,auto", "--bench", str(bench()))
    done = call(*words)
    assert done.code == 0, done.err
    times = done.document["times"]
    # Of 0.6 s for 600 experts 200 layers that lacked some took 0.2 s more; of 0.6 s for 300 layers
    # 200 reads took 0.2 s.
    assert (times["late_s"], times["start_s"], times["ahead_s"]) == (1e-3, 1e-3, 0)
    assert times["expand_s"] == 2e-3
    assert times["expert_s"] == pytest.approx(0.4 / 600)
    assert times["layer_s"] == pytest.approx(0.4 / 300)
    assert done.document["latency_s"] == 3e-4
    assert done.document["disk_bytes_per_s"] == 1e6
    (tmp_path / "none.json").write_text("{}")
    refused(call(*words[:-2], "--bench", str(tmp_path / "none.json")), 2, "not a document")


def test_the_machine_is_asked_where_nothing_is_given(
    call: Call, traced: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = call("simulate", traced, "--experts", "50%", "--disk", "1MB")
    refused(done, 3, "nobody measured how fast this machine computes")
    refused(call("simulate", traced, "--experts", "50%", *TIMES[:4]), 3, "nobody measured how fast")


def test_it_needs_no_torch(traced: Path) -> None:
    words = ["simulate", str(traced), "--experts", "40%", *TIMES, "--json"]
    code = (
        "import sys; from retinue.cli.main import main;"
        f"code = main({words!r}); assert code == 0;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["presets"]


def test_costs_of_one_run_recommend_nobody(call: Call, traced: Path, profile: Path) -> None:
    before = profile.read_bytes()
    words = ("simulate", traced, "--experts", "40%", *TIMES, "--recommend", "--json")
    done = call(*words, "--profile", profile, "--allow-approximate")
    assert done.code == 0, done.err
    (advice,) = done.document["recommended"]
    assert (advice["preset"], advice["margin"]) == ("auto", 0)
    assert advice["share"] == pytest.approx(9 / 24)
    assert "costs of too few runs to tell presets apart (0)" in advice["why_not"][0]
    assert "nothing is kept; hint: `retinue compare" in done.err
    assert profile.read_bytes() == before


def test_a_trace_that_the_default_cannot_replay(call: Call, tmp_path: Path) -> None:
    trace = trace_of(tmp_path / "a.trace", [chance(0, 30, prompt=6)])
    words = ("simulate", trace.file, "--experts", "40%", *TIMES, "--recommend")
    refused(call(*words), 2, "`auto` cannot be replayed")


def comparison(folder: Path, *, live: float = 2.0, precision: str = "as-is") -> Path:
    """Three runs in which looking ahead costs `auto` a hundred times what its reads are worth.

    Live, `on-demand` was `live` times as fast.
    """
    rows = []
    for run in range(3):
        for name, looks, overhead_s in (("on-demand", 0, 0.3), ("auto", 200, 300.0)):
            speed = 10.0 * (live if name == "on-demand" else 1.0)
            stats = {
                "preset": name,
                "exact": True,
                "memory": "1GiB",
                "experts": "40%",
                "read_limit": "1MB",
                "run": run,
                "slots": 9,
                "decode_tokens_per_s": speed,
                "prefill_tokens_per_s": 10 * speed,
                "decode_s": 100.0 / speed,
                "hits": 400,
                "pending": 0,
                "misses": 200,
                "expert_s": 0.6,
                "dense_s": 0.3,
                "overhead_s": overhead_s,
                "reads": 200,
                "lacking": 200,
                "looks": looks,
                "read_latency_s": 3e-4,
                "reads_bytes_per_s": 1e6,
                "texts": 1,
                "prefill_tokens": 11,
                "prefill_expert_s": 0.1,
                "prefill_dense_s": 0.2,
                "prefill_overhead_s": 0.1,
            }
            rows.append(stats)
    content = {"setting": {"precision": precision}, "cells": {"all": rows}, "left_out": {}}
    folder.mkdir()
    (folder / "live.json").write_text(json.dumps(content | {"done": True}))
    return folder


def test_who_is_surely_better_is_remembered(
    call: Call, traced: Path, profile: Path, tmp_path: Path
) -> None:
    words = ("simulate", traced, "--experts", "40%", "--recommend", "--json")
    better = comparison(tmp_path / "better")
    done = call(*words, "--compared", better, "--profile", profile)
    assert done.code == 0, done.err
    (advice,) = done.document["recommended"]
    assert (advice["preset"], advice["why_not"]) == ("on-demand", [])
    assert advice["margin"] > 1
    assert f"written to {profile}" in done.err
    (kept,) = read_profile(profile).recommended
    assert (kept.preset, kept.disk_bytes_per_s) == ("on-demand", 1e6)
    call(*words, "--compared", better, "--profile", profile)
    assert len(read_profile(profile).recommended) == 1, "one place, one entry"
    assert "no profile to keep this in" in call(*words, "--compared", better).err
    denied = comparison(tmp_path / "denied", live=0.9)
    done = call(*words, "--compared", denied, "--profile", profile)
    (advice,) = done.document["recommended"]
    assert advice["preset"] == "auto", "live it was slower"
    assert "but live it was 0.90 to 0.90 times as fast" in advice["why_not"][0]
    (kept,) = read_profile(profile).recommended
    assert kept.preset == "auto", "what was written before is gone"


def test_what_a_comparison_cannot_be_used_for(call: Call, traced: Path, tmp_path: Path) -> None:
    folder = comparison(tmp_path / "a", precision="int8")
    words = ("simulate", traced, "--experts", "40%", "--compared")
    refused(call(*words, folder), 2, "was measured with another precision")
    refused(call(*words, tmp_path / "none"), 2, "has no runs of `on-demand`")
    again = comparison(tmp_path / "b")
    refused(call(*words, again, "--disk", "1MB"), 2, "says this already: `--disk`")


def test_a_disk_as_it_is_is_remembered_as_auto_will_find_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`auto` compares with what `plan` measures, large blocks; experts may come far slower."""
    monkeypatch.setattr(simulated, "known_speeds", lambda folder: Speeds(5e9, 4e10))
    known = simulated.Known(HEAD, "sample", Config())
    cell, best = Cell("50%", setting(12, disk=1e9)), Try("promoe", None, 1.0, 10.0)
    advice = Advice(best, 0.1, (best,))
    entry = known.entry(cell, advice, here=True)
    assert (entry.disk_bytes_per_s, entry.share, entry.preset) == (5e9, 0.5, "promoe")
    assert known.entry(cell, advice, here=False).disk_bytes_per_s == 1e9
