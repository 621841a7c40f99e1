"""The nested store: every expert of a model in int8, int4 and int2, derived once into the cache.

A file for each layer holds its experts' records (`nested.py`), one beside it sizes and checksums.
Either is written aside and named when all of it is on the disk, the records first, so that a
derivation that ends in whatever way goes on where it stopped. The folder may be deleted at any
time while nobody uses it; it is made anew from the checkpoint.
"""

import json
import logging
import os
import queue
import shutil
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from retinue.config import format_size
from retinue.errors import CheckpointError, Unsupported, WriteError
from retinue.memory.intake import read_plain, stages_of
from retinue.memory.layout import ExpertLayout
from retinue.memory.machine import cache_folder
from retinue.memory.mover import Source, Task
from retinue.memory.nested import PRECISIONS, NestedForm, decode, encode, form_of
from retinue.memory.pack import writing
from retinue.memory.tier import Tier
from retinue.types import Expert

log = logging.getLogger("retinue")

VERSION = 1
WIDTHS = (2, 4, 8)  # in the order of a record's checksums
Layouts = Sequence[Sequence[ExpertLayout]]


def nested_folder(source: str) -> Path:
    """Where the store of a checkpoint lies; `source` is a digest that tells it from others."""
    return cache_folder() / "nested" / f"{source[:16]}-v{VERSION}"


def forms_of(layouts: Layouts) -> list[NestedForm | None]:
    """By layer how its experts are nested, None where it has none.

    Raises Unsupported where their weights are not plain numbers, such as in a pack.
    """
    forms: list[NestedForm | None] = []
    for layer, row in enumerate(layouts):
        found = {form_of(layout) for layout in row}
        if None in found or len(found) > 1:
            raise Unsupported(
                f"the experts of layer {layer} are stored in another form than plain numbers of"
                " one shape, from which lower precisions are derived",
                hint="use the bf16, fp16 or fp32 checkpoint with `--precision as-is`, or a preset"
                " that reads no other precision",
            )
        forms.append(found.pop() if found else None)
    return forms


