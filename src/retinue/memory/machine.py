"""What this machine has left and how fast it is: memory, control groups, cores, disk, bandwidth.

Speeds are measured, never assumed; the last ones are remembered per disk, so that `plan` can
answer at once. Linux first: elsewhere the parts that cannot be known are left out.
"""

import json
import math
import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from retinue.errors import ReadError
from retinue.memory.files import ALIGNMENT, Reader
from retinue.memory.tier import Tier

PROBE_CHUNK_BYTES = 4 << 20
PROBE_BYTES = 384 << 20
LEAST_FILE_BYTES = 32 << 20  # of which a measured speed is worth remembering
PROBE = 3  # raise it when speeds are measured in another way: what was remembered is then forgotten
_NO_LIMIT = 1 << 60


def cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_name() -> str:
    """The processor and how many of its cores are ours: what measured costs are good for."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
                break
    return f"{model}, {cores()} cores"


@dataclass(frozen=True, slots=True)
class CoreTimes:
    """Seconds that cores were busy for all programs, and for this process and its children."""

    at: float
    everyone: float
    own: float

    def others_until(self, later: "CoreTimes") -> float:
        """How many cores other programs took, on average, from now to `later`."""
        seconds = later.at - self.at
        busy = (later.everyone - self.everyone) - (later.own - self.own)
        return max(0.0, busy / seconds) if seconds > 0 else 0.0


def core_times() -> CoreTimes:
    """As of now; where that cannot be known, nobody but this process was ever busy."""
    spent = os.times()
    own = everyone = spent.user + spent.system + spent.children_user + spent.children_system
    with suppress(OSError, ValueError, IndexError, AttributeError):
        words = Path("/proc/stat").read_text().split(maxsplit=9)
        # user, nice, system, (idle, waiting for reads), interrupts twice
        ticks = sum(int(words[at]) for at in (1, 2, 3, 6, 7))
        everyone = ticks / os.sysconf("SC_CLK_TCK")
    return CoreTimes(time.monotonic(), everyone, own)


def available_bytes() -> int:
    """Memory that this process could still take: what the system and its control groups leave."""
    return max(0, min([_system_available(), *_group_headrooms()]))


def resident_bytes(*, peak: bool = False) -> int:
    """Resident memory of this process and its children; `peak`: the highest of this process,
    plus what its children hold now."""
    own = _status(os.getpid(), "VmHWM" if peak else "VmRSS")
    if own is None:
        own = _resident_elsewhere()
    return own + sum(_status(child, "VmRSS") or 0 for child in _children(os.getpid()))


def forget_peak() -> bool:
    """Let the peak of this process begin anew at what it holds now; False where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _system_available() -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 8 << 30


