"""Headers and folders: what is read, and what is refused with the file or tensor by name."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from disk import entry_fields, write_checkpoint, write_index, write_raw, write_tensors
from retinue.errors import CheckpointError, DownloadError, Unsupported
from retinue.memory import home
from retinue.memory.checkpoint import open_checkpoint, read_header

BODY = bytes(48)
GOOD = entry_fields("F32", (2, 3), 0, 24)


def test_entries_point_at_the_tensors_bytes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    contents = write_tensors(file, {"a": ("BF16", (2, 3)), "b": ("F32", (5,))}, pad=3, gaps=[0, 7])
    raw = file.read_bytes()
    entries = {entry.name: entry for entry in read_header(file)}
    assert {name: raw[e.start : e.stop] for name, e in entries.items()} == contents
    assert (entries["a"].dtype, entries["a"].shape, entries["a"].item_bytes) == ("BF16", (2, 3), 2)
    assert entries["b"].file == file


def test_header_of_the_safetensors_library(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    tensor = torch.arange(12, dtype=torch.float16).reshape(3, 4)
    save_file({"w": tensor, "none": torch.empty(0, 4)}, file, metadata={"format": "pt"})
    entries = {entry.name: entry for entry in read_header(file)}
    assert entries.keys() == {"w", "none"}
    raw = file.read_bytes()[entries["w"].start : entries["w"].stop]
    assert raw == tensor.numpy().tobytes()
    assert entries["none"].start == entries["none"].stop


def test_one_file_without_an_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"model.safetensors": ["a", "b"]}, hidden_size=8)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == {"a", "b"}
    assert checkpoint.files == [folder / "model.safetensors"]
    assert checkpoint.config["hidden_size"] == 8


def test_index_says_which_files_count(tmp_path: Path) -> None:
    shards = {"1.safetensors": ["a"], "2.safetensors": ["b"], "spare.safetensors": ["a"]}
    folder = write_checkpoint(tmp_path, shards)
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    checkpoint = open_checkpoint(folder)
    assert {name: entry.file.name for name, entry in checkpoint.tensors.items()} == {
        "a": "1.safetensors",
        "b": "2.safetensors",
    }
    assert [file.name for file in checkpoint.files] == ["1.safetensors", "2.safetensors"]


# --- refused by name


@pytest.mark.parametrize(
    ("value", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"bits": 4}, "?"), ("awq", "?")],
)
def test_quantised(tmp_path: Path, value: object, method: str) -> None:
    folder = write_checkpoint(tmp_path, {"m.safetensors": ["a"]}, quantization_config=value)
    with pytest.raises(Unsupported, match="quantised") as caught:
        open_checkpoint(folder)
    assert f"`{method}`" in str(caught.value)
    assert "bf16" in caught.value.hint


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_files_alone(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, {})
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(Unsupported, match=f"pickle files are not served: `{name}`") as caught:
        open_checkpoint(folder)
    assert "safetensors" in caught.value.hint


def test_pickle_files_beside_safetensors_are_left_alone(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"m.safetensors": ["a"]})
    (folder / "optimizer.pt").write_bytes(b"\x80\x04.")
    assert open_checkpoint(folder).tensors.keys() == {"a"}


def test_code_of_its_own(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling.Mine"}
    folder = write_checkpoint(tmp_path, {"m.safetensors": ["a"]}, auto_map=auto_map)
    with pytest.raises(Unsupported, match="`auto_map`") as caught:
        open_checkpoint(folder)
    assert "never runs code" in caught.value.hint


@pytest.mark.parametrize("dtype", ["F4", "C64", "bf16", "", None, 7, [], {}])
def test_unknown_type(tmp_path: Path, dtype: object) -> None:
    file = write_raw(tmp_path / "m", {"odd.w": {**GOOD, "dtype": dtype}}, BODY)
    with pytest.raises(Unsupported, match=r"`odd\.w`") as caught:
        read_header(file)
    assert f"`{dtype}`" in str(caught.value)
    assert "bf16" in caught.value.hint


# --- headers that are damaged or lie


def pair(first: tuple[int, int], second: tuple[int, int]) -> dict[str, object]:
    spans = {"one": first, "two": second}
    return {
        name: entry_fields("U8", (end - begin,), begin, end) for name, (begin, end) in spans.items()
    }


LIES = {
    "beyond the file": ({"w": entry_fields("F32", (2, 9), 0, 72)}, "ends before `w` does"),
    "wholly beyond": ({"w": entry_fields("F32", (1,), 900, 904)}, "ends before `w` does"),
    "shape": ({"w": {**GOOD, "shape": [2, 4]}}, "shape and bytes of `w`"),
    "type": ({"w": {**GOOD, "dtype": "BF16"}}, "shape and bytes of `w`"),
    "backwards": ({"w": {**GOOD, "data_offsets": [24, 0]}}, "shape and bytes of `w`"),
    "negative size": ({"w": {**GOOD, "shape": [-2, -3]}}, "`w` holds numbers that are no sizes"),
    "negative offset": ({"w": {**GOOD, "data_offsets": [-24, 0]}}, "`w` holds numbers"),
    "fractions": ({"w": {**GOOD, "shape": [2.0, 3]}}, "`w` holds numbers"),
    "truth values": ({"w": {**GOOD, "shape": [True, 6]}}, "`w` holds numbers"),
    "texts": ({"w": {**GOOD, "data_offsets": ["0", "24"]}}, "`w` holds numbers"),
    "three offsets": ({"w": {**GOOD, "data_offsets": [0, 8, 24]}}, "`w` is incomplete"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2, 3]}}, "`w` is incomplete"),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 24]}}, "`w` is incomplete"),
    "shape of one number": ({"w": {**GOOD, "shape": 6}}, "`w` is incomplete"),
    "an entry that is a list": ({"w": [1, 2]}, "`w` is incomplete"),
    "an entry that is null": ({"w": None}, "`w` is incomplete"),
    "overlap": (pair((0, 24), (23, 30)), "`one` and `two` overlap"),
    "the same bytes": (pair((8, 16), (8, 16)), "`one` and `two` overlap"),
    "one within the other": (pair((0, 48), (8, 9)), "`one` and `two` overlap"),
    "not an object": ([GOOD], "not a JSON object"),
    "not JSON": (b'{"w": ', "not JSON"),
    "not text": (b"\xff\xfe\xfd\xfc", "not JSON"),
    "no end of nesting": (b"[" * 200_000, "not JSON"),
    "a number without end": (b'{"w": ' + b"9" * 5000 + b"}", "not JSON"),
}


@pytest.mark.parametrize("case", LIES)
def test_header_that_lies(tmp_path: Path, case: str) -> None:
    header, what = LIES[case]
    file = write_raw(tmp_path / "bad.safetensors", header, BODY)
    with pytest.raises(CheckpointError, match=r"`bad\.safetensors` is damaged") as caught:
        read_header(file)
    assert what in str(caught.value)
    assert "download" in caught.value.hint
    assert str(file) in caught.value.hint


@pytest.mark.parametrize("length", [0, 1, 10_000, 100_000_001, 2**63, 2**64 - 1])
def test_header_length_that_lies(tmp_path: Path, length: int) -> None:
    file = write_raw(tmp_path / "bad.safetensors", {"w": GOOD}, BODY, length=length)
    with pytest.raises(CheckpointError, match=r"`bad\.safetensors`.*header length") as caught:
        read_header(file)
    assert "download" in caught.value.hint


def test_truncated_anywhere(tmp_path: Path) -> None:
    whole = write_raw(tmp_path / "whole", {"w": GOOD}, BODY[:24]).read_bytes()
    file = tmp_path / "cut.safetensors"
    for count in range(len(whole)):
        file.write_bytes(whole[:count])
        with pytest.raises(CheckpointError, match=r"`cut\.safetensors` is damaged or truncated"):
            read_header(file)
    file.write_bytes(whole)
    assert [entry.name for entry in read_header(file)] == ["w"]


def test_truncated_body_names_the_tensor_and_both_sizes(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "cut", {"w": GOOD}, BODY[:23])
    size = file.stat().st_size
    with pytest.raises(CheckpointError, match=rf"before `w` does \({size} bytes of {size + 1}\)"):
        read_header(file)


def test_empty_tensors_overlap_nothing(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "m", pair((0, 8), (4, 4)), BODY)
    assert {entry.name for entry in read_header(file)} == {"one", "two"}


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_raw(tmp_path / "locked.safetensors", {"w": GOOD}, BODY)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(CheckpointError, match=r"cannot read .*locked\.safetensors.*denied") as e:
        read_header(file)
    assert "check" in e.value.hint


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads anything")
def test_file_without_read_permission(tmp_path: Path) -> None:
    file = write_raw(tmp_path / "locked.safetensors", {"w": GOOD}, BODY)
    file.chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot read .*locked\.safetensors"):
        read_header(file)


def test_folder_where_a_file_should_be(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", {})
    (folder / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .*x\.safetensors"):
        open_checkpoint(folder)


# --- folders that do not hold together


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"1.safetensors": ["a"]})
    write_index(folder, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(CheckpointError, match=r"a shard is missing: `2\.safetensors`") as caught:
        open_checkpoint(folder)
    assert "download" in caught.value.hint


def test_tensor_in_two_files(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"1.safetensors": ["a", "b"], "2.safetensors": ["b"]})
    with pytest.raises(CheckpointError, match="tensor `b` is in two files") as caught:
        open_checkpoint(folder)
    assert "`1.safetensors`" in str(caught.value)
    assert "`2.safetensors`" in str(caught.value)
    assert "do not belong together" in caught.value.hint


@pytest.mark.parametrize("name", ["a", "nowhere"])
def test_index_that_names_a_tensor_elsewhere(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, {"1.safetensors": ["a"], "2.safetensors": ["b"]})
    write_index(folder, {"b": "2.safetensors", "a": "1.safetensors", name: "2.safetensors"})
    with pytest.raises(CheckpointError, match=rf"`{name}` is not in `2\.safetensors`") as caught:
        open_checkpoint(folder)
    assert "do not belong together" in caught.value.hint


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {"a": 1}, {"a": "../1.safetensors"}, {"a": "/etc/1"}, {"a": "sub/1.safetensors"}],
)
def test_index_without_a_usable_map(tmp_path: Path, weight_map: object) -> None:
    folder = write_checkpoint(tmp_path / "m", {"1.safetensors": ["a"]})
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=r"index\.json` has no usable weight_map") as caught:
        open_checkpoint(folder)
    assert "download" in caught.value.hint


@pytest.mark.parametrize("content", [b"{", b"\xff\xff", b"[" * 200_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_damaged_json_files(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write_checkpoint(tmp_path, {"1.safetensors": ["a"]})
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name}` is not JSON") as caught:
        open_checkpoint(folder)
    assert "download" in caught.value.hint


def test_configuration_that_is_no_object(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"1.safetensors": ["a"]})
    (folder / "config.json").write_text(json.dumps(["olmoe"]))
    with pytest.raises(CheckpointError, match=r"config\.json` is not a JSON object"):
        open_checkpoint(folder)


def test_folders_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder: .*gone") as caught:
        open_checkpoint(tmp_path / "gone")
    assert "sample" in caught.value.hint
    with pytest.raises(CheckpointError, match=r"no config\.json in") as caught:
        open_checkpoint(tmp_path)
    assert "checkpoint folder" in caught.value.hint
    with pytest.raises(CheckpointError, match="no safetensors files in") as caught:
        open_checkpoint(write_checkpoint(tmp_path, {}))
    assert "safetensors" in caught.value.hint


def test_nothing_but_headers_is_read(tmp_path: Path) -> None:
    """A checkpoint of a terabyte opens at once: its file has a hole instead of weights."""
    size = 1 << 40
    folder = write_checkpoint(tmp_path, {})
    text = json.dumps({"w": entry_fields("U8", (size,), 0, size)}).encode()
    with (folder / "m.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    assert open_checkpoint(folder).tensors["w"].shape == (size,)


# --- from a name to a folder


def test_locate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert home.locate(tmp_path) == tmp_path
    assert home.locate("sample") == home.sample_folder()
    (tmp_path / "sample").mkdir()
    assert home.locate("sample") == Path("sample")  # a folder of that name wins
    with pytest.raises(DownloadError, match="`allenai/OLMoE`") as caught:
        home.locate("allenai/OLMoE")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"no such folder: `\./none/none`"):
        home.locate("./none/none")
