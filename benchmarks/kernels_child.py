"""The native kernels alone, in a process of their own; prints one JSON line.

One token is timed by turns with plain reads of the same memory, on as many threads: so both see
the same machine. Every call takes other weights, more than any cache holds; they are all the same
number, which does not change the time, but written, for pages of zeros would be one page.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from retinue.memory.machine import cores
from retinue.memory.native import (
    Activation,
    ExpertsShape,
    Format,
    Matrix,
    Native,
    codes_bytes,
    library,
    scales_bytes,
    why_not,
)

POOL_BYTES = 5 << 28
FILLING = 0x3C  # 0.0115 as bfloat16
SAMPLE_BYTES = 1 << 27
SAMPLES = 15
PREFILL_EXPERTS, PREFILL_TOKENS, PREFILL_SAMPLES = 16, 64, 5
EXPERTS_OF_A_TOKEN = 8
EXPERTS = {"olmoe": (2048, 1024), "qwen3-30b": (2048, 768)}  # hidden, inner
LINEARS = {"attention": (2048, 2048), "head": (50304, 2048)}  # rows, columns


@dataclass(frozen=True, slots=True)
class Bench:
    """The library, and the memory that stands for weights."""

    native: Native
    pool: torch.Tensor

    def parts(self, format: Format, shapes: list[tuple[int, int]]) -> tuple[torch.Tensor, int]:
        """Addresses [count, 2 * shapes] of as many sets of matrices as fit, and bytes of one."""
        offsets, size = [], 0
        for rows, columns in shapes:
            codes, scales = (of(format, rows, columns) for of in (codes_bytes, scales_bytes))
            offsets += [size, size + codes if scales else -1]
            size += codes + scales
        starts = torch.arange(self.pool.numel() // size)[:, None] * size + self.pool.data_ptr()
        at = torch.tensor(offsets)
        return torch.where(at < 0, 0, starts + at), size


def main() -> None:
    """Measure all; `argv` is empty."""
    native = library()
    if native is None:
        sys.exit(f"no kernels: {why_not()}")
    native.set_threads(cores())
    bench = Bench(native, torch.full((POOL_BYTES,), FILLING, dtype=torch.uint8))
    document: dict[str, object] = {"features": native.features, "threads": cores()}
    for kind in Format:
        for name, (hidden, inner) in EXPERTS.items():
            calls = expert_calls(bench, kind, hidden, inner)
            document[f"{name} {kind.name.lower()}"] = streamed(bench, calls)
        for name, (rows, columns) in LINEARS.items():
            calls = linear_calls(bench, kind, rows, columns)
            document[f"{name} {kind.name.lower()}"] = streamed(bench, calls)
    # On one thread each: threads that wait for each other would count as work.
    native.set_threads(1)
    torch.set_num_threads(1)
    for kind in Format:
        document[f"prefill {kind.name.lower()}"] = prefill(bench, kind)
    document["prefill torch"] = torch_prefill()
    print(json.dumps(document))


Calls = Iterator[tuple[int, Callable[[], object]]]  # each reads some bytes


def expert_calls(bench: Bench, format: Format, hidden: int, inner: int) -> Calls:
    """One token's experts of one layer, others each time."""
    k = EXPERTS_OF_A_TOKEN
    parts, size = bench.parts(format, [(inner, hidden), (inner, hidden), (hidden, inner)])
    shape = ExpertsShape(format, torch.bfloat16, Activation.SILU, hidden, inner, k)
    groups = torch.arange(k + 1), torch.arange(k)
    x, rows = torch.ones(1, hidden).bfloat16(), torch.empty(k, hidden)
    while True:
        for some in parts[: len(parts) // k * k].split(k):
            yield k * size, lambda some=some: bench.native.experts(shape, some, groups, x, rows)


def linear_calls(bench: Bench, format: Format, rows: int, columns: int) -> Calls:
    """One token through a linear layer, another each time."""
    parts, size = bench.parts(format, [(rows, columns)])
    x = torch.ones(1, columns).bfloat16()
    while True:
        for codes, scales in parts.tolist():
            weight = Matrix(codes, scales, format, rows, columns, 0)
            yield size, lambda weight=weight: bench.native.linear(weight, x)


def streamed(bench: Bench, calls: Calls) -> dict[str, float]:
    """Bytes a second of the kernel and of plain reads, medians of samples in turn."""
    words = bench.pool.numpy().view(np.int64)
    parts = np.array_split(words, len(words) * 8 // SAMPLE_BYTES)
    ours, reads = [], []
    with ThreadPoolExecutor(cores()) as threads:
        for part in parts[:1] + (parts * 4)[:SAMPLES]:  # the first is not counted
            ours.append(sample(calls))
            begun = time.perf_counter()
            list(threads.map(np.sum, np.array_split(part, cores())))
            reads.append(part.nbytes / (time.perf_counter() - begun))
    shares = [a / b for a, b in zip(ours[1:], reads[1:], strict=True)]
    return {
        "bytes_per_s": statistics.median(ours[1:]),
        "memory_bytes_per_s": statistics.median(reads[1:]),
        "share": statistics.median(shares),
    }


def sample(calls: Calls) -> float:
    """Bytes a second of as many calls as read SAMPLE_BYTES."""
    done, took = 0, 0.0
    while done < SAMPLE_BYTES:
        size, call = next(calls)
        begun = time.perf_counter()
        call()
        took += time.perf_counter() - begun
        done += size
    return done / took


def prefill(bench: Bench, format: Format) -> float:
    """Operations a second, 64 tokens for each of some experts of olmoe."""
    hidden, inner = EXPERTS["olmoe"]
    count, each, k = PREFILL_EXPERTS, PREFILL_TOKENS, EXPERTS_OF_A_TOKEN
    parts, _ = bench.parts(format, [(inner, hidden), (inner, hidden), (hidden, inner)])
    shape = ExpertsShape(format, torch.bfloat16, Activation.SILU, hidden, inner, k)
    pairs = torch.arange(count * each).view(each, count).T.flatten()
    groups = torch.arange(count + 1) * each, pairs
    x = torch.ones(count * each // k, hidden).bfloat16()
    rows = torch.empty(count * each, hidden)

    def call() -> None:
        bench.native.experts(shape, parts[:count].contiguous(), groups, x, rows)

    return operations(call, hidden, inner)


def torch_prefill() -> float:
    """The same of torch's own products in bfloat16."""
    hidden, inner = EXPERTS["olmoe"]
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = [
        [torch.full(size, 0.01, dtype=torch.bfloat16) for size in sizes]
        for _ in range(PREFILL_EXPERTS)
    ]
    x = torch.ones(PREFILL_TOKENS, hidden).bfloat16()

    def call() -> None:
        for gate, up, down in experts:
            gated = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
            functional.linear(gated, down)

    return operations(call, hidden, inner)


def operations(call: Callable[[], None], hidden: int, inner: int) -> float:
    """A second of a core's time, the median of some calls after a first one."""
    count = 2 * 3 * hidden * inner * PREFILL_EXPERTS * PREFILL_TOKENS
    times = []
    for _ in range(PREFILL_SAMPLES + 1):
        begun = time.thread_time()
        call()
        times.append(time.thread_time() - begun)
    return count / statistics.median(times[1:])


if __name__ == "__main__":
    main()
