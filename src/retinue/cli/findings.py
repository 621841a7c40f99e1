"""What `doctor` says of a machine's fast paths: kernels, instructions, how fast they multiply."""

import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from retinue.memory import native
from retinue.memory.machine import Rates, Speeds
from retinue.memory.rates import known_rates

FORMATS = ("bfloat16", "int8", "int4")
# What runs, the best first, and the processor's flags that it needs.
NEEDS = {
    "avx512-amx": {"avx512_vnni", "amx_int8", "amx_bf16"},
    "avx512-vnni": {"avx512_vnni", "avx512bw"},
    "avx2": {"avx2", "fma"},
}
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LOST = "int8 and int4 are decoded for every token, bf16 and each step take longer"
BUILD = "pip install --force-reinstall --no-deps retinue"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, what was found, and what to do if it is a problem."""

    name: str
    value: str
    good: bool = True
    fix: str = ""


def fast_paths(flags: set[str], speeds: Speeds, threads: int) -> list[Finding]:
    """Which kernels run and how fast; measures for about a second. `flags`: the processor's."""
    rates = known_rates(threads, FORMATS, fresh=True)
    return [_kernels(flags), *_rates(rates, speeds), *_huge_pages()]


def _kernels(flags: set[str]) -> Finding:
    library = native.library()
    if library is None:
        return _none(native.why_not() or "")
    best = next((name for name, needed in NEEDS.items() if needed <= flags), library.features)
    if best == library.features:
        return Finding("native kernels", library.features)
    isa = os.environ.get("RETINUE_ISA")
    reason = f"RETINUE_ISA={isa}" if isa else f"the system does not permit {best}"
    return Finding("native kernels", f"{library.features}, the processor has {best}: {reason}")


def _none(why: str) -> Finding:
    """Without a library: a problem where a compiler could build it and nobody has turned it off."""
    value = f"none: {why}. {LOST}"
    if os.environ.get(native.SWITCH) == "0":
        return Finding("native kernels", value, fix=f"unset {native.SWITCH}")
    if (compiler := _compiler()) is None:
        return Finding("native kernels", value, fix=f"install a C++ compiler, then `{BUILD}`")
    fix = f"there is a compiler, `{compiler}`: `{BUILD}`"
    return Finding("native kernels", value, good=False, fix=fix)


def _compiler() -> str | None:
    return shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])


def _rates(rates: Rates, speeds: Speeds) -> Iterator[Finding]:
    """Per precision: one token against the memory's speed, and many tokens."""
    for name in FORMATS:
        rate = rates[name]
        share = rate.row_bytes_per_s / speeds.memory_bytes_per_s
        yield Finding(
            f"{name} weights",
            f"{rate.row_bytes_per_s / 1e9:.1f} GB/s for one token, {share:.0%} of the memory's;"
            f" {rate.flops_per_s / 1e12:.2f} TFLOP/s for many",
        )


def _huge_pages() -> Iterator[Finding]:
    with suppress(OSError):
        allowed = "[never]" not in HUGE_PAGES.read_text()
        fix = "" if allowed else f"echo madvise > {HUGE_PAGES}"
        value = "used for experts" if allowed else "forbidden: page tables slow the kernels down"
        yield Finding("huge pages", value, fix=fix)
