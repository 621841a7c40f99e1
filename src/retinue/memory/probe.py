"""How fast this machine multiplies by weights: for one token and for many, format by format.

Measured with the kernels that are active, on matrices of an expert's size that no cache holds.
"""

import time
from collections.abc import Callable, Collection

import torch
from torch.nn import functional

from retinue.memory import native
from retinue.memory.grouped import Grouped
from retinue.memory.machine import Rate
from retinue.memory.native import Activation, ExpertsShape, Format, Native

HIDDEN, INNER = 2048, 512  # of the expert that is measured: 6 MB of bf16
SHAPES = ((INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))  # gate, up, down
AT_ONCE = 8  # experts in one call, as a token uses them
TOKENS = 64  # where there are many
SLICES = 8  # the best one counts: other programs take their share of the others
_PATTERN = 0x3C23  # 0.01 as bf16, neither zero nor NaN in any format

PLAIN = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NATIVE = {"bfloat16": Format.BF16, "int8": Format.INT8, "int4": Format.INT4}
FORMATS = (*PLAIN, "int8", "int4")


def measure_rates(
    threads: int, formats: Collection[str], *, seconds: float = 0.12, at_most_bytes: int
) -> dict[str, Rate]:
    """Measure each of `formats` for two times `seconds`."""
    torch.set_num_threads(threads)
    library = native.library()
    if library is not None:
        library.set_threads(threads)
    weights = torch.full((max(at_most_bytes, 4 * _numbers()) // 2,), _PATTERN, dtype=torch.int16)
    data = weights.view(torch.uint8)
    rates = {}
    for name in formats:
        run, size = _with(name, library, data)
        flops = 2 * _numbers() * TOKENS
        rates[name] = Rate(
            size * _per_second(lambda at, run=run: run(1, at), seconds),  # type: ignore[misc]
            flops * _per_second(lambda at, run=run: run(TOKENS, at), seconds),  # type: ignore[misc]
        )
    return rates


def _numbers() -> int:
    return sum(rows * columns for rows, columns in SHAPES)


def _per_second(run: Callable[[int], int], seconds: float) -> float:
    """How many experts a second `run` computes; it is told how many went before."""
    best, done = 0.0, run(0)
    for _ in range(SLICES):
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds / SLICES or not count:
            count += run(done + count)
        best, done = max(best, count / elapsed), done + count
    return best


# (tokens, experts that went before) -> experts computed
_Run = Callable[[int, int], int]


def _with(name: str, library: Native | None, data: torch.Tensor) -> tuple[_Run, int]:
    """How experts of the format are run, and the bytes of one."""
    plain = PLAIN.get(name)
    if plain is not None and (library is None or name not in NATIVE):
        return _by_torch(plain, data), _numbers() * plain.itemsize
    if library is None:
        return _decoded(name, data), _size(NATIVE[name])
    run = _by_library(library, NATIVE[name], data)
    if plain is None:
        return run, _size(NATIVE[name])
    many = _by_torch(plain, data)  # as the engine does it: torch is faster there
    return lambda tokens, at: (run if tokens == 1 else many)(tokens, at), _size(NATIVE[name])


def _by_torch(dtype: torch.dtype, data: torch.Tensor) -> _Run:
    size = _numbers() * dtype.itemsize
    whole = data[: len(data) // size * size]
    experts = [part.view(dtype) for part in torch.split(whole, size)]
    inputs = {n: torch.ones(n, HIDDEN, dtype=dtype) for n in (1, TOKENS)}

    def run(tokens: int, at: int) -> int:
        with torch.inference_mode():
            _feed_forward(inputs[tokens], experts[at % len(experts)])
        return 1

    return run


def _feed_forward(x: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
    sizes = [rows * columns for rows, columns in SHAPES]
    gate, up, down = (
        part.view(shape) for part, shape in zip(torch.split(expert, sizes), SHAPES, strict=True)
    )
    hidden = functional.silu(_product(x, gate)) * _product(x, up)
    return _product(hidden, down)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x[0])[None] if len(x) == 1 else functional.linear(x, weight)


def _decoded(name: str, data: torch.Tensor) -> _Run:
    """What is left without the library: decode to bf16, then torch."""
    bits, size = (4 if name == "int4" else 8), _size(NATIVE[name])
    count = len(data) // size
    inputs = {n: torch.ones(n, HIDDEN, dtype=torch.bfloat16) for n in (1, TOKENS)}

    def run(tokens: int, at: int) -> int:
        parts, start = [], at % count * size
        for rows, columns in SHAPES:
            form = Grouped(bits, rows, columns)
            middle = start + native.codes_bytes(NATIVE[name], rows, columns)
            stop = middle + native.scales_bytes(NATIVE[name], rows, columns)
            codes = data[start:middle].view(form.weights_shape)
            scales = data[middle:stop].view(torch.bfloat16).view(form.scales_shape)
            parts.append(form.decode(codes, scales, torch.bfloat16).flatten())
            start = stop
        with torch.inference_mode():
            _feed_forward(inputs[tokens], torch.cat(parts))
        return 1

    return run


def _size(format: Format) -> int:
    return sum(
        native.codes_bytes(format, *shape) + native.scales_bytes(format, *shape) for shape in SHAPES
    )


def _by_library(library: Native, format: Format, data: torch.Tensor) -> _Run:
    size, base = _size(format), data.data_ptr()
    count = len(data) // size
    at_once = min(AT_ONCE, count)
    shape = ExpertsShape(format, torch.bfloat16, Activation.SILU, HIDDEN, INNER, at_once)
    offsets, place = [], 0
    for each in SHAPES:
        offsets += [place, place + native.codes_bytes(format, *each)]
        place = offsets[-1] + native.scales_bytes(format, *each)
    inside = torch.tensor(offsets)
    work = {}
    for tokens in (1, TOKENS):
        starts = torch.arange(at_once + 1) * tokens
        pairs = torch.arange(tokens * at_once).view(tokens, at_once).T.flatten()
        x = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16)
        work[tokens] = (starts, pairs), x, torch.empty(tokens * at_once, HIDDEN)

    def run(tokens: int, at: int) -> int:
        groups, x, rows = work[tokens]
        experts = (torch.arange(at_once) + at) % count
        parts = base + experts[:, None] * size + inside
        if format is Format.BF16:
            parts[:, 1::2] = 0  # there are no scales
        library.experts(shape, parts, groups, x, rows)
        return at_once

    return run
