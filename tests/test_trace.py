"""Traces: what is written is read again, damage and other models are refused, nothing half-made."""

import json
import zipfile
from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from command import MEMORY, Call, caller, refused
from retinue.errors import Cancelled, UsageError, WriteError
from retinue.trace import (
    AHEAD,
    SIGNALS,
    Routed,
    Trace,
    TraceHead,
    TraceWriter,
    append,
    check_same_model,
    routed_of,
)
from retinue.types import Facts
from test_cli_eval import write

HEAD = TraceHead("tiny", 5, 8, 2, (1, 3, 4))
TINY = ("--threads", 1, *MEMORY)
_WORDS = {"name": "tiny", "family": "olmoe", "dtype": "bfloat16"}
FACTS = Facts(
    **{item.name: _WORDS.get(item.name, 1) for item in fields(Facts)}
    | {"stored": "", "routed": (1, 3, 4)}
)


def request_of(seed: int, head: TraceHead = HEAD, task: str | None = "a") -> Routed:
    random = np.random.default_rng(seed)
    shape = (6 + seed, len(head.routed), head.top_k)
    weights = random.random(shape, dtype=np.float32).astype(np.float16).astype(np.float32)
    return routed_of(head, task, 4, random.integers(0, head.experts + 1, shape), weights)


def written(file: Path, head: TraceHead = HEAD, count: int = 3) -> Path:
    with TraceWriter(file, head) as writer:
        append(writer, [request_of(seed, head) for seed in range(count)])
    return file


def same(left: Routed, right: Routed) -> bool:
    parts = zip(
        (left.sums, left.experts, left.weights),
        (right.sums, right.experts, right.weights),
        strict=True,
    )
    heads = (left.task, left.prompt_tokens, left.answer_tokens)
    return heads == (right.task, right.prompt_tokens, right.answer_tokens) and all(
        (a is None and b is None) or np.array_equal(a, b)  # type: ignore[arg-type]
        for a, b in parts
    )


@pytest.mark.parametrize("experts", [8, 255, 256, 1000])
def test_every_token_comes_back(experts: int, tmp_path: Path) -> None:
    head = TraceHead("tiny", 5, experts, 2, (1, 3, 4))
    trace = Trace(written(tmp_path / "deep" / "a.trace", head))
    assert trace.head == head
    assert (len(trace), trace.tokens, trace.tasks) == (3, 6 + 7 + 8, ["a"] * 3)
    for seed, request in enumerate(trace):
        assert same(request, request_of(seed, head))
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["a.trace"]
    assert head.token_bytes == 3 * 2 * (3 if experts < 256 else 4)


def test_sums_by_hand() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[2, 3]]])  # three tokens, one layer; 3 is none
    weights = np.array([[[0.5, 0.25]], [[0.5, 1]], [[2, 9]]], dtype=np.float32)
    head = TraceHead("by-hand", 2, 3, 2, (1,))
    request = routed_of(head, None, 2, experts, weights)
    assert request.used(head).tolist() == [[0, 0, 0], [0.5, 0.75, 1]]
    assert request.used(head, answer=True).tolist() == [[0, 0, 0], [0, 0, 2]]
    assert request.answer_tokens == 1


def test_sums_alone(tmp_path: Path) -> None:
    head = TraceHead("tiny", 5, 8, 2, (1, 3, 4), "histogram")
    for seed, request in enumerate(Trace(written(tmp_path / "a.trace", head))):
        assert request.experts is None
        assert np.array_equal(request.sums, request_of(seed).sums)


def signals_of(request: Routed, head: TraceHead) -> dict[str, np.ndarray]:
    random = np.random.default_rng(request.prompt_tokens)
    tokens = request.prompt_tokens + request.answer_tokens
    shapes = {name: head.shape(name, tokens) for name in head.signals}
    found: dict[str, Any]
    found = {name: random.random(shape, dtype=np.float32) for name, shape in shapes.items()}
    if "token_ids" in found:
        found["token_ids"] = random.integers(0, 1 << 20, tokens)
    return found


