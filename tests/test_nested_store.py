"""The nested store: derived once, resumed, checked; read through the mover into ordinary slots."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from disk import PATIENCE_S
from retinue.config import Config
from retinue.errors import CheckpointError, ReadError, Unsupported, WriteError
from retinue.memory import nested_store
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.layout import ExpertLayout
from retinue.memory.mover import Mover, Urgency
from retinue.memory.nested_store import NestedStore, derive, forms_of, nested_folder
from retinue.memory.tier import Tier
from retinue.model.load import build
from retinue.types import Expert


@pytest.fixture
def layouts(olmoe: Path) -> list:
    return build(open_checkpoint(olmoe), Config().precision).experts.layouts


@pytest.fixture
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


class Breaking:
    """A source that fails at its n-th read, and counts."""

    def __init__(self, inner: Reader, at: int, error: BaseException) -> None:
        self._inner, self._at, self._error, self.reads = inner, at, error, 0

    def read(self, file: Path, offset: int, into: memoryview, *, direct: bool) -> int:
        self.reads += 1
        if self.reads == self._at:
            raise self._error
        return self._inner.read(file, offset, into, direct=direct)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def parameters(layout: ExpertLayout, slot: Tier) -> dict[str, torch.Tensor]:
    return {name: blocks[0].clone() for name, blocks in layout.views(slot.tensor(0)).items()}


def read_all(store: NestedStore, layouts: list, reader: Reader, precision: str) -> list[dict]:
    """Every expert through a mover; its parameters, as they then lie in the slot."""
    mover = Mover(reader, readers=2)
    found = []
    try:
        for layer, row in enumerate(layouts):
            for index, layout in enumerate(row):
                slot = Tier(1, layout.slot_bytes)
                task = store.task(Expert(layer, index), precision, slot.tensor(0))
                ticket = mover.submit_task(task, Urgency.DEMAND)
                assert mover.wait(lambda made=ticket: made.settled, PATIENCE_S)
                if ticket.error is not None:
                    raise ticket.error
                found.append(parameters(layout, slot))
    finally:
        mover.close()
    return found


def plain(layouts: list, reader: Reader) -> list[dict]:
    found = []
    for row in layouts:
        for layout in row:
            slot = Tier(1, layout.slot_bytes)
            nested_store.read_plain(layout, slot.memory(0), reader)
            found.append(parameters(layout, slot))
    return found


def test_every_expert_is_there_in_every_precision(
    layouts: list, reader: Reader, tmp_path: Path
) -> None:
    written = derive(tmp_path, layouts, reader, "tiny")
    assert written == sum(file.stat().st_size for file in tmp_path.glob("*.experts"))
    store = NestedStore(tmp_path, layouts)
    own, sizes = plain(layouts, reader), []
    for precision in ("int2", "int4", "int8"):
        for before, after in zip(own, read_all(store, layouts, reader, precision), strict=True):
            assert before.keys() == after.keys()
            lost = sum(float((before[k] - after[k]).float().square().sum()) for k in before)
            whole = sum(float(before[k].float().square().sum()) for k in before)
            assert lost / whole < {"int2": 0.2, "int4": 0.02, "int8": 1e-4}[precision]
        sizes.append((store.used_bytes(0, precision), store.read_bytes(0, precision)))
    assert sizes == sorted(sizes)
    assert all(used <= read for used, read in sizes)


def test_what_is_whole_is_not_written_again(layouts: list, reader: Reader, tmp_path: Path) -> None:
    derive(tmp_path, layouts, reader, "tiny")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert derive(tmp_path, layouts, Breaking(reader, 1, AssertionError()), "tiny") == 0
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ReadError("the disk is gone")])
def test_a_derivation_that_ends_is_resumed(
    error: BaseException, layouts: list, reader: Reader, tmp_path: Path
) -> None:
    reads = [sum(len(layout.extents) for layout in row) for row in layouts]
    first = Breaking(reader, sum(reads[:2]) + 2, error)
    with pytest.raises(type(error)):
        derive(tmp_path, layouts, first, "tiny")
    assert files(tmp_path) == [
        f"layer-00{n}.{kind}" for n in (0, 1) for kind in ("experts", "json")
    ]
    second = Breaking(reader, -1, error)
    derive(tmp_path, layouts, second, "tiny")
    assert second.reads == sum(reads[2:]), "what was whole is not read again"
    NestedStore(tmp_path, layouts)
    whole = tmp_path / "again"
    derive(whole, layouts, reader, "tiny")
    for file in whole.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_killed_derivation_leaves_nothing_that_counts(
    layouts: list, reader: Reader, tmp_path: Path
) -> None:
    """Drafts of processes that are no more are deleted; one of a living process is left alone."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = tmp_path / f"layer-000.experts.{gone.pid}.part"
    dead.write_bytes(b"half")
    living = tmp_path / f"layer-000.experts.{os.getppid()}.part"
    living.write_bytes(b"half")
    (tmp_path / "layer-001.experts").write_bytes(b"records without an index")
    (tmp_path / "layer-002.json").write_text("{half an ind")
    (tmp_path / "layer-003.json").write_text('{"record": 64}')
    derive(tmp_path, layouts, reader, "tiny")
    assert not dead.exists()
    assert living.exists()
    NestedStore(tmp_path, layouts)


