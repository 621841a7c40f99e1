"""What is left of the machine: /proc and control groups as made-up trees, and real measurements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from retinue.memory import machine
from retinue.memory.machine import (
    PROBE_CHUNK_BYTES,
    Speeds,
    available_bytes,
    cores,
    known_speeds,
    measure_disk,
    measure_memory,
    remembered_speeds,
    resident_bytes,
)

MIB = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


class Tree:
    """A system of files under a temporary root, which the module takes for the real one."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        patch.setattr(machine, "Path", lambda path: root / str(path).lstrip("/"))
        self.write("/proc/meminfo", "MemTotal: 99999999 kB\nMemAvailable:  8192000 kB\n")

    def write(self, path: str, content: object) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")

    def group(self, folder: str, limit: object, used: int, **stat: int) -> None:
        """A control group, with the names of version 1 under `memory`."""
        names = ("memory.max", "memory.current")
        if folder.startswith("/sys/fs/cgroup/memory"):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        self.write(f"{folder}/{names[0]}", limit)
        self.write(f"{folder}/{names[1]}", used)
        lines = [f"{key} {value}" for key, value in ({"anon": 5} | stat).items()]
        self.write(f"{folder}/memory.stat", "\n".join(lines))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


def test_without_groups_the_system_decides(tree: Tree) -> None:
    assert available_bytes() == 8192000 * 1024
    tree.write("/proc/self/cgroup", "0::/user")
    assert available_bytes() == 8192000 * 1024


def test_version_2(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "0::/user/job")
    tree.group("/sys/fs/cgroup/user/job", 900 * MIB, 300 * MIB)
    assert available_bytes() == 600 * MIB


def test_file_cache_of_a_group_can_be_taken_back(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "0::/job")
    tree.group(
        "/sys/fs/cgroup/job", 900 * MIB, 300 * MIB, inactive_file=50 * MIB, active_file=30 * MIB
    )
    assert available_bytes() == 680 * MIB


@pytest.mark.parametrize("tight", ["a", "a/b", "a/b/c"])
def test_the_tightest_group_above_decides(tree: Tree, tight: str) -> None:
    tree.write("/proc/self/cgroup", "0::/a/b/c")
    for folder in ("a", "a/b", "a/b/c"):
        limit = 100 * MIB if folder == tight else 500 * MIB
        tree.group(f"/sys/fs/cgroup/{folder}", limit, 10 * MIB)
    tree.group("/sys/fs/cgroup/a/b/c/d", MIB, 0)  # not above us
    assert available_bytes() == 90 * MIB


def test_no_limit_is_no_limit(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "4:memory:/x\n0::/job")
    tree.group("/sys/fs/cgroup/job", "max", 300 * MIB)
    tree.group("/sys/fs/cgroup/memory/x", 9223372036854771712, 300 * MIB)
    assert available_bytes() == 8192000 * 1024


def test_version_1(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n3:cpuset:/")
    tree.group(
        "/sys/fs/cgroup/memory/docker/abc",
        900 * MIB,
        300 * MIB,
        inactive_file=MIB,
        active_file=MIB,
        total_inactive_file=50 * MIB,
        total_active_file=30 * MIB,
    )
    assert available_bytes() == 680 * MIB


def test_version_1_inside_a_container(tree: Tree) -> None:
    """The path is the host's, and the container's own group is mounted at the root."""
    tree.write("/proc/self/cgroup", "4:memory:/docker/abc")
    tree.group("/sys/fs/cgroup/memory", 200 * MIB, 50 * MIB)
    assert available_bytes() == 150 * MIB


def test_a_group_over_its_limit_leaves_nothing(tree: Tree) -> None:
    tree.write("/proc/self/cgroup", "0::/job")
    tree.group("/sys/fs/cgroup/job", 100 * MIB, 101 * MIB)
    assert available_bytes() == 0


@pytest.mark.parametrize("broken", ["memory.max", "memory.current", "memory.stat"])
def test_a_group_that_cannot_be_read_is_passed_over(tree: Tree, broken: str) -> None:
    tree.write("/proc/self/cgroup", "0::/a/b")
    tree.group("/sys/fs/cgroup/a/b", MIB, 0)
    tree.group("/sys/fs/cgroup/a", 100 * MIB, 0)
    (tree.root / "sys/fs/cgroup/a/b" / broken).unlink()
    assert available_bytes() == 100 * MIB


def test_without_proc_there_is_still_an_answer(tree: Tree) -> None:
    (tree.root / "proc/meminfo").unlink()
    assert available_bytes() > 0


def test_here() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)
    assert 0 < available_bytes() < 1 << 50


