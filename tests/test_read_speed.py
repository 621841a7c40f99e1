"""How fast reads are: a slower disk's speed is found again, and what cannot be measured is said."""

from pathlib import Path

import pytest

from retinue.errors import ReadError
from retinue.memory.read_speed import measure_reads

MIB = 1 << 20


def test_a_limit_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(4 * MIB))
    (tmp_path / "small.safetensors").write_bytes(bytes(10))
    speed = measure_reads(tmp_path, MIB // 4, limit=40e6)
    assert speed.bytes_per_s == pytest.approx(40e6, rel=0.25)
    assert 0 <= speed.latency_s < 0.01
    assert measure_reads(tmp_path, MIB // 4).bytes_per_s > speed.bytes_per_s


def test_a_file_of_less_than_one_read(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(9000))
    assert measure_reads(tmp_path, MIB).bytes_per_s > 0


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="nothing to read"):
        measure_reads(tmp_path, MIB)
