"""The comparison with llama.cpp and the line of qwen3: what is made, run and promised."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import made, packed, peer_llamacpp, shapes
from benchmarks.checkpoint import Checkpoint, inspect
from benchmarks.child import Done
from benchmarks.gguf_file import Source, items
from benchmarks.results import Document, Report, compare
from benchmarks.setting import Setting
from transformers import AutoModelForCausalLM

GB = 10**9
TINY = shapes.Shape(64, 48, layers=2, heads=4, experts=8, top_k=2, vocabulary=512)
TINY_QWEN3 = shapes.Qwen3(64, 32, layers=2, heads=8, experts=8, top_k=2, vocabulary=512)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "olmoe").mkdir()
    return Checkpoint(tmp_path / "olmoe", "olmoe", 14 * GB, 12 * GB, experts=1024, top_k=8)


def setting(checkpoint: Checkpoint) -> Setting:
    return Setting(checkpoint, 6 * GB, 3, small=lambda: checkpoint)


def ours(decode: float, bound: float = 5.0, peak: int = GB, **more: Any) -> Document:
    prefill = {"prefill_tokens_per_s": 100.0, "load_s": 1.0, "prefill_s": 5.0}
    speeds = {"decode_tokens_per_s": decode, "bound_tokens_per_s": bound, "peak_rss_bytes": peak}
    return prefill | speeds | more


@pytest.fixture
def canned(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> dict[str, Document]:
    """What each side will say; the pack and the GGUF file are there, the latter with 4 GB."""
    said: dict[str, Document] = {}
    pack = checkpoint.folder.with_name("olmoe-int4")
    pack.mkdir()
    gguf = checkpoint.folder.with_name("olmoe.Q4_0.gguf")
    with gguf.open("wb") as handle:
        handle.truncate(4 * GB)
    monkeypatch.setattr(peer_llamacpp, "missing", lambda: "")
    monkeypatch.setattr(packed, "room_for", lambda checkpoint, count: True)
    monkeypatch.setattr(packed, "available_bytes", lambda: 20 * GB)
    monkeypatch.setattr(packed, "memory_group", lambda limit: _NoGroup())
    monkeypatch.setattr(packed, "run_child", lambda words, group: Done(said["llama.cpp"], 9.0))
    monkeypatch.setattr(packed, "timed", lambda words: said["llama.cpp"])
    monkeypatch.setattr(packed.ours, "bench", lambda words, group=None: dict(said["ours"]))
    return said


class _NoGroup:
    notes = ("no groups here",)

    def __enter__(self) -> "_NoGroup":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def verdicts(report: Report) -> dict[tuple[str, str], tuple[float, bool | None]]:
    return {(row.what, row.against): (round(row.ratio, 3), row.ok) for row in report.rows}


@pytest.mark.parametrize(("decode", "kept"), [(4.0, False), (4.3, True)])
def test_small_rows_and_promises(
    checkpoint: Checkpoint, canned: dict[str, Document], decode: float, kept: bool
) -> None:
    canned["ours"] = ours(decode)
    canned["llama.cpp"] = {"decode_tokens_per_s": 0.5, "prefill_tokens_per_s": 50.0}
    report = packed.llamacpp_small(setting(checkpoint))
    found = verdicts(report)
    assert found["decode", "llama.cpp"] == (decode / 0.5, True)
    assert found["prefill", "llama.cpp"] == (2.0, False)
    assert found["decode", "bound"] == (decode / 5, kept)
    assert found["peak memory", "limit"] == (2.0, True)
    assert report.notes == ["no groups here"]
    canned["ours"] = ours(decode, peak=2 * GB + 1)
    found = verdicts(packed.llamacpp_small(setting(checkpoint)))
    assert found["peak memory", "limit"][1] is False


def test_whole_rows_and_promises(checkpoint: Checkpoint, canned: dict[str, Document]) -> None:
    canned["ours"] = ours(45.0)
    canned["llama.cpp"] = {
        "decode_tokens_per_s": 40.0,
        "prefill_tokens_per_s": 80.0,
        "load_s": 7.0,
        "prefill_s": 5.0,
    }
    report = packed.llamacpp_whole(setting(checkpoint))
    assert verdicts(report) == {
        ("decode", "llama.cpp"): (1.125, True),
        ("prefill", "llama.cpp"): (1.25, False),
        ("load and prefill", "llama.cpp"): (2.0, None),
    }
    assert set(report.runs) == {"ours", "llama.cpp"}


def test_what_cannot_be_compared_says_why(
    checkpoint: Checkpoint, canned: dict[str, Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Checkpoint(checkpoint.folder, "mixtral", GB, GB, experts=8, top_k=2)
    assert "only olmoe" in packed.llamacpp_small(setting(other)).notes[0]
    assert "qwen3-15b-a3b" in packed.qwen3(setting(checkpoint)).notes[0]
    monkeypatch.setattr(packed, "available_bytes", lambda: 8 * GB)
    assert "needs" in packed.llamacpp_whole(setting(checkpoint)).notes[0]
    with checkpoint.folder.with_name("olmoe.Q4_0.gguf").open("wb") as handle:
        handle.truncate(GB)
    assert "fit into" in packed.llamacpp_small(setting(checkpoint)).notes[0]
    monkeypatch.setattr(packed, "room_for", lambda checkpoint, count: False)
    assert "no room" in packed.llamacpp_small(setting(checkpoint)).notes[0]
    monkeypatch.undo()
    monkeypatch.setattr(peer_llamacpp, "PACKAGES", ("json", "no_such_package"))
    for run in (packed.llamacpp_small, packed.llamacpp_whole):
        (note,) = run(setting(checkpoint)).notes
        assert note.startswith("LEFT OUT: no_such_package not installed: `pip install ")


def test_qwen3_is_measured_and_its_packing_told(
    checkpoint: Checkpoint, canned: dict[str, Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    canned["ours"] = ours(3.9, peak=3 << 30)
    large = Checkpoint(checkpoint.folder, "qwen3_moe", 31 * GB, 29 * GB, experts=3072, top_k=8)
    report = packed.qwen3(setting(large))
    assert verdicts(report) == {
        ("decode", "bound"): (0.78, False),
        ("peak memory", "limit"): (1.333, True),
    }
    assert "was there already" in report.notes[-1]
    done = Done({"peak_rss_bytes": 1 << 30}, 61.0)
    pack = made.Pack(checkpoint.folder, 9 << 30, done)
    assert packed._packing(pack) == "the pack has 9.00 GiB, made in 61 s with a peak of 1.00 GiB"


def test_made_once_and_whole(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(words: list[str], group: object = None) -> Done:
        ran.append(words)
        out = Path(words[5]) if "pack" in words else Path(words[-1])
        assert out.name.endswith(".part")
        if "pack" in words:
            out.mkdir()
            out /= "experts"
        out.write_bytes(b"12345")
        return Done({}, 3.0)

    monkeypatch.setattr(made, "run_child", run)
    monkeypatch.setattr(made, "memory_group", lambda limit: _NoGroup())
    first, again = made.pack_of(checkpoint), made.pack_of(checkpoint)
    assert (first.folder.name, first.bytes) == ("olmoe-int4", 5)
    assert (first.made is not None, again.made) == (True, None)
    assert made.gguf_of(checkpoint) == made.gguf_of(checkpoint)
    assert made.gguf_of(checkpoint).read_bytes() == b"12345"
    assert len(ran) == 2


def test_a_row_promises_its_ratio() -> None:
    row = compare(("a", "b", "c"), [3.0], "d", [2.0])
    assert [row.promised(goal).ok for goal in (0, 1.4, 1.6)] == [None, True, False]


def test_the_peers_command() -> None:
    words = peer_llamacpp.command(Path("a.gguf"), repack=True, prompt_tokens=5, new_tokens=3)
    options = peer_llamacpp.build_parser().parse_args(words[3:])
    assert (options.file, options.repack) == ("a.gguf", True)
    assert (options.prompt_tokens, options.new_tokens) == (5, 3)


def test_the_file_for_llama_cpp_has_every_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    shapes.write("tiny", tmp_path)
    with ExitStack() as stack:
        source = Source(tmp_path, stack)
        found = {item.name: item for item in items(source, TINY.layers, TINY.experts)}
        assert len(found) == 3 + TINY.layers * 12
        stacked = found["blk.1.ffn_down_exps.weight"]
        assert stacked.shape == (8, 64, 48) == stacked.read().shape
        plain = source.read("model.layers.1.mlp.experts.5.down_proj.weight")
        assert np.array_equal(stacked.read()[5], plain)
        assert not found["blk.0.ffn_gate_inp.weight"].quantised
        held = sum(np.prod(item.shape) for item in found.values())
    assert 2 * held == inspect(tmp_path).total_bytes


def test_the_shape_of_qwen3_loads_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY_QWEN3)
    shapes.write("tiny", tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 512)
    assert inspect(tmp_path).family == "qwen3_moe"
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 128
