"""A checkpoint folder as its safetensors headers describe it: which tensor lies in which bytes.

Nothing but headers and JSON files is read here, and nothing is believed: every header is checked
against its file before anyone reads a weight. This module knows no model families.
"""

import json
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from retinue.errors import CheckpointError, Unsupported

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
DTYPE_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}
WEIGHT_DTYPES = ("BF16", "F16", "F32")
QUANTISED = ("mxfp4", "fp8", "retinue")  # what `quant_method` may be; see memory/quantised.py

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint: `[start, stop)` are absolute byte offsets in `file`.

    `checksum` is the CRC-32 of the bytes, where something vouches for them.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    checksum: int | None = field(default=None, kw_only=True)

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors and the configuration of one folder."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({entry.file for entry in self.tensors.values()})


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read configuration and headers of `folder`, and refuse by name what is not served.

    Raises CheckpointError for missing or damaged files, Unsupported for quantised checkpoints
    other than those of `QUANTISED`, pickle files and checkpoints that need code of their own.
    """
    config = _read_config(folder)
    _refuse_unsupported(folder, config)
    tensors: dict[str, TensorEntry] = {}
    for file in weight_files(folder):
        for entry in read_header(file):
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor `{entry.name}` is in two files: `{tensors[entry.name].file.name}`"
                    f" and `{file.name}`",
                    hint=f"the files in `{folder}` do not belong together",
                )
            tensors[entry.name] = entry
    _check_index(folder, tensors)
    return Checkpoint(folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: those that its index names, or all that are there."""
    index = read_index(folder)
    if index is None:
        found = sorted(folder.glob("*.safetensors"))
        if not found:
            raise CheckpointError(
                f"no safetensors files in `{folder}`",
                hint="give the folder that holds config.json and *.safetensors",
            )
        return found
    files = [folder / name for name in sorted(set(index.values()))]
    for file in files:
        if not file.is_file():
            raise CheckpointError(
                f"a shard is missing: `{file.name}`",
                hint=f"the index of `{folder}` names it; download the checkpoint again",
            )
    return files


def read_header(file: Path) -> list[TensorEntry]:
    """The tensors that `file`'s header names, each checked against the file's real size.

    Raises CheckpointError when the header cannot be read or contradicts itself or the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(file, "its header length does not fit the file")
            content = json.loads(handle.read(length))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(file, "its header is not JSON") from error
    if not isinstance(content, dict):
        raise _damaged(file, "its header is not a JSON object")
    content.pop("__metadata__", None)
    entries = [_entry(file, name, fields, 8 + length, size) for name, fields in content.items()]
    _check_overlap(file, entries)
    return entries


def _entry(file: Path, name: str, fields: Any, base: int, size: int) -> TensorEntry:
    try:
        dtype, shape = fields["dtype"], tuple(fields["shape"])
        begin, end = fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(file, f"the entry of `{name}` is incomplete") from error
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise _damaged(file, f"the entry of `{name}` holds numbers that are no sizes")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise Unsupported(f"tensor `{name}` has the type `{dtype}`", hint="bf16, fp16 or fp32")
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise _damaged(file, f"shape and bytes of `{name}` do not agree")
    if base + end > size:
        raise _damaged(file, f"it ends before `{name}` does ({size} bytes of {base + end})")
    return TensorEntry(name, file, dtype, shape, base + begin, base + end)


def _check_overlap(file: Path, entries: list[TensorEntry]) -> None:
    ordered = sorted((e for e in entries if e.stop > e.start), key=lambda e: e.start)
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise _damaged(file, f"`{before.name}` and `{after.name}` overlap")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{file.name}` is damaged or truncated: {what}", hint=f"download `{file}` again"
    )


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"cannot read `{file}`: {error.strerror}", hint="check the file and its permissions"
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{file}` is not JSON: {error}", hint="download it again") from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(
            f"no such folder: `{folder}`",
            hint="give a local checkpoint folder, or `sample` for the model that ships along",
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no config.json in `{folder}`", hint="is this a checkpoint folder?")
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"`{folder / 'config.json'}` is not a JSON object")
    return config


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    # Older checkpoints of compressed-tensors call it so.
    settings = config.get("quantization_config") or config.get("compression_config")
    method = settings.get("quant_method", "?") if isinstance(settings, dict) else "?"
    if settings and method not in QUANTISED:
        raise Unsupported(
            f"checkpoints quantised with `{method}` are not served",
            hint=f"served are {', '.join(QUANTISED[:-1])} and packs of retinue; or use the bf16,"
            " fp16 or fp32 checkpoint",
        )
    if config.get("auto_map"):
        raise Unsupported(
            "the checkpoint needs code of its own (`auto_map` in config.json)",
            hint="retinue never runs code from a checkpoint; use a family of transformers",
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles and not any(folder.glob("*.safetensors")):
        raise Unsupported(
            f"pickle files are not served: `{pickles[0]}`",
            hint="loading them can run code; use or make a safetensors checkpoint",
        )


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor to file name, as the index of `folder` says; None without one."""
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return None
    index = _read_json(file)
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in names.values()
    ):
        raise CheckpointError(f"`{file}` has no usable weight_map", hint="download it again")
    return names


def _check_index(folder: Path, tensors: dict[str, TensorEntry]) -> None:
    for name, file in (read_index(folder) or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(
                f"tensor `{name}` is not in `{file}`, where the index says it is",
                hint=f"the files in `{folder}` do not belong together",
            )
