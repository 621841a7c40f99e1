"""What a pack says of itself: where the parts of its experts lie, shapes, checksums, errors.

A pack is a folder like any checkpoint's, with a file of this description. Dense tensors keep
their names, those that are encoded with `.codes` and `.scales` behind. The experts of a module are
one tensor of bytes, [experts, stride]: each one lies as it does in a slot, aligned for one read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from retinue.errors import CheckpointError, Unsupported
from retinue.memory.base import Extent
from retinue.memory.checkpoint import Checkpoint, TensorEntry
from retinue.memory.formats import Transposed
from retinue.memory.grouped import GROUP, PRECISIONS, Grouped, grouped
from retinue.memory.layout import TORCH_DTYPES, ExpertLayout, Piece, Window
from retinue.memory.quantised import PackedEntry
from retinue.memory.recode import Windows, grouped_window, plain_format

METHOD = "retinue"
VERSION = 1
FILE = "retinue.json"
EXPERTS, CODES, SCALES = ".retinue", ".codes", ".scales"

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(slots=True)
class Manifest:
    """The description. `source` tells the checkpoint that it was made of from others.

    experts: by module its parts and a checksum for each expert; dense: rows and columns of what is
    encoded; checksums: of every dense tensor by its name in the file.
    """

    precision: str
    model: str
    source: str
    experts: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: dict[str, tuple[int, int]] = field(default_factory=dict)
    checksums: dict[str, int] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "version": VERSION,
            "precision": self.precision,
            "model": self.model,
            "source": self.source,
            "summary": self.summary,
            "dense": self.dense,
            "checksums": self.checksums,
            "experts": self.experts,
        }


@dataclass(frozen=True, slots=True)
class StoredExperts:
    """The experts of one module as they lie in a pack."""

    entry: TensorEntry  # uint8 [experts, stride]
    windows: Windows
    weight_bytes: int
    checksums: tuple[int, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each parameter of an expert."""
        return {name: _shape(found) for name, found in self.windows.items()}

    def layouts(self) -> list[ExpertLayout]:
        """How each of them is read and seen."""
        return [self._layout(index) for index in range(len(self.checksums))]

    def _layout(self, index: int) -> ExpertLayout:
        entry, stride = self.entry, self.entry.shape[1]
        start = entry.start + index * stride
        piece = Piece("", entry, start, start + stride, (stride,))
        extent = Extent(entry.file, start, start + stride, start + stride, 0, direct=True)
        return ExpertLayout(
            (piece,),
            (extent,),
            self.windows,
            self.weight_bytes,
            stride,
            checksum=self.checksums[index],
        )


def settings_of(precision: str) -> dict[str, Any]:
    """The `quantization_config` of a pack's config.json."""
    return {"quant_method": METHOD, "format": precision, "group": GROUP, "version": VERSION}


