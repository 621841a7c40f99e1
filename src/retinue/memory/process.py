"""Settings of the C library, oneDNN and OpenMP that a process needs before torch is imported.

glibc raises its threshold for separate mappings as a program frees large blocks; from then on
activations live on heaps that fragment: a prefill of 2,000 tokens held 0.8 GB more than it used.
With fixed thresholds every large block is a mapping of its own and goes back when it is freed.
oneDNN keeps the kernels that it compiled for 1024 shapes; a process that sees many prompt lengths
would grow by hundreds of megabytes.
GNU's OpenMP spins for milliseconds at the end of each parallel region. While nothing else runs that
is fast; as soon as a reader or another program needs the core, each of the hundreds of regions of a
token costs a time slice: decoding fell from 32 to 2 tokens/s beside a second such process. So it
spins little, and longer only where no expert has to be read while others are computed. See
docs/LOG.md for the measurements.
"""

import ctypes
import os
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
SEPARATE_FROM_BYTES = 512 << 10
COMPILED_KERNELS = 128
SPIN_COUNT, SPIN_COUNT_RESIDENT = 30_000, 100_000


def prepare(*, resident: bool = False) -> None:
    """Apply the settings to this process, except those that the user has made in the environment.

    `resident` says that the whole model will lie in memory.

    OpenMP reads its own when torch is imported: where that happened before, it keeps spinning.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(COMPILED_KERNELS))
    if "OMP_WAIT_POLICY" not in os.environ:
        spin = SPIN_COUNT_RESIDENT if resident else SPIN_COUNT
        os.environ.setdefault("GOMP_SPINCOUNT", str(spin))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, SEPARATE_FROM_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 8 << 20)
        mallopt(_M_ARENA_MAX, 2)