def _group_headrooms() -> Iterator[int]:
    """What each control group above this process still allows (v2 and v1)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            if (headroom := _headroom(folder, limit, usage)) is not None:
                yield headroom


def _headroom(folder: Path, limit: str, usage: str) -> int | None:
    try:
        most = int((folder / limit).read_text())
        used = int((folder / usage).read_text())
        stat = (folder / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such file, or the word "max"
        return None
    if most >= _NO_LIMIT:
        return None
    cache = {key: int(value) for key, value in (line.split() for line in stat)}
    files = cache.get("total_inactive_file", cache.get("inactive_file", 0))
    files += cache.get("total_active_file", cache.get("active_file", 0))
    return most - used + files


def _status(pid: int, key: str) -> int | None:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    return None


def _children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                for child in (task / "children").read_text().split():
                    yield int(child)
                    yield from _children(int(child))


def _resident_elsewhere() -> int:
    """The peak, where there is no /proc: in KiB on BSD, in bytes on macOS, unknown on Windows."""
    try:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        return 0


def measure_disk(files: Sequence[Path], *, seconds: float = 0.5, readers: int = 4) -> float:
    """Bytes a second that direct reads of `files`, largest first, reach here.

    They go into slots like those of experts: into small pages, a disk that brings 3.7 GB/s brought
    1.3. Takes 16 MiB of memory for a moment.
    """
    file = max(files, key=lambda f: f.stat().st_size)
    chunk, blocks = _blocks(file.stat().st_size)
    reader, lock = Reader(), threading.Lock()
    start_block = time.monotonic_ns() % blocks
    tier = Tier(readers, chunk)
    views = [tier.memory(slot) for slot in range(readers)]
    for view in views:
        view[:] = bytes(chunk)  # new pages are slow
    deadline, done, taken = time.perf_counter() + seconds, 0, 0

    def work(view: memoryview) -> None:
        nonlocal done, taken
        with suppress(ReadError):
            while time.perf_counter() < deadline:
                with lock:
                    block, taken = (start_block + taken) % blocks, taken + 1
                got = reader.read(file, block * chunk, view, direct=True)
                with lock:
                    done += got

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(view,)) for view in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - started
    reader.close()
    if not done:
        raise ReadError(f"cannot read `{file}`", hint="check the disk and the file")
    return done / elapsed


def _blocks(size: int) -> tuple[int, int]:
    """How a file of so many bytes is read: bytes at a time, and how many times."""
    whole = max(1, -(-size // ALIGNMENT)) * ALIGNMENT
    chunk = min(PROBE_CHUNK_BYTES, whole)
    return chunk, max(1, size // chunk)


def measure_memory(
    *,
    threads: int,
    arrays: Sequence[npt.NDArray[np.int64]] | None = None,
    at_most_bytes: int = PROBE_BYTES,
) -> float:
    """Bytes a second that `threads` threads together read from memory.

    They read `arrays`, or new ones of `at_most_bytes` in all.
    """
    if arrays is None:
        count = max(at_most_bytes // threads, 1 << 20) // 8
        arrays = [np.ones(count, dtype=np.int64) for _ in range(threads)]
    parts = [arrays[start::threads] for start in range(threads)]
    total = sum(array.nbytes for array in arrays)
    best = 0.0
    for _ in range(3):
        workers = [threading.Thread(target=_read_all, args=(part,)) for part in parts]
        started = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, total / (time.perf_counter() - started))
    return best


def _read_all(arrays: Sequence[npt.NDArray[np.int64]]) -> None:
    for array in arrays:
        array.max()


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured ceilings of this machine, in bytes a second."""

    disk_bytes_per_s: float
    memory_bytes_per_s: float

    def limited(self, disk_bytes_per_s: float | None) -> "Speeds":
        """The same with a disk that is no faster than this."""
        most = math.inf if disk_bytes_per_s is None else disk_bytes_per_s
        return Speeds(min(self.disk_bytes_per_s, most), self.memory_bytes_per_s)


@dataclass(frozen=True, slots=True)
class Rate:
    """How fast all threads together multiply by weights of one format."""

    row_bytes_per_s: float  # bytes of weights, for one token
    flops_per_s: float  # floating-point operations, for many tokens


Rates = Mapping[str, Rate]  # by format: bfloat16, float16, float32, int8, int4


def cache_folder() -> Path:
    """Where retinue keeps what it can always measure or compute again."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "retinue"


def known_speeds(folder: Path, *, fresh: bool = False, at_most_bytes: int = PROBE_BYTES) -> Speeds:
    """The speeds for checkpoints in `folder`: remembered per disk, or measured now.

    Measuring takes `at_most_bytes` of memory for a moment. What a checkpoint of a few MB says of
    its disk is not remembered: it would be taken for what others see there.
    """
    if not fresh and (found := remembered_speeds(folder)) is not None:
        return found
    files = [file for file in folder.iterdir() if file.suffix == ".safetensors"]
    speeds = Speeds(
        measure_disk(files),
        measure_memory(threads=cores(), at_most_bytes=min(at_most_bytes, PROBE_BYTES)),
    )
    if max(file.stat().st_size for file in files) < LEAST_FILE_BYTES:
        return speeds
    store = _store(folder)
    with suppress(OSError):
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(asdict(speeds)))
    return speeds


def remembered_speeds(folder: Path) -> Speeds | None:
    """The speeds that were measured last for checkpoints on the disk of `folder`, if any were."""
    with suppress(OSError, ValueError, TypeError):
        return Speeds(**json.loads(_store(folder).read_text()))
    return None


def _store(folder: Path) -> Path:
    return cache_folder() / f"speeds-{PROBE}-{folder.stat().st_dev}-{cores()}.json"