def test_signals_come_back_when_they_are_asked_for(tmp_path: Path) -> None:
    head = replace(HEAD, signals=SIGNALS, width=16, precision="int8", read_bytes=99)
    plain = [request_of(seed, head) for seed in range(3)]
    wanted = [replace(request, signals=signals_of(request, head)) for request in plain]
    with TraceWriter(tmp_path / "a.trace", head) as writer:
        append(writer, wanted)
    trace = Trace(tmp_path / "a.trace")
    assert trace.head == head
    for request, original in zip(trace.requests(SIGNALS), wanted, strict=True):
        assert same(request, original)
        for name, values in original.signals.items():
            ids = name == "token_ids"
            assert request.signals[name].dtype == (np.int64 if ids else np.float32)
            rounded = values if ids else values.astype(np.float16)
            assert np.array_equal(request.signals[name], rounded)
    assert request.signals["next_scores"].shape[1] == len(HEAD.routed) - 1
    assert all(not request.signals for request in trace)
    assert [set(request.signals) for request in trace.requests(["hidden"])] == [{"hidden"}] * 3


def test_what_fp16_does_not_know_is_the_largest_that_it_does(tmp_path: Path) -> None:
    head = replace(HEAD, signals=("embedding",), width=2)
    large = replace(request_of(0), signals={"embedding": np.array([1e6, -1e6], np.float32)})
    with TraceWriter(tmp_path / "a.trace", head) as writer:
        writer.add(large)
    (request,) = Trace(tmp_path / "a.trace").requests(["embedding"])
    assert request.signals["embedding"].tolist() == [65504, -65504]


def test_version_1_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "a.trace")
    with zipfile.ZipFile(file) as archive:
        content = json.loads(archive.read("head.json"))
    new = dict.fromkeys(("signals", "width", "precision", "facts", "read_bytes"))
    assert new.keys() <= content.keys()
    old = Trace(changed(file, without=new.keys(), version=1))
    assert old.head == HEAD
    assert all(same(a, request_of(seed)) for seed, a in enumerate(old))


