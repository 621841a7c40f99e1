"""`retinue pack`: a pack is its model in another precision, and says so where it is harmed."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import models
from command import MEMORY, Call, Done, caller, refused, start
from disk import eventually
from retinue import LLM
from retinue.errors import CheckpointError, Unsupported
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import ALIGNMENT
from retinue.memory.pack import TensorFile
from retinue.memory.placing import place
from retinue.model.survey import survey

PROMPT, FORCED = models.prompt_of(21), models.prompt_of(4, seed=1)
KEYS = {"model", "out", "precision", "bytes_before", "bytes_after", "bits_per_weight", "seconds"}
KEYS |= {"error_mean", "error_worst", "error_worst_layer", "error_worst_expert"}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture(scope="module")
def pack(checkpoints: Path) -> Path:
    """olmoe in int4. Nobody changes it."""
    from retinue.cli.main import main

    source = models.make(checkpoints / "to-pack")
    assert main(["pack", str(source), str(checkpoints / "pack"), "--threads", "2"]) == 0
    return checkpoints / "pack"


def made(call: Call, source: Path, out: Path, *options: object) -> Done:
    done = call("pack", source, out, "--threads", "2", *options, "--json")
    assert done.code == 0, done.err
    return done


def logits(folder: Path, **settings: Any) -> torch.Tensor:
    with models.open_llm(folder, **settings) as llm:
        return models.run_logits(llm, PROMPT, FORCED)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


# --- what a pack is


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_the_model_that_the_precision_makes(family: str, tmp_path: Path, call: Call) -> None:
    """To the bit what `--precision` makes of it while loading, whatever is resident."""
    source = models.make(tmp_path / "m", family, torch.bfloat16)
    precision = "int8" if family == "mixtral" else "int4"
    document = made(call, source, tmp_path / "p", "--precision", precision).document
    assert set(document) >= KEYS
    assert 0 < document["error_mean"] <= document["error_worst"] < 0.1
    assert document["peak_rss_bytes"] > 0
    shutil.rmtree(source / "nothing", ignore_errors=True)
    expected = logits(source, precision=precision)
    source.rename(tmp_path / "elsewhere")  # it needs nothing of it
    for experts in (None, "25%"):
        assert torch.equal(logits(tmp_path / "p", experts=experts), expected)


def test_other_ways_to_store_the_same_experts(pack: Path, tmp_path: Path, call: Call) -> None:
    fused = models.fuse(pack.parent / "to-pack", tmp_path / "fused")
    made(call, fused, tmp_path / "p")
    for file in pack.glob("experts-*.safetensors"):
        assert (tmp_path / "p" / file.name).read_bytes() == file.read_bytes()


def test_one_aligned_read_an_expert(pack: Path) -> None:
    with models.open_llm(pack) as llm:
        layouts = [layout for row in llm.assembly.network.experts.layouts for layout in row]
        assert len(layouts) == models.LAYERS * models.EXPERTS
        for layout in layouts:
            (extent,) = layout.extents
            assert extent.direct
            assert extent.start % ALIGNMENT == extent.stop % ALIGNMENT == 0
            assert layout.plain is None


def test_sizes(pack: Path) -> None:
    """Every bit is told of, nothing is left over, and other programs can read the files."""
    assert not [file.name for file in pack.iterdir() if "part" in file.name or file.is_dir()]
    facts, plain = survey(pack), survey(pack.parent / "to-pack", "int4")
    assert (facts.stored, facts.plain_bytes) == ("int4", 0)
    assert (facts.expert_bytes, facts.dense_bytes) == (plain.expert_bytes, plain.dense_bytes)
    summary = json.loads((pack / "retinue.json").read_text())["summary"]
    files = sum(file.stat().st_size for file in pack.glob("*.safetensors"))
    headers = sum(ALIGNMENT + 0 for _ in pack.glob("*.safetensors"))
    assert files - 2 * headers < summary["bytes_after"] < files
    assert summary["bits_per_weight"] == summary["bytes_after"] * 8 / summary["weights"]
    for file in pack.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert all(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118


def test_the_same_again_writes_nothing(pack: Path, call: Call) -> None:
    before = {file: file.stat().st_mtime_ns for file in pack.iterdir()}
    done = made(call, pack.parent / "to-pack", pack)
    assert done.document["written"] is False
    assert "it was there" in done.err
    assert {file: file.stat().st_mtime_ns for file in pack.iterdir()} == before


def test_the_verbs_take_a_pack(pack: Path, call: Call) -> None:
    done = call("plan", pack, *MEMORY, "--json")
    assert (done.code, done.document["fits"]) == (0, True)
    options = ("--new-tokens", "2", "--experts", "30%", "--threads", "1")
    done = call("bench", pack, *MEMORY, *options, "--json")
    assert done.code == 0, done.err
    assert done.document["stored"] == "int4"
    assert done.document["bytes_read"] > 0
    assert done.document["peak_rss_bytes"] <= done.document["budget_bytes"]
    done = call("run", pack, "5 6 7", "--token-ids", *MEMORY, "--precision", "int4", "--json")
    assert done.code == 0, done.err


def test_the_sample_keeps_its_words_and_its_profile(tmp_path: Path, call: Call) -> None:
    done = made(call, "sample", tmp_path / "p", "--precision", "int8")  # type: ignore[arg-type]
    assert done.document["error_worst"] < 0.006
    few = ("--per-task", 1, "--threads", 1, "--context", "128", *MEMORY)
    done = call("eval", tmp_path / "p", "--against", "sample", *few, "--json")
    assert done.code == 0, done.err
    assert done.document["against"] == "sample"
    for score in done.document["tasks"].values():
        assert score["nll"] != score["nll_plain"]
        assert abs(score["nll"] / score["nll_plain"] - 1) < 0.01
        assert score["agreement"] > 0.9
    popular = ("--preset", "popular", "--experts", "40%", "--memory", "2GiB")
    done = call("run", tmp_path / "p", "A: Hello", *popular, "--max-new-tokens", "2", "--json")
    assert done.code == 0, done.err
    assert done.document["text"]


def test_a_preset_of_a_pack_against_the_model(tmp_path: Path, pack: Path, call: Call) -> None:
    rows = [
        {"task": "a", "prompt": models.prompt_of(12, seed), "continuation": models.prompt_of(6)}
        for seed in range(2)
    ]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source, options = pack.parent / "to-pack", ("--data", data, "--threads", 1, *MEMORY, "--json")
    random = ("--preset", "random", "--experts", "50%")
    plain = call("eval", source, *options).document
    exact = call("eval", pack, "--against", source, *options).document
    both = call("eval", pack, "--against", source, *random, *options).document
    assert plain["nll"] == exact["nll_plain"] == both["nll_plain"]
    assert exact["degraded_share"] == 0 < both["degraded_share"]
    assert len({plain["nll"], exact["nll"], both["nll"]}) == 3


# --- refusals


def test_what_cannot_be_packed(pack: Path, checkpoint: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "out"
    refused(call("pack", pack, out, "--precision", "int8"), 3, "stored in int4")
    refused(call("pack", checkpoint, out), 3, f"stored in {checkpoint.name}")
    refused(call("pack", pack.parent / "to-pack", out, "--precision", "as-is"), 2, "precision")
    refused(call("pack", pack.parent / "to-pack"), 2, "where to?")
    refused(call("pack", pack, out, "--check"), 2, "--check")
    refused(call("pack", pack.parent / "to-pack", "--check"), 2, "is no pack")
    few = ("--memory", "400MiB")
    refused(call("pack", pack.parent / "to-pack", out, *few), 3, "bytes of memory")
    assert not list(tmp_path.iterdir())


def test_a_place_that_is_taken(pack: Path, tmp_path: Path, call: Call) -> None:
    source = pack.parent / "to-pack"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    refused(call("pack", source, tmp_path / "mine"), 2, "is there already")
    refused(call("pack", source, pack, "--precision", "int8"), 2, "no int8 pack of this model")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "letter").write_text("dear")
    refused(call("pack", source, tmp_path / "new"), 2, "was begun for another")
    (tmp_path / "empty").mkdir()
    made(call, source, tmp_path / "empty")


def test_another_precision_than_the_pack_has(pack: Path, call: Call) -> None:
    done = call("run", pack, "1 2", "--token-ids", *MEMORY, "--precision", "int8")
    refused(done, 3, "stored in int4")


# --- harm


def flip(file: Path, place: int) -> None:
    """One bit of the file."""
    with file.open("r+b") as handle:
        handle.seek(place)
        byte = handle.read(1)
        handle.seek(place)
        handle.write(bytes([byte[0] ^ 16]))


def test_a_flipped_bit_of_an_expert(pack: Path, tmp_path: Path, call: Call) -> None:
    folder = models.copy(pack, tmp_path / "p")
    with models.open_llm(pack) as llm:
        extent = llm.assembly.network.experts.layouts[2][5].extents[0]
    flip(folder / extent.file.name, extent.start + 1000)
    with models.open_llm(folder, self_check=False, experts="50%") as llm:
        cache = llm.assembly.cache
        wanted = llm.assembly.network.experts.there.copy()
        wanted[:] = False
        wanted[2, 5] = True
        for _ in range(2):  # it stays unknown
            with pytest.raises(CheckpointError, match="expert 5 of layer 2") as caught:
                place(cache, wanted)
            assert caught.value.hint
        wanted[2] = [True, True, False, False, False, False, False, False]
        place(cache, wanted)
        cache.check()
    done = call("pack", folder, "--check")
    assert done.code == 1
    assert "expert 5 of layer 2" in done.err
    assert "hint: " in done.err
    assert call("pack", pack, "--check", "--json").document["damaged"] == []


def test_an_expert_is_checked_once(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    from retinue.memory import intake

    plain = intake.check_expert
    monkeypatch.setattr(
        intake, "check_expert", lambda key, *rest: (seen.append(key), plain(key, *rest))
    )
    with models.open_llm(pack, experts="25%", self_check=False) as llm:
        llm.generate(PROMPT, models.greedy(4))
        assert llm.assembly.cache.used_bytes_read > len(seen) * survey(pack).expert_bytes
    assert len(seen) == len(set(seen)) > models.EXPERTS


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight.codes"])
def test_a_flipped_bit_of_a_dense_tensor(name: str, pack: Path, tmp_path: Path) -> None:
    folder = models.copy(pack, tmp_path / "p")
    file = folder / "dense-00000.safetensors"
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    flip(file, 8 + size + header[name]["data_offsets"][0] + 3)
    with pytest.raises(CheckpointError, match=f"checksum of `{name}` is wrong") as caught:
        LLM(folder, memory=models.MEMORY)
    assert caught.value.hint


def test_a_flipped_bit_of_rows_that_stay_in_their_file(pack: Path, tmp_path: Path) -> None:
    """They are read one by one afterwards, so their checksum is looked at beforehand."""
    folder = models.copy(pack, tmp_path / "p")
    memory = models.short_of_room(folder, 0.5)
    with models.open_llm(folder, memory=memory) as llm:
        assert llm.assembly.split.embedding_stays
    entry = open_checkpoint(folder).tensors["model.embed_tokens.weight"]
    flip(entry.file, entry.stop - 3)
    with pytest.raises(CheckpointError, match=f"checksum of `{entry.name}` is wrong"):
        models.open_llm(folder, memory=memory)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda folder: (folder / "retinue.json").unlink(), "damaged or unfinished"),
        (lambda folder: edit(folder, dense={}), "nothing describes"),
        (lambda folder: edit(folder, experts={}), "nothing describes"),
        (lambda folder: (folder / "experts-00002.safetensors").unlink(), "shard is missing"),
    ],
)
def test_a_pack_that_lacks_something(change: Any, what: str, pack: Path, tmp_path: Path) -> None:
    folder = models.copy(pack, tmp_path / "p")
    change(folder)
    with pytest.raises(CheckpointError, match=what) as caught:
        LLM(folder, memory=models.MEMORY)
    assert caught.value.hint


def test_a_pack_of_a_later_version(pack: Path, tmp_path: Path) -> None:
    folder = edit(models.copy(pack, tmp_path / "p"), version=2)
    with pytest.raises(Unsupported, match="version 2") as caught:
        LLM(folder, memory=models.MEMORY)
    assert caught.value.hint


def edit(folder: Path, **fields: Any) -> Path:
    file = folder / "retinue.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


# --- interruptions


@pytest.mark.parametrize("after", ["journal/pack.json", "experts-00000", "experts-00002"])
def test_killed_it_goes_on_to_the_same_bytes(
    after: str, pack: Path, tmp_path: Path, call: Call
) -> None:
    source, out = pack.parent / "to-pack", tmp_path / "p"
    partial = tmp_path / "p.partial"
    with start("pack", source, out, "--threads", "1") as process:
        eventually(lambda: bool(list(partial.glob(f"{after}*"))) or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    if not out.exists():  # else it was faster than we
        kept = {file: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
        made(call, source, out)
        for file, changed in kept.items():
            assert (out / file.name).stat().st_mtime_ns == changed
    assert contents(out) == contents(pack)
    assert not partial.exists()


def test_a_full_disk(
    pack: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = pack.parent / "to-pack", tmp_path / "p"
    room = sum(file.stat().st_size for file in pack.glob("*.safetensors")) // 2
    plain, written = os.pwrite, [0]

    def full(handle: int, data: Any, offset: int) -> int:
        written[0] += len(data)
        if written[0] > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(handle, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        done = call("pack", source, out, "--threads", "2")
    assert (done.code, out.exists()) == (1, False)
    assert "is full" in done.err
    assert "hint: free some space and run the same command again" in done.err
    assert list((tmp_path / "p.partial").glob("dense-*.safetensors"))
    made(call, source, out)
    assert contents(out) == contents(pack)


def test_a_disk_that_is_too_small_is_seen_before(
    pack: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    done = call("pack", pack.parent / "to-pack", tmp_path / "p")
    assert done.code == 1
    assert "and the disk has 1000 B left" in done.err
    assert not list(tmp_path.glob("*.partial/*.safetensors"))


def test_a_name_is_given_last(pack: Path, tmp_path: Path, call: Call) -> None:
    """Killed between its last two steps it takes the last one."""
    models.copy(pack, tmp_path / "p.partial")
    made(call, pack.parent / "to-pack", tmp_path / "p")
    assert contents(tmp_path / "p") == contents(pack)


def test_an_expert_that_is_no_number_is_named(pack: Path, tmp_path: Path, call: Call) -> None:
    def change(tensors: models.Tensors) -> models.Tensors:
        name = "model.layers.2.mlp.experts.6.up_proj.weight"
        tensors[name] = tensors[name].clone()
        tensors[name][3, 5] = torch.nan
        return tensors

    folder = models.rewrite(pack.parent / "to-pack", tmp_path / "nan", change)
    done = call("pack", folder, tmp_path / "p")
    assert done.code == 1
    assert "expert 6 of layer 2 holds NaN" in done.err
    assert not (tmp_path / "p").exists()


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from retinue.memory.pack import Slab

    plain = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda h, data, at: plain(h, data[: max(1, len(data) // 2)], at)
    )
    file = TensorFile(tmp_path / "f", [Slab("a", "U8", (5,)), Slab("b", "U8", (7,))])
    file.write("b", 0, b"1234567")
    file.write("a", 0, b"abcde")
    file.close(keep=True)
    with safe_open(tmp_path / "f", framework="pt") as opened:
        assert bytes(opened.get_tensor("a").tolist()) == b"abcde"
        assert bytes(opened.get_tensor("b").tolist()) == b"1234567"
