"""A memory control group for one child, so that nobody's page cache is free.

Without one, an engine that reads through the page cache has the whole machine's memory as a
cache, whatever limit it was given. Needs root and control groups (v2 or v1); where that is
not permitted the benchmark goes on and says so.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
UNLIMITED = (
    "no memory control group is permitted here ({reason}): what reads through the page cache,"
    " as the peer does, enjoys the memory that the limit leaves free"
)
CACHES_KEPT = "the page cache could not be dropped ({reason}): files may have been read from it"

# The shell puts itself into the group and then becomes the command: all of it is counted.
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Group:
    """A group that is there, or (`folder` None) the lack of one; `notes` say what is missing."""

    folder: Path | None
    notes: tuple[str, ...] = ()

    def wrap(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` within the group."""
        if self.folder is None:
            return list(command)
        return ["sh", "-c", _ENTER, str(self.folder / "cgroup.procs"), *command]

    def peak_bytes(self) -> int | None:
        """The most that was charged to the group, page cache included."""
        if self.folder is not None:
            for name in ("memory.peak", "memory.max_usage_in_bytes"):
                with suppress(OSError, ValueError):
                    return int((self.folder / name).read_text())
        return None


@contextmanager
def memory_group(limit_bytes: int, *, drop: bool = True) -> Iterator[Group]:
    """A group of at most `limit_bytes`, its page cache included; it is removed at the end.

    Drops the page cache first (all of the machine's): pages that others paid for are free.
    """
    try:
        folder = _create(limit_bytes)
    except OSError as error:
        yield Group(None, (UNLIMITED.format(reason=error.strerror or error),))
        return
    try:
        yield Group(folder, _drop_caches() if drop else ())
    finally:
        _remove(folder)


def _create(limit_bytes: int) -> Path:
    unified = (ROOT / "cgroup.controllers").is_file()
    # The second is for swap: it may be missing, as where there is none.
    first, second = (
        ("memory.max", "memory.swap.max")
        if unified
        else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    )
    folder = (ROOT if unified else ROOT / "memory") / f"retinue-benchmark-{os.getpid()}"
    folder.mkdir()
    try:
        _write(folder / first, limit_bytes)
    except OSError:
        _remove(folder)
        raise
    with suppress(OSError):
        _write(folder / second, 0 if unified else limit_bytes)
    return folder


def _write(file: Path, value: int) -> None:
    # Opened for writing alone, which some control files insist on, and never created.
    handle = os.open(file, os.O_WRONLY)
    try:
        os.write(handle, str(value).encode())
    finally:
        os.close(handle)


def _drop_caches() -> tuple[str, ...]:
    os.sync()
    try:
        _write(DROP_CACHES, 3)
    except OSError as error:
        return (CACHES_KEPT.format(reason=error.strerror or error),)
    return ()


def _remove(folder: Path) -> None:
    """Remove the group; the kernel may take a moment to see that its last process is gone."""
    for _ in range(50):
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
