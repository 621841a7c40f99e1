"""`retinue bench`: the same work every time, counted and set against the machine's limits."""

import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import models
from command import BOUND_KEYS, MEMORY, STATS_KEYS, Call, caller, refused
from retinue.cli import bench
from retinue.engine.llm import LLM
from retinue.engine.request import Request
from retinue.memory.machine import Rate
from retinue.types import Stats

BENCH_KEYS = {
    "model",
    "preset",
    "resolved_preset",
    "precision",
    "threads",
    "prompt_tokens",
    "new_tokens",
}
PARTS = ("stall", "expert", "dense", "overhead")
GB = 10**9


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings before and after: 1 and 3 GB/s of the disk, 10 and 10 of memory."""
    disk: Iterator[float] = iter([1.0 * GB, 3.0 * GB] * 9)
    monkeypatch.setattr(bench, "measure_disk", lambda files: next(disk))
    monkeypatch.setattr(bench, "measure_memory", lambda **settings: 10.0 * GB)
    rates = {"bfloat16": Rate(10.0 * GB, 1e12)}
    monkeypatch.setattr(bench, "known_rates", lambda *_, **__: rates)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests that ran."""
    seen: list[Request] = []
    run = LLM.run

    def recording(llm: LLM, request: Request) -> Iterator[str]:
        seen.append(request)
        return run(llm, request)

    monkeypatch.setattr(LLM, "run", recording)
    return seen


def test_bench_of_the_sample(call: Call) -> None:
    work = ("--prompt-tokens", 20, "--new-tokens", 5)
    done = call("bench", "sample", *MEMORY, "--threads", 1, *work, "--json")
    assert done.code == 0
    assert len(done.out.splitlines()) == 1
    document = done.document
    assert set(document) >= BENCH_KEYS | STATS_KEYS | BOUND_KEYS
    expected = ["sample", "auto", "as-is", 1, 20, 5, "auto"]
    assert [document[key] for key in document if key in BENCH_KEYS] == expected
    # As many decode steps as new tokens: in each, 8 layers look up 4 experts.
    assert document["hits"] + document["pending"] + document["misses"] == 5 * 8 * 4
    assert document["decode_tokens_per_s"] * document["decode_s"] == pytest.approx(5)
    assert document["prefill_tokens_per_s"] * document["prefill_s"] == pytest.approx(20)
    assert document["disk_bytes_per_s"] == 2 * GB
    assert document["memory_bytes_per_s"] == 10 * GB
    band = document["expected_decode_tokens_per_s"]
    assert 0 < band["low"] < band["high"]
    share = document["decode_tokens_per_s"] / document["bound_tokens_per_s"]
    assert document["share_of_bound"] == pytest.approx(share)
    for phase in ("", "prefill_"):
        seconds = document["prefill_s" if phase else "decode_s"]
        parts = [document[f"{phase}{part}_s"] for part in PARTS]
        assert sum(parts) == pytest.approx(seconds)
        assert min(parts) >= 0
        assert min(parts[1:]) > 0
    for said in ("20 tokens of prompt", "1.00 and 3.00 GB/s", "256 experts resident"):
        assert said in done.err


