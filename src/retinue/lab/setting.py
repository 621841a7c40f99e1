"""Where and with what something was measured, in words for a report."""

import platform
import time
from importlib.metadata import version
from pathlib import Path

from retinue import __version__
from retinue.config import format_size
from retinue.memory.machine import available_bytes, cores

LIBRARIES = ("torch", "transformers", "numpy")


def machine() -> str:
    """The processor, the cores that this process may use, and the memory that is left."""
    left = f"{cores()} cores, {format_size(available_bytes())} of memory free"
    return f"{_processor()}, {left}"


def versions() -> str:
    """Ours, Python's, and those of the libraries that compute."""
    found = [f"retinue {__version__}", f"Python {platform.python_version()}"]
    return ", ".join([*found, *[f"{name} {version(name)}" for name in LIBRARIES]])


def today() -> str:
    """The date and the time, with the zone."""
    return time.strftime("%Y-%m-%d %H:%M %z")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "unknown processor"