def precision_of(config: Mapping[str, Any]) -> str | None:
    """The precision of the pack with this config.json; None where it is of no pack."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != METHOD:
        return None
    return str(settings.get("format"))


def read_manifest(folder: Path) -> Manifest:
    """The description of the pack in `folder`.

    Raises CheckpointError where it is missing or damaged, Unsupported for another version's.
    """
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("version")
        manifest = Manifest(**content)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(folder, f"`{FILE}` cannot be read") from error
    if version != VERSION or manifest.precision not in PRECISIONS:
        raise Unsupported(
            f"`{folder}` is a pack of version {version} in `{manifest.precision}`",
            hint="pack the model again with this version of retinue, or install a newer one",
        )
    return manifest


@dataclass(frozen=True, slots=True)
class Pack(Checkpoint):
    """A folder that `retinue pack` wrote: `experts`, by their module, are not among the tensors."""

    experts: dict[str, StoredExperts]


def explain_pack(checkpoint: Checkpoint) -> Pack:
    """`checkpoint`, a pack, with dense tensors under their plain names and its experts apart.

    Raises CheckpointError when something is missing or does not belong together.
    """
    manifest = read_manifest(checkpoint.folder)
    tensors = dict(checkpoint.tensors)
    experts = {}
    try:
        for name, checksum in manifest.checksums.items():
            tensors[name] = replace(tensors[name], checksum=checksum)
        for name, shape in manifest.dense.items():
            codes, scales = tensors.pop(name + CODES), tensors.pop(name + SCALES)
            tensors[name] = _dense(name, manifest.precision, shape, codes, scales)
        for name, content in manifest.experts.items():
            experts[name] = _stored(tensors.pop(name + EXPERTS), manifest.precision, content)
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(checkpoint.folder, f"it lacks {error}") from error
    for name in tensors:
        if name.endswith((EXPERTS, CODES, SCALES)):
            raise _damaged(checkpoint.folder, f"nothing describes `{name}`")
    return Pack(checkpoint.folder, checkpoint.config, tensors, experts)


def parts_of(windows: Windows) -> list[dict[str, Any]]:
    """`windows` as the description has them."""
    return [
        {"parameter": name, **_part(window)} for name, found in windows.items() for window in found
    ]


def _part(window: Window) -> dict[str, Any]:
    if window.format is None or window.scales is None:
        dtype = _NAMES[window.dtype]
        return {"at": window.offset, "dtype": dtype, "shape": list(window.shape)}
    transposed, block = isinstance(window.format, Transposed), plain_format(window.format)
    size = {"rows": block.rows, "columns": block.columns, "transposed": transposed}
    return {"codes": window.offset, "scales": window.scales.offset, **size}


def _windows(precision: str, parts: list[dict[str, Any]]) -> tuple[Windows, int]:
    """The windows, and the bytes that they show."""
    found: dict[str, list[Window]] = {}
    count = 0
    for part in parts:
        blocks = found.setdefault(part["parameter"], [])
        if "dtype" in part:
            window = Window(part["at"], TORCH_DTYPES[part["dtype"]], tuple(part["shape"]))
            count += window.dtype.itemsize * prod(window.shape)
        else:
            block = Grouped(PRECISIONS[precision], part["rows"], part["columns"])
            form = grouped(precision, block.rows, block.columns, transposed=part["transposed"])
            window = grouped_window(form, block, part["codes"], part["scales"])
            count += block.stored_bytes
        blocks.append(window)
    return {name: tuple(blocks) for name, blocks in found.items()}, count


def _shape(windows: tuple[Window, ...]) -> tuple[int, ...]:
    """Of the parameter whose outputs lie in these windows."""
    shapes = [window.shape for window in windows]
    outputs = 0
    if windows[0].format is not None:
        matrices = [plain_format(window.format) for window in windows if window.format is not None]
        outputs = 1 if isinstance(windows[0].format, Transposed) else 0
        shapes = [
            (form.columns, form.rows) if outputs else (form.rows, form.columns) for form in matrices
        ]
    total = sum(shape[outputs] for shape in shapes)
    return (*shapes[0][:outputs], total, *shapes[0][outputs + 1 :])


def _stored(entry: TensorEntry, precision: str, content: dict[str, Any]) -> StoredExperts:
    windows, count = _windows(precision, content["parts"])
    checksums = tuple(content["checksums"])
    if entry.dtype != "U8" or len(entry.shape) != 2 or entry.shape[0] != len(checksums):
        raise ValueError(entry.name)
    return StoredExperts(entry, windows, count, checksums)


def _dense(
    name: str, precision: str, shape: tuple[int, int], codes: TensorEntry, scales: TensorEntry
) -> PackedEntry:
    form = Grouped(PRECISIONS[precision], *shape)
    if form.shape(codes.shape, scales.shape) is None:
        raise ValueError(name)
    return PackedEntry(
        name, codes.file, codes.dtype, tuple(shape), codes.start, codes.stop, form, codes, scales
    )


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the pack in `{folder}` is damaged or unfinished: {what}",
        hint="run the same `retinue pack` again, or delete the folder first",
    )
