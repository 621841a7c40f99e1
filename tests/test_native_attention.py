"""Attention of new tokens over stored keys and values, in every instruction set."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import kernels
from kernels import ISAS
from retinue.memory import evaluator, native
from retinue.memory.native import Native
from retinue.metrics import Clock
from retinue.model.program import Memory, Program, Spans
from retinue.model.record import ATTEND, Recording, _needed, _Recorder

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))

TYPES = [torch.float32, torch.bfloat16]
SCALE = 0.3
POOL = 1024
# Heads, key heads, width, value width: a group of every size that is computed at once, more, and
# widths that are no multiple of a register.
SHAPES = [
    (4, 4, 24, 40),
    (6, 2, 24, 40),
    (4, 1, 24, 40),
    (16, 16, 128, 128),
    (32, 4, 128, 128),
    (15, 3, 80, 96),
    (12, 1, 7, 5),
    (26, 2, 64, 192),
]


@dataclass(frozen=True, slots=True)
class Step:
    """The newest tokens of some sequences, and the pools that hold the others."""

    states: tuple[torch.Tensor, ...]  # query, key, value: [sequences, heads, width]
    pools: tuple[torch.Tensor, ...]  # keys, values: [places, key heads, width]
    places: list[torch.Tensor]
    starts: np.ndarray
    stops: np.ndarray
    cap: float = 0.0
    sink: torch.Tensor | None = None

    def only(self, sequence: int) -> "Step":
        """One of its sequences, over pools of its own."""
        one = slice(sequence, sequence + 1)
        return Step(
            tuple(each[one] for each in self.states),
            tuple(pool.clone() for pool in self.pools),
            self.places[one],
            self.starts[one],
            self.stops[one],
            self.cap,
            self.sink,
        )


def drawn(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    cap: float = 0.0,
    sinks: bool = False,
    lengths: tuple[int, ...] = (300, 1, 37),
) -> Step:
    """Random numbers; the tokens of the last sequence begin within it, as a window's do."""
    heads, key_heads, width, wide = shape
    random = torch.Generator().manual_seed(3)

    def some(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random).to(dtype)

    count = len(lengths)
    order = torch.randperm(POOL, generator=random)
    return Step(
        (some(count, heads, width), some(count, key_heads, width), some(count, key_heads, wide)),
        (some(POOL, key_heads, width), some(POOL, key_heads, wide)),
        list(order.split(POOL // count))[:count],
        np.array([0] * (count - 1) + [lengths[-1] // 2]),
        np.array(lengths),
        cap,
        some(heads) if sinks else None,
    )


def attended(step: Step, library: Native, threads: int = 1) -> torch.Tensor:
    """What one ATTEND gives, as within a step: [sequences, heads, width]."""
    count, heads = step.states[0].shape[:2]
    out = torch.zeros(count, heads, step.states[2].shape[2], dtype=step.states[0].dtype)
    table = np.zeros(1, dtype=evaluator.SEQUENCES)
    addresses = np.array([p.data_ptr() for p in step.places], dtype=np.uint64)
    table["count"], table["places"] = count, addresses.ctypes.data
    table["starts"], table["stops"] = step.starts.ctypes.data, step.stops.ctypes.data
    recorder = _Recorder()
    query, key, value = (each.unsqueeze(0).transpose(1, 2) for each in step.states)
    kept = {"scaling": SCALE, "softcap": step.cap, "s_aux": step.sink}
    module: Any = SimpleNamespace(layer_idx=0)
    recorder.note(ATTEND, (query, key, value), kept, out.unsqueeze(0), module)
    keys = [pool.unsqueeze(0).transpose(1, 2) for pool in step.pools]
    pool: Any = SimpleNamespace(window=None, all_states=lambda: keys)
    found = recorder.ref(out)
    recording = Recording(_needed(recorder.operations, found), recorder.constants, found)
    memory = Memory({0: pool}, lambda window: Spans(window, step.starts, table))
    program = Program(recording, library, memory, Clock())
    library.set_threads(threads)
    try:
        program.run()
    finally:
        library.set_threads(1)
    return program.logits.clone()


def with_new(step: Step) -> list[torch.Tensor]:
    """The pools with the new keys and values where they belong."""
    pools = [pool.clone() for pool in step.pools]
    for s, own in enumerate(step.places):
        for pool, states in zip(pools, step.states[1:], strict=True):
            pool[own[step.stops[s] - 1]] = states[s]
    return pools


def truth(step: Step) -> torch.Tensor:
    """The same by torch, in fp32."""
    pools, answers = with_new(step), []
    for s, own in enumerate(step.places):
        query = step.states[0][s].float()
        seen = own[step.starts[s] : step.stops[s]]
        group = len(query) // pools[0].shape[1]
        keys, values = (pool[seen].float().repeat_interleave(group, 1) for pool in pools)
        scores = torch.einsum("hd,thd->ht", query, keys) * SCALE
        scores = step.cap * torch.tanh(scores / step.cap) if step.cap else scores
        if step.sink is not None:
            scores = torch.cat([scores, step.sink.float()[:, None]], dim=1)
        weights = scores.softmax(-1)[:, : len(seen)]
        answers.append(torch.einsum("ht,thd->hd", weights, values))
    return torch.stack(answers).to(step.states[0].dtype)


def assert_attends(step: Step, library: Native, threads: int = 1) -> None:
    wanted_pools, wanted = with_new(step), truth(step)
    got = attended(step, library, threads)
    for pool, wanted_pool in zip(step.pools, wanted_pools, strict=True):
        assert torch.equal(pool, wanted_pool)
    rounding = 1e-5 if got.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(got, wanted, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_torch(isa: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    library = kernels.kernels(isa)
    for threads in (1, 3):
        assert_attends(drawn(shape, dtype), library, threads)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_caps_and_sinks(isa: str, dtype: torch.dtype) -> None:
    library = kernels.kernels(isa)
    assert_attends(drawn((6, 2, 24, 40), dtype, cap=5.0), library)
    assert_attends(drawn((8, 1, 32, 32), dtype, sinks=True), library)


@pytest.mark.parametrize("isa", ISAS)
def test_every_length_up_to_three_tiles(isa: str) -> None:
    library = kernels.kernels(isa)
    for length in range(2, 50):
        step = drawn((12, 2, 32, 48), torch.bfloat16, lengths=(length, length))
        assert_attends(step, library)


@pytest.mark.parametrize("isa", ISAS)
def test_neither_threads_nor_company_change_a_bit(isa: str) -> None:
    library = kernels.kernels(isa)
    step = drawn((24, 6, 40, 24), torch.bfloat16)
    together = attended(step, library)
    for threads in (2, 4):
        assert torch.equal(attended(step, library, threads), together)
    for sequence in range(len(step.starts)):
        assert torch.equal(attended(step.only(sequence), library)[0], together[sequence])