def derive(folder: Path, layouts: Layouts, source: Source, name: str) -> int:
    """Write what the store lacks; returns the bytes that were written, 0 if it was whole.

    `name` is the model's, for people. Raises WriteError where the disk is full, Unsupported as
    `forms_of`, and the error of a read.
    """
    forms = forms_of(layouts)
    left = [layer for layer, form in enumerate(forms) if form and not _is_whole(folder, layer)]
    if not left:
        return 0
    needed = sum(_layer_bytes(forms[layer], layouts[layer]) for layer in left)
    _check_space(folder, needed)
    log.warning(
        "deriving the experts of %s in int8, int4 and int2, once: %s to %s",
        name,
        format_size(needed),
        folder,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _forget_drafts(folder)
    for layer in left:
        form = forms[layer]
        assert form is not None
        _write_layer(folder, layer, form, layouts[layer], source)
    return needed


def _write_layer(
    folder: Path, layer: int, form: NestedForm, row: Sequence[ExpertLayout], source: Source
) -> None:
    stage = Tier(1, max(layout.slot_bytes for layout in row))
    record = torch.empty(form.record_bytes, dtype=torch.uint8)
    draft = _draft(_records(folder, layer))
    checksums = []
    try:
        with writing(folder), draft.open("wb") as file:
            for layout in row:
                read_plain(layout, stage.memory(0), source)
                encode(form, layout.views(stage.tensor(0)), record)
                data = memoryview(record.numpy())  # type: ignore[arg-type]
                checksums.append(_checksums(form, data))
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with writing(folder):
            draft.replace(_records(folder, layer))
            _put(_index(folder, layer), {"record": form.record_bytes, "checksums": checksums})
    finally:
        stage.release()
        draft.unlink(missing_ok=True)


def _checksums(form: NestedForm, data: memoryview) -> list[int]:
    """Of each prefix of a record, the shortest first."""
    found, total, start = [], 0, 0
    for bits in WIDTHS:
        stop = form.prefix_bytes(bits)
        total = zlib.crc32(data[start:stop], total)
        found.append(total)
        start = stop
    return found


@dataclass(frozen=True, slots=True)
class _Layer:
    form: NestedForm
    file: Path
    checksums: list[list[int]]  # by expert and width


@dataclass(frozen=True, slots=True)
class _Contents:
    """An index: bytes of each of the records, and checksums by expert and width."""

    record: int
    checksums: list[list[int]]


class NestedStore:
    """Reads experts of lower precisions into slots, decoded to what the checkpoint has there.

    So kernels know nothing of it, and a lower precision saves reading, not room. Records are read
    into one of a few stages, whose number bounds the memory; reader threads decode.
    Raises CheckpointError where the store is damaged.
    """

    def __init__(self, folder: Path, layouts: Layouts) -> None:
        self._layouts = layouts
        self._layers: list[_Layer | None] = []
        for layer, form in enumerate(forms_of(layouts)):
            self._layers.append(_open(folder, layer, form, len(layouts[layer])) if form else None)
        self._stages: queue.SimpleQueue[int] = queue.SimpleQueue()
        size = stage_bytes(layouts)
        self._tier = Tier(stages_of(size), size)
        for stage in range(self._tier.slots):
            self._stages.put(stage)
        self._checked: set[tuple[Expert, int]] = set()  # members are added by reader threads
        self._lock, self._decoded, self._decoding_s = Lock(), 0, 0.0

    def task(self, expert: Expert, precision: str, slot: torch.Tensor) -> Task:
        """What reads `expert` into `slot` in `int8`, `int4` or `int2`."""
        return partial(self._read, expert, PRECISIONS[precision], slot)

    def read_bytes(self, layer: int, precision: str) -> int:
        """Bytes that a read of any expert of `layer` moves; 0 where there are none."""
        found = self._layers[layer]
        return 0 if found is None else found.form.prefix_bytes(PRECISIONS[precision])

    def used_bytes(self, layer: int, precision: str) -> int:
        """Of these, those of weights and scales."""
        found = self._layers[layer]
        return 0 if found is None else found.form.used_bytes(PRECISIONS[precision])

    @property
    def decode_s(self) -> float | None:
        """What decoding a record took, on average; None where none was decoded."""
        with self._lock:
            return self._decoding_s / self._decoded if self._decoded else None

    def _read(self, expert: Expert, bits: int, slot: torch.Tensor, source: Source) -> int:
        layer = self._layers[expert.layer]
        assert layer is not None
        size, stage = layer.form.prefix_bytes(bits), self._stages.get()
        try:
            into = self._tier.memory(stage)[:size]
            start = expert.index * layer.form.record_bytes
            got = source.read(layer.file, start, into, direct=True)
            self._check(layer, expert, bits, into[:got])
            started = time.perf_counter()
            views = self._layouts[expert.layer][expert.index].views(slot)
            decode(layer.form, self._tier.tensor(stage), bits, views)
            with self._lock:
                self._decoded += 1
                self._decoding_s += time.perf_counter() - started
            return got
        finally:
            self._stages.put(stage)

    def _check(self, layer: _Layer, expert: Expert, bits: int, data: memoryview) -> None:
        """Compare with the checksum, the first time."""
        if (expert, bits) in self._checked:
            return
        if zlib.crc32(data) != layer.checksums[expert.index][WIDTHS.index(bits)]:
            raise _damaged(layer.file, f"the checksum of expert {expert.index} is wrong")
        self._checked.add((expert, bits))


def stage_bytes(layouts: Layouts) -> int:
    """Memory of one stage."""
    return max(form.record_bytes for form in forms_of(layouts) if form)


def _open(folder: Path, layer: int, form: NestedForm, experts: int) -> _Layer:
    index = _read_index(folder, layer)
    if index is None or (index.record, len(index.checksums)) != (form.record_bytes, experts):
        raise _damaged(_index(folder, layer), "it does not fit the model")
    return _Layer(form, _records(folder, layer), index.checksums)


def _is_whole(folder: Path, layer: int) -> bool:
    """Whether a layer's records are all there, as far as sizes say."""
    index = _read_index(folder, layer)
    if index is None:
        return False
    try:
        size = _records(folder, layer).stat().st_size
    except OSError:
        return False
    return size == index.record * len(index.checksums)


def _read_index(folder: Path, layer: int) -> _Contents | None:
    """What the index of a layer says; None where there is none, or it is damaged."""
    try:
        content = json.loads(_index(folder, layer).read_text(encoding="utf-8"))
        checksums = [[int(prefix) for prefix in record] for record in content["checksums"]]
        whole = all(len(record) == len(WIDTHS) for record in checksums)
        return _Contents(int(content["record"]), checksums) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _records(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.experts"


def _index(folder: Path, layer: int) -> Path:
    return folder / f"layer-{layer:03d}.json"


def _put(file: Path, content: dict[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    draft = _draft(file)
    try:
        with draft.open("w", encoding="utf-8") as handle:
            json.dump(content, handle)
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _draft(file: Path) -> Path:
    return file.with_name(f"{file.name}.{os.getpid()}.part")


def _forget_drafts(folder: Path) -> None:
    """Delete what processes left behind that are no more."""
    for draft in folder.glob("*.part"):
        try:
            os.kill(int(draft.suffixes[-2][1:]), 0)
        except ProcessLookupError:
            draft.unlink(missing_ok=True)
        except (OSError, ValueError, IndexError):
            continue  # another user's process, or no draft of ours


def _layer_bytes(form: NestedForm | None, row: Sequence[ExpertLayout]) -> int:
    return 0 if form is None else form.record_bytes * len(row)


def _check_space(folder: Path, needed: int) -> None:
    parent = folder
    while not parent.is_dir():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise WriteError(
            f"lower precisions of the experts need {format_size(needed)} in `{folder}`, and the"
            f" disk has {format_size(free)} left",
            hint="free some space, set XDG_CACHE_HOME to a folder on another disk, or use a preset"
            " that reads no other precision",
        )


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{file}` is damaged: {what}",
        hint=f"delete `{file.parent}`: it is made anew from the checkpoint",
    )
