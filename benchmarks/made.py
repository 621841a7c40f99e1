"""What a comparison needs beside the checkpoint, made once and kept: a GGUF file, a pack.

They lie next to the checkpoint, as `NAME.Q4_0.gguf` and `NAME-int4`. What was made only in part
has another name until it is whole.
"""

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import Checkpoint
from benchmarks.child import Done, run_child, say
from benchmarks.group import memory_group

PRECISION = "int4"
PACK_MEMORY_BYTES = 4 << 30  # what packing may take, whatever the checkpoint's size


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack's folder; what making it took is known only if that was now."""

    folder: Path
    bytes: int
    made: Done | None


def gguf_of(checkpoint: Checkpoint) -> Path:
    """The checkpoint in Q4_0. Raises ChildFailedError for another architecture than OLMoE's."""
    file = checkpoint.folder.with_name(f"{checkpoint.name}.Q4_0.gguf")
    if not file.exists():
        say(f"writing {file.name}")
        part = file.with_suffix(".part")
        run_child([sys.executable, "-m", "benchmarks.gguf_file", str(checkpoint.folder), str(part)])
        part.rename(file)
    return file


def pack_of(checkpoint: Checkpoint) -> Pack:
    """The checkpoint packed in int4, within a group of PACK_MEMORY_BYTES where it is made now."""
    folder = checkpoint.folder.with_name(f"{checkpoint.name}-{PRECISION}")
    made = None
    if not folder.exists():
        say(f"packing {folder.name}")
        part = folder.with_name(folder.name + ".part")
        with memory_group(PACK_MEMORY_BYTES) as group:
            made = run_child(pack_command(checkpoint.folder, part), group)
        part.rename(folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Pack(folder, size, made)


def pack_command(folder: Path, out: Path) -> list[str]:
    """`retinue pack` with its JSON."""
    command = [sys.executable, "-m", "retinue", "pack", str(folder), str(out)]
    return [*command, "--precision", PRECISION, "--memory", str(PACK_MEMORY_BYTES), "--json"]


def room_for(checkpoint: Checkpoint, count: int) -> bool:
    """Whether the disk has room for `count` copies of the checkpoint in four bits."""
    return shutil.disk_usage(checkpoint.folder).free > count * checkpoint.total_bytes // 3