def test_the_clock_starts_when_every_slot_was_touched(
    call: Call, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, quick = threading.Event(), list[bool]()
    memset, fill, run = ctypes.memset, LLM.fill, LLM.run

    def slow(address: int, value: int, count: int) -> int:
        loaded.wait(20)
        time.sleep(0.02)
        return memset(address, value, count)

    def filling(llm: LLM) -> None:
        loaded.set()
        fill(llm)

    def recording(llm: LLM, request: Request) -> Iterator[str]:
        tier = llm.assembly.tier
        quick.append(tier.quick == tier.free)
        return run(llm, request)

    monkeypatch.setattr(ctypes, "memset", slow)
    monkeypatch.setattr(LLM, "fill", filling)
    monkeypatch.setattr(LLM, "run", recording)
    assert call("bench", olmoe, *MEMORY, "--experts", "50%", "--new-tokens", 1).code == 0
    assert quick == [True]


def test_the_same_work_whatever_is_resident(
    call: Call, olmoe: Path, requests: list[Request]
) -> None:
    """Random ids, seeded, in the prompt and in decode; no tokenizer is needed."""
    for share in ("100%", "25%"):
        done = call("bench", olmoe, *MEMORY, "--experts", share, "--new-tokens", 7)
        assert done.code == 0, done.err
        assert "tokens/s" in done.out
        assert done.err == ""
    first, second = requests
    assert (first.prompt, first.token_ids) == (second.prompt, second.token_ids)
    assert len(first.prompt) == 64
    assert len(first.token_ids) == 8  # the first one comes with the prefill
    assert len(set(first.token_ids)) > 4
    call("bench", olmoe, *MEMORY, "--new-tokens", 7, "--seed", 5)
    assert requests[2].prompt != first.prompt
    assert requests[2].token_ids != first.token_ids


def test_where_all_experts_fit_they_are_read_before_the_clock_starts(
    call: Call, olmoe: Path
) -> None:
    work = ("--prompt-tokens", 9, "--new-tokens", 2, "--json")
    whole = call("bench", olmoe, *MEMORY, *work).document
    assert whole["resident_experts"] == whole["total_experts"]
    assert (whole["prefill_bytes_read"], whole["misses"], whole["pending"]) == (0, 0, 0)
    some = call("bench", olmoe, *MEMORY, *work, "--experts", "50%").document
    assert some["prefill_bytes_read"] > 0


def test_a_limit_of_reads_is_the_disks_ceiling(call: Call, olmoe: Path) -> None:
    """Measured: 1 and 3 GB/s. With 2 GB/s for both, the first one is the slower still."""
    work = ("--prompt-tokens", 9, "--new-tokens", 2, "--experts", "50%", "--json")
    for limit, ceiling in (("2GB", 1.5 * GB), ("50MB", 0.05 * GB)):
        done = call("bench", olmoe, *MEMORY, *work, "--read-limit", limit)
        assert done.document["disk_bytes_per_s"] == ceiling
    read = done.document["prefill_bytes_read"] + done.document["bytes_read"]
    seconds = done.document["prefill_s"] + done.document["decode_s"]
    assert seconds > 0.9 * read / (0.05 * GB) > 0


def test_no_decode_has_no_bound(call: Call, olmoe: Path) -> None:
    done = call("bench", olmoe, *MEMORY, "--prompt-tokens", 9, "--new-tokens", 0, "--json")
    assert done.code == 0
    assert done.document["decode_s"] == 0
    assert not {"bound_tokens_per_s", "share_of_bound"} & set(done.document)
    assert done.document["disk_bytes_per_s"] == 2 * GB


def test_prompts_from_a_file(call: Call, tmp_path: Path, requests: list[Request]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("A: Hello there!\n\nSELECT name FROM\n", encoding="utf-8")
    done = call("bench", "sample", *MEMORY, "--prompts", file, "--new-tokens", 3, "--json")
    assert done.code == 0, done.err
    with models.open_llm("sample") as llm:
        expected = [llm.encode("A: Hello there!"), llm.encode("SELECT name FROM")]
    assert [request.prompt for request in requests] == expected
    assert done.document["prompt_tokens"] == len(expected[-1])


def test_prompts_that_cannot_be_used(call: Call, olmoe: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    done = call("bench", "sample", *MEMORY, "--prompts", file)
    assert done.code == 2
    assert "cannot read" in done.err
    file.write_text("\n \n")
    refused(call("bench", "sample", *MEMORY, "--prompts", file), 2, "no prompts in")
    file.write_text("hello")
    refused(call("bench", olmoe, *MEMORY, "--prompts", file), 2, "no tokenizer")


def test_the_table_of_where_the_time_went() -> None:
    stats = Stats(
        prefill_s=4.0,
        prefill_expert_s=3.0,
        prefill_dense_s=0.5,
        decode_s=10.0,
        stall_s=1.0,
        expert_s=5.0,
        dense_s=3.0,
        share_of_bound=0.8,
    )
    head, prefill, decode = bench._where(stats).splitlines()
    assert head.split()[-4:] == ["stall", "experts", "dense", "overhead"]
    assert prefill.split() == [
        *("prefill", "4.00", "0.00", "(0%)", "3.00", "(75%)", "0.50", "(12%)", "0.50", "(12%)")
    ]
    assert decode.split()[1:5] == ["10.00", "8.00", "1.00", "(10%)"]
    assert decode.split()[-2:] == ["1.00", "(10%)"]
    assert bench._where(Stats()).splitlines()[2].split() == ["decode", "0.00"]


@pytest.mark.parametrize(
    "work", [("--prompt-tokens", 0), ("--new-tokens", -1), ("--prompt-tokens", 2048)]
)
def test_work_that_cannot_be_done(call: Call, work: tuple[str, int]) -> None:
    refused(call("bench", "sample", *MEMORY, *work), 2, "is out of range")


def test_prompts_are_as_long_as_they_are(call: Call) -> None:
    done = call("bench", "sample", "--prompts", "some.txt", "--prompt-tokens", 5)
    refused(done, 2, "`--prompt-tokens` is of no use with `--prompts`")


def test_a_context_too_short_for_the_work_is_refused(
    call: Call, olmoe: Path, tmp_path: Path
) -> None:
    """Otherwise fewer steps would run than the result says."""
    work = ("--prompt-tokens", 20, "--new-tokens", 10)
    done = call("bench", olmoe, *MEMORY, *work, "--context", 31, "--json")
    assert done.code == 0, done.err
    lookups = done.document["hits"] + done.document["pending"] + done.document["misses"]
    assert lookups == 10 * models.LAYERS * models.TOP_K
    done = call("bench", olmoe, *MEMORY, *work, "--context", 30, "--json")
    refused(done, 2, "20 tokens of prompt and 10 new ones")
    file = tmp_path / "prompts.txt"
    file.write_text("A: Hello there!")
    options = ("--prompts", file, "--new-tokens", 60, "--context", 64)
    refused(call("bench", "sample", *MEMORY, *options), 2, "60 new ones")


def test_a_peak_over_the_budget_is_said(
    call: Call, olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for peak, warned in ((1 << 20, False), (9 * GB, True)):
        monkeypatch.setattr("retinue.engine.llm.resident_bytes", lambda peak, n=peak: n)
        done = call("bench", olmoe, *MEMORY, "--prompt-tokens", 4, "--new-tokens", 1)
        assert ("the peak is over the budget" in done.err) is warned


def test_memory_is_measured_again_over_resident_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing new is allocated; where too little is resident, the first measurement stays."""
    seen: list[int] = []

    def measure(*, threads: int, arrays: list[object]) -> float:
        seen.append(len(arrays))
        return 7.0

    monkeypatch.setattr(bench, "measure_memory", measure)
    before = bench.Speeds(1.0, 5.0)
    with models.open_llm("sample") as llm:
        llm.generate([5, 6, 7], models.greedy(2))
        assert bench._memory_again(llm, 1, before) == 5.0
        monkeypatch.setattr(llm.assembly.tier, "slot_bytes", 64 << 20)
        monkeypatch.setattr(llm.assembly.tier, "tensor", lambda slot: llm.assembly.tier.slab[:64])
        assert bench._memory_again(llm, 2, before) == 7.0
        resident = llm.assembly.cache.resident
        monkeypatch.undo()
    assert seen == [resident // 2 * 2]