@pytest.mark.parametrize(
    ("mine", "theirs", "message"),
    [
        ({"signals": ("scores",)}, {}, "has no signal `scores`"),
        ({"precision": "int4", "facts": FACTS}, {"facts": FACTS}, "of another precision: `as-is`"),
        ({}, {"routed": (1, 3)}, "of another model"),
        ({}, {"detail": "histogram"}, "has no tokens"),
    ],
)
def test_what_does_not_merge(mine: dict[str, Any], theirs: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        check_same_model(replace(HEAD, **mine), replace(HEAD, **theirs), Path("a.trace"))
    assert caught.value.hint


def test_what_merges() -> None:
    more = replace(HEAD, signals=SIGNALS, model="a copy", facts=FACTS)
    check_same_model(HEAD, more, Path("a.trace"))
    check_same_model(replace(HEAD, precision="int4", facts=FACTS), HEAD, Path("a.trace"))
    check_same_model(replace(HEAD, detail="histogram"), HEAD, Path("a.trace"))


def test_an_error_leaves_nothing_and_the_old_file_stays(tmp_path: Path) -> None:
    file = tmp_path / "a.trace"

    def fail() -> None:
        with TraceWriter(file, HEAD) as writer:
            writer.add(request_of(1))
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        fail()
    assert not list(tmp_path.iterdir())
    before = written(file).read_bytes()
    with pytest.raises(Cancelled):
        fail()
    assert file.read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write the trace") as caught:
        TraceWriter(tmp_path / "file" / "a.trace", HEAD)
    assert caught.value.hint


def read_all(file: Path) -> list[Routed]:
    trace = Trace(file)
    return list(trace.requests(trace.head.signals))


def test_cut_off_anywhere(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.trace").read_bytes()
    cut = tmp_path / "cut.trace"
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        cut.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="cannot read the trace") as caught:
            read_all(cut)
        assert caught.value.hint


def test_flipped_bits_are_noticed_or_do_not_matter(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.trace").read_bytes()
    wanted = [request_of(seed) for seed in range(3)]
    bad = tmp_path / "bad.trace"
    noticed = 0
    for at in range(0, len(whole), 3):
        content = bytearray(whole)
        content[at] ^= 0x10
        bad.write_bytes(content)
        try:
            found = read_all(bad)
        except UsageError:
            noticed += 1
        else:
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
    assert noticed > len(whole) // 3 / 2


def changed(file: Path, *, without: Collection[str] = (), **change: Any) -> Path:
    """The trace with another head."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    head = json.loads(members["head.json"])
    head = {key: value for key, value in head.items() if key not in without}
    members["head.json"] = json.dumps(head | change).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 3}, "unknown version of a trace: `3`"),
        ({"signals": ["colour"]}, "cannot read"),
        ({"signals": ["scores"]}, "cannot read"),
        ({"facts": {"name": "tiny"}}, "cannot read"),
        ({"format": "retinue-profile"}, "another format"),
        ({"experts": 0}, "out of range"),
        ({"routed": [1, 9]}, "out of range"),
        ({"detail": "all"}, "detail is `all`"),
        ({"requests": [["a", 4, -1]]}, "a request is damaged"),
        ({"requests": [["a", 4, 1 << 40]]}, "does not have"),
        ({"requests": [["a", 4, 2], ["a", 4, 3], ["a", 4, 4], ["a", 4, 5]]}, "cannot read"),
        ({"top_k": None}, "cannot read"),
    ],
)
def test_heads_that_lie(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read_all(changed(written(tmp_path / "a.trace"), **change))


def test_no_trace_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.trace").write_text("{}")
    for name in ("a.trace", "none.trace"):
        with pytest.raises(UsageError, match="cannot read the trace"):
            Trace(tmp_path / name)


# --- the command


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [
        {"task": task, "prompt": models.prompt_of(12, seed), "continuation": models.prompt_of(6)}
        for seed, task in enumerate(["a", "b", "a"])
    ]
    return write(tmp_path, *rows)


def test_trace_and_append(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.trace", tmp_path / "two.trace"
    done = call("trace", olmoe, "--data", texts, "--out", one, *TINY, "--json")
    assert done.code == 0, done.err
    assert (done.document["requests"], done.document["tokens"]) == (3, 54)
    assert done.document["bytes"] == one.stat().st_size
    again = ("trace", olmoe, "--data", texts, "--per-task", 1, "--merge", one, *TINY)
    done = call(*again, "--out", two)
    assert done.code == 0, done.err
    assert "5 requests, 90 tokens" in done.out
    trace = Trace(two)
    assert trace.tasks == ["a", "b", "a", "a", "b"]
    before, after = list(Trace(one)), list(trace)
    for i, j in [(0, 0), (1, 1), (2, 2), (0, 3), (1, 4)]:
        assert same(before[i], after[j])
    for request in after:
        assert request.experts is not None
        assert request.experts.shape == (18, models.LAYERS, models.TOP_K)
        assert (request.prompt_tokens, request.answer_tokens) == (12, 6)
    coarse = tmp_path / "coarse.trace"
    assert call(*again, "--out", coarse, "--detail", "histogram").code == 0
    for fine, sums in zip(after, Trace(coarse), strict=True):
        assert np.allclose(fine.sums, sums.sums, atol=0.01)
    refused(call(*again[:-6], "--merge", coarse, "--out", two, *TINY), 2, "has no tokens")
    other = written(tmp_path / "other.trace")
    refused(call(*again[:-6], "--merge", other, "--out", two, *TINY), 2, "another model")
    refused(call(*again, "--signals", "scores", "--out", two), 2, "has no signal `scores`")


def test_trace_with_signals(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.trace"
    words = ("trace", olmoe, "--data", texts, "--out", file, *TINY, "--json")
    done = call(
        *words,
        "--signals",
        "embedding, hidden,token_ids,third_scores,next_scores,second_scores,scores",
    )
    assert done.code == 0, done.err
    assert done.document["signals"] == list(SIGNALS)
    head = Trace(file).head
    assert head.facts is not None
    assert head.read_bytes >= head.facts.read_bytes == head.facts.expert_bytes
    assert head.precision == "as-is"
    for request in Trace(file).requests(SIGNALS):
        assert request.experts is not None
        scores, ahead = request.signals["scores"], request.signals["next_scores"]
        assert request.signals["hidden"].shape == (18, models.LAYERS, head.width)
        assert request.signals["embedding"].shape == (head.width,)
        assert request.signals["token_ids"].shape == (18,)
        assert np.allclose(scores.sum(axis=2), 1, atol=0.01)
        # A router's own choice is the top of its own scores; of the next one's, by and large.
        own = np.sort(np.argsort(-scores, axis=2)[:, :, : models.TOP_K], axis=2)
        assert (own == np.sort(request.experts, axis=2)).mean() > 0.9
        assert ahead.shape == (18, models.LAYERS - 1, models.EXPERTS)
        for further, signal in enumerate(AHEAD):
            routers = max(0, models.LAYERS - 1 - further)
            assert request.signals[signal].shape == (18, routers, models.EXPERTS)
    refused(call(*words, "--signals", "scores,colour"), 2, "unknown signal: `colour`")