# --- this process


@needs_proc
@pytest.mark.parametrize("shell", [[], ["sh", "-c", '"$0" "$@"; :']], ids=["child", "grandchild"])
def test_children_count_as_resident(shell: list[str]) -> None:
    program = "import sys; held = b'x' * (80 << 20); print('ready', flush=True); sys.stdin.read()"
    before = resident_bytes()
    child = subprocess.Popen(
        [*shell, sys.executable, "-S", "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        during, peak = resident_bytes(), resident_bytes(peak=True)
    assert 60 * MIB <= during - before < 400 * MIB
    assert peak >= during - 4 * MIB  # the kernel counts in batches
    assert resident_bytes() < during - 40 * MIB


@needs_proc
def test_peak_remembers() -> None:
    held = b"x" * (64 * MIB)
    most = resident_bytes()
    del held
    assert resident_bytes(peak=True) >= most - 4 * MIB
    assert resident_bytes() < most - 32 * MIB


# --- speeds


@pytest.mark.parametrize("size", [100, 4097, PROBE_CHUNK_BYTES, 3 * PROBE_CHUNK_BYTES + 5])
def test_disk_speed_of_files_of_any_size(tmp_path: Path, size: int) -> None:
    for name, count in (("small", 10), ("large", size)):
        (tmp_path / name).write_bytes(b"x" * count)
    speed = measure_disk([tmp_path / "small", tmp_path / "large"], seconds=0.05)
    assert 1e2 < speed < 1e12


def test_memory_speed() -> None:
    arrays = [np.ones(1 << 17, dtype=np.int64) for _ in range(3)]
    assert 1e7 < measure_memory(threads=2, arrays=arrays) < 1e13


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to measure, with a cache folder of its own and measurements that cost nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    numbers = iter(range(100, 200))
    monkeypatch.setattr(machine, "measure_disk", lambda files: float(next(numbers)))
    monkeypatch.setattr(machine, "measure_memory", lambda **options: 7.0)
    folder = tmp_path / "model"
    folder.mkdir()
    with (folder / "m.safetensors").open("wb") as file:
        file.truncate(machine.LEAST_FILE_BYTES)
    return folder


def test_a_disk_is_no_faster_than_its_limit() -> None:
    speeds = Speeds(5.0, 7.0)
    assert speeds.limited(None) == speeds.limited(6.0) == speeds
    assert speeds.limited(2.0) == Speeds(2.0, 7.0)


def test_speeds_are_remembered_until_measured_afresh(checkpoint: Path, tmp_path: Path) -> None:
    assert known_speeds(checkpoint) == Speeds(100.0, 7.0)
    assert known_speeds(checkpoint) == Speeds(100.0, 7.0)
    assert known_speeds(checkpoint, fresh=True) == Speeds(101.0, 7.0)
    assert known_speeds(checkpoint) == Speeds(101.0, 7.0)
    (store,) = (tmp_path / "cache" / "retinue").iterdir()
    assert json.loads(store.read_text())["disk_bytes_per_s"] == 101.0


def test_what_a_small_checkpoint_says_of_its_disk_is_not_remembered(checkpoint: Path) -> None:
    (checkpoint / "m.safetensors").write_bytes(b"x")
    assert known_speeds(checkpoint) == Speeds(100.0, 7.0)
    assert remembered_speeds(checkpoint) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"speed": 1}'])
def test_a_damaged_memory_is_measured_again(checkpoint: Path, tmp_path: Path, content: str) -> None:
    known_speeds(checkpoint)
    (store,) = (tmp_path / "cache" / "retinue").iterdir()
    store.write_text(content)
    assert known_speeds(checkpoint) == Speeds(101.0, 7.0)
    assert known_speeds(checkpoint) == Speeds(101.0, 7.0)


def test_speeds_of_another_way_of_measuring_are_forgotten(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert known_speeds(checkpoint) == Speeds(100.0, 7.0)
    monkeypatch.setattr(machine, "PROBE", machine.PROBE + 1)
    assert known_speeds(checkpoint) == Speeds(101.0, 7.0)


def test_speeds_that_cannot_be_remembered_are_known_all_the_same(
    checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert known_speeds(checkpoint) == Speeds(100.0, 7.0)
