"""Builds the kernels: `python native/build.py LIBRARY [COMPILER FLAGS]`.

Knows no setuptools and no torch. Each file of kernels is compiled for its own instructions; the
library chooses among them when it is loaded. `CXX` names another compiler than `c++`.
"""

import os
import platform
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# No contraction: what is multiplied and added is the same on every machine.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread"]
FLAGS += ["-Wno-psabi"]  # vectors are passed within one file only
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
AVX512 += ["-mfma", "-mprefer-vector-width=512"]
FLAGS_OF = {
    "avx2.cpp": AVX2,
    "avx512.cpp": AVX512,
    "amx.cpp": [*AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
}


class BuildError(Exception):
    """There is no compiler, or it refused; the text says which, and what it said."""


def build(library: Path, extra: list[str] | None = None) -> None:
    """Compile every file of this folder into `library`; `extra` flags come last.

    Raises:
        BuildError: nothing was written.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            target = str(Path(folder, source.stem + ".o"))
            own = FLAGS_OF.get(source.name, []) if x86 else []
            _run([*compiler, *FLAGS, *own, *(extra or []), "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            objects = list(threads.map(compiled, sorted(FOLDER.glob("*.cpp"))))
        # Put in place whole: a process that has the old one loaded keeps it.
        fresh = library.with_suffix(".new")
        _run([*compiler, *FLAGS, *(extra or []), "-shared", *objects, "-o", str(fresh)])
        fresh.replace(library)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"no compiler: {error}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)}\n{done.stderr.strip()}")


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), sys.argv[2:])
    except BuildError as error:
        sys.exit(f"error: {error}")
