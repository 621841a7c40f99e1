"""The kernels for tests: built once, loaded for each set of instructions; and the slow truth."""

import functools
import importlib.util
import os
import random
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
import torch

from retinue.memory.native import (
    GROUP,
    LANES,
    Format,
    Matrix,
    Native,
    codes_bytes,
    matrix,
    scales_bytes,
)

ROOT = Path(__file__).resolve().parents[1]
ISAS = ("portable", "avx2", "avx512-vnni", "avx512-amx")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def build_module() -> ModuleType:
    """`native/build.py`, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "native" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="retinue-kernels-")


@functools.cache
def built() -> Path | None:
    """The library, of the sources as they are; None without a compiler."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return None
    library = Path(folder().name, "libretinue.so")
    build_module().build(library)
    return library


@functools.cache
def loaded(isa: str) -> Native | None:
    """The library with these instructions, a copy of its own; None if this machine lacks them."""
    library = built()
    if library is None:
        return None
    own = Path(folder().name, f"{isa}.so")
    shutil.copy(library, own)
    with mock.patch.dict(os.environ, RETINUE_ISA=isa):
        native = Native(own)
        return native if native.features == isa else None


def kernels(isa: str) -> Native:
    """The same; skips the test where it cannot run."""
    native = loaded(isa)
    if native is None:
        pytest.skip("no C++ compiler" if built() is None else f"no {isa} here")
    return native


def every() -> list[Native]:
    """All that this machine has, at least one."""
    found = [native for isa in ISAS if (native := loaded(isa)) is not None]
    if not found:
        pytest.skip("no C++ compiler")
    return found


class Weight:
    """A matrix of random codes, `shift` bytes off any alignment, and the numbers it stands for."""

    def __init__(self, format: Format, rows: int, columns: int, seed: int, shift: int = 2) -> None:
        source = np.random.default_rng(seed)
        size, scale_size = codes_bytes(format, rows, columns), scales_bytes(format, rows, columns)
        self._codes = torch.empty(size + shift, dtype=torch.uint8)[shift:]
        self._scales = torch.empty(scale_size + shift, dtype=torch.uint8)[shift:]
        if format is Format.BF16:
            numbers = torch.from_numpy(source.standard_normal((rows, columns))).bfloat16()
            self._codes[:] = numbers.flatten().view(torch.uint8)
            self.numbers = numbers.double()
            self.matrix = matrix(format, rows, columns, self._codes)
            return
        least = 1 if format is Format.INT8 else 0
        codes = source.integers(least, 256, size, dtype=np.uint8)
        scales = torch.from_numpy(source.standard_normal(scale_size // 2) / 64).bfloat16()
        self._codes[:] = torch.from_numpy(codes)
        self._scales[:] = scales.view(torch.uint8)
        self.numbers = decoded(format, rows, columns, codes, scales.double().numpy())
        self.matrix = matrix(format, rows, columns, self._codes, self._scales)


def decoded(
    format: Format, rows: int, columns: int, codes: np.ndarray, scales: np.ndarray
) -> torch.Tensor:
    """The numbers [rows, columns] in fp64, element by element of what `retinue.h` says."""
    down, across = -(-rows // LANES), -(-columns // GROUP)
    if format is Format.INT8:
        tiles = codes.reshape(down, across, 8, LANES, 4).astype(np.int64) - 128
    else:
        halves = codes.reshape(down, across, 4, 1, LANES, 4).astype(np.int64)
        both = np.concatenate([halves & 15, halves >> 4], axis=3)
        tiles = both.reshape(down, across, 8, LANES, 4) - 8
    values = tiles.transpose(0, 3, 1, 2, 4).reshape(down, LANES, across, GROUP)
    scaled = values * scales.reshape(down, across, LANES).transpose(0, 2, 1)[..., None]
    return torch.from_numpy(scaled.reshape(down * LANES, -1)[:rows, :columns])


def quantised(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, columns] as the kernels of int8 and int4 see it: 127 steps in each group."""
    tokens, columns = x.shape
    padded = torch.zeros(tokens, -(-columns // GROUP) * GROUP)
    padded[:, :columns] = x.float()
    groups = padded.view(tokens, -1, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest < 1e-30, 0.0, 127 / largest)
    values = (groups * inverse).round().double() * (largest / 127).double()
    return values.reshape(tokens, -1)[:, :columns]


def seen(format: Format, x: torch.Tensor) -> torch.Tensor:
    """What a kernel of this format multiplies: x itself, or what it quantises it to."""
    return x.double() if format is Format.BF16 else quantised(x)


def relative(given: torch.Tensor, truth: torch.Tensor) -> float:
    """The L2 norm of the difference over that of the truth."""
    return float((given.double() - truth.double()).norm() / truth.double().norm())


def sizes(seed: int, count: int) -> list[tuple[int, int, int]]:
    """Rows, columns and tokens, most of which fill no tile."""
    source = random.Random(seed)
    drawn = [
        (source.randint(1, 90), source.randint(1, 300), source.choice((1, 2, 3, 5, 9, 16, 17, 40)))
        for _ in range(count)
    ]
    return [(16, 32, 1), (33, 2081, 29), *drawn]  # more columns than AMX unpacks at a time


def experts_of(
    format: Format, hidden: int, inner: int, count: int
) -> tuple[list[list[Weight]], torch.Tensor]:
    """Gate, up and down of each expert, scaled to keep numbers near one, and their addresses."""
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    weights = [
        [Weight(format, *shape, seed=3 * expert + part) for part, shape in enumerate(shapes)]
        for expert in range(count)
    ]
    return weights, addresses([[weight.matrix for weight in expert] for expert in weights])


def addresses(experts: list[list[Matrix]]) -> torch.Tensor:
    """[experts, 6], as `Native.experts` wants them."""
    parts = [[at for one in expert for at in (one.codes, one.scales or 0)] for expert in experts]
    return torch.tensor(parts)