@pytest.mark.parametrize("precision", ["int2", "int4", "int8"])
def test_a_flipped_bit_is_noticed(
    precision: str, layouts: list, reader: Reader, tmp_path: Path
) -> None:
    derive(tmp_path, layouts, reader, "tiny")
    file = tmp_path / "layer-001.experts"
    data = bytearray(file.read_bytes())
    form = forms_of(layouts)[1]
    bits = {"int2": 2, "int4": 4, "int8": 8}[precision]
    place = form.record_bytes + form.head_bytes + form.groups * 4 * bits - 1  # of expert 1
    data[place] ^= 16
    file.write_bytes(data)
    store = NestedStore(tmp_path, layouts)
    with pytest.raises(CheckpointError, match=r"checksum of expert 1 is wrong") as caught:
        read_all(store, layouts, reader, precision)
    assert str(tmp_path) in caught.value.hint
    assert "made anew" in caught.value.hint


def test_a_file_that_was_cut_is_made_anew(layouts: list, reader: Reader, tmp_path: Path) -> None:
    derive(tmp_path, layouts, reader, "tiny")
    file = tmp_path / "layer-001.experts"
    size = file.stat().st_size
    os.truncate(file, size // 2)
    assert derive(tmp_path, layouts, reader, "tiny") == size


def test_an_index_of_another_model(layouts: list, reader: Reader, tmp_path: Path) -> None:
    derive(tmp_path, layouts, reader, "tiny")
    file = tmp_path / "layer-000.json"
    good = json.loads(file.read_text())
    short = [checksums[:2] for checksums in good["checksums"]]
    for change in ({"record": 64}, {"checksums": []}, {"checksums": short}, {"record": None}):
        file.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match="does not fit the model"):
            NestedStore(tmp_path, layouts)


def test_a_disk_that_is_full(
    layouts: list, reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = nested_store.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(nested_store.shutil, "disk_usage", lambda path: free)
    with pytest.raises(WriteError, match="the disk has 1000 B left") as caught:
        derive(tmp_path / "store", layouts, reader, "tiny")
    assert "XDG_CACHE_HOME" in caught.value.hint
    assert not (tmp_path / "store").exists()


def test_experts_that_are_encoded_are_refused(olmoe: Path) -> None:
    encoded = build(open_checkpoint(olmoe), "int8").experts.layouts
    with pytest.raises(Unsupported, match="other form than plain numbers") as caught:
        forms_of(encoded)
    assert "as-is" in caught.value.hint


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nested_folder("ab" * 32).parent == tmp_path / "retinue" / "nested"
    assert nested_folder("ab" * 32) != nested_folder("cd" * 32)
