"""What `doctor` says of kernels, rates, huge pages and checksums."""

import json
from pathlib import Path

import pytest

from command import MEMORY, Call, caller, refused
from retinue.cli import findings
from retinue.cli.findings import Finding, fast_paths
from retinue.engine.packing import damaged
from retinue.errors import UsageError
from retinue.memory import native
from retinue.memory.machine import Rate, Speeds

GB = 10**9
AMX = {"avx2", "fma", "avx512_vnni", "avx512bw", "amx_int8", "amx_bf16"}
SPEEDS = Speeds(1 * GB, 20 * GB)


class Library:
    features = "avx512-vnni"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = dict.fromkeys(findings.FORMATS, Rate(15 * GB, 0.4e12))
    monkeypatch.setattr(findings, "known_rates", lambda threads, formats, fresh: rates)
    monkeypatch.setattr(native, "library", Library)
    for name in ("RETINUE_ISA", "RETINUE_NATIVE", "CXX"):
        monkeypatch.delenv(name, raising=False)


def found(flags: set[str] = AMX) -> dict[str, Finding]:
    return {finding.name: finding for finding in fast_paths(flags, SPEEDS, 2)}


def test_each_precision_has_its_share_of_the_memorys_speed() -> None:
    expected = "15.0 GB/s for one token, 75% of the memory's; 0.40 TFLOP/s for many"
    assert [found()[f"{name} weights"].value for name in findings.FORMATS] == [expected] * 3


def test_the_best_kernels_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    best = AMX - {"amx_int8"}
    assert found(best)["native kernels"] == Finding("native kernels", "avx512-vnni")
    assert found()["native kernels"].value == (
        "avx512-vnni, the processor has avx512-amx: the system does not permit avx512-amx"
    )
    monkeypatch.setenv("RETINUE_ISA", "avx512-vnni")
    assert found()["native kernels"].value.endswith("avx512-amx: RETINUE_ISA=avx512-vnni")
    assert found(set())["native kernels"].value == "avx512-vnni"


@pytest.mark.parametrize(("compiler", "good"), [("/usr/bin/c++", False), (None, True)])
def test_without_kernels_it_says_what_is_lost(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, good: bool
) -> None:
    """A problem only where they could be had, and were not turned off."""
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(native, "why_not", lambda: "they were not built")
    monkeypatch.setattr(findings.shutil, "which", lambda name: compiler)
    row = found()["native kernels"]
    assert row.value.startswith("none: they were not built. int8 and int4 are decoded")
    assert (row.good, "pip install" in row.fix) == (good, True)
    monkeypatch.setenv("RETINUE_NATIVE", "0")
    row = found()["native kernels"]
    assert (row.good, row.fix) == (True, "unset RETINUE_NATIVE")


@pytest.mark.parametrize(
    ("text", "fix"), [("always [madvise] never", ""), ("always [never]", "echo")]
)
def test_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, fix: str) -> None:
    monkeypatch.setattr(findings, "HUGE_PAGES", tmp_path / "enabled")
    assert "huge pages" not in found()
    (tmp_path / "enabled").write_text(text)
    assert found()["huge pages"].fix.startswith(fix)
    assert bool(found()["huge pages"].fix) is bool(fix)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.undo()
    monkeypatch.setattr("retinue.cli.doctor.known_speeds", lambda folder, **_: SPEEDS)
    monkeypatch.setattr("retinue.cli.doctor.fast_paths", lambda *_: [])
    return caller(capsys)


def test_a_flipped_bit_is_found(call: Call, olmoe: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    assert call("pack", olmoe, pack, "--precision", "int8", *MEMORY).code == 0
    wrong, count = damaged(pack, lambda done, whole: None)
    assert (count > 32, wrong) == (True, [])
    whole = call("doctor", pack, "--verify", *MEMORY, "--json").document["findings"]
    (row,) = [row for row in whole if row["name"] == "checksums"]
    assert (row["ok"], row["value"]) == (True, f"all {count} parts are as they were written")
    for file in sorted(pack.glob("*.safetensors")):
        content = bytearray(file.read_bytes())
        length = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + length])
        begin = next(e["data_offsets"][0] for k, e in entries.items() if k != "__metadata__")
        content[8 + length + begin + 5] ^= 1
        file.write_bytes(content)
    wrong, _ = damaged(pack, lambda done, whole: None)
    assert len(wrong) == len(list(pack.glob("*.safetensors")))
    done = call("doctor", pack, "--verify", *MEMORY, "--json")
    assert done.code == 1
    (row,) = [row for row in done.document["findings"] if row["name"] == "checksums"]
    assert row["value"].startswith(f"{len(wrong)} of {count} parts are damaged: ")


def test_only_a_pack_can_be_verified(call: Call, olmoe: Path) -> None:
    with pytest.raises(UsageError, match="no pack"):
        damaged(olmoe, lambda done, whole: None)
    refused(call("doctor", olmoe, "--verify"), 2, "no pack")
    refused(call("doctor", "--verify"), 2, "needs a MODEL")
