"""Layers that run within the native step: the same bits and books, and only where they may."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kernels
import models
from kernels import ISAS, TYPES, Weight
from retinue import LLM
from retinue.errors import Cancelled
from retinue.memory import evaluator, native
from retinue.memory.native import Activation, ExpertsShape, Format
from retinue.model.native_layers import NativeLayers

pytestmark = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))

UNTOUCHED = 777.0
FORCED = [models.prompt_of(8, seed=40 + n) for n in range(3)]
PROMPTS = [models.prompt_of(count, seed=count) for count in (30, 9, 17)]


@contextmanager
def seen(*, refused: bool = False) -> Iterator[list[int]]:
    """The layers that ran natively, in order; none does where it is `refused`."""
    layers, count, allow = list[int](), NativeLayers.count, NativeLayers.allow

    def counted(native_layers: NativeLayers, layer: int, chosen: Any) -> None:
        layers.append(layer)
        count(native_layers, layer, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeLayers, "count", counted)
        if refused:
            patch.setattr(
                NativeLayers, "allow", lambda native_layers, allowed: allow(native_layers, False)
            )
        yield layers


def whole(tmp_path: Path, precision: str = "as-is", **settings: Any) -> Any:
    folder = models.make(tmp_path / "m", "olmoe", torch.bfloat16)
    return models.open_llm(folder, kv_tokens=512, precision=precision, experts="100%", **settings)


def warm(llm: LLM) -> None:
    """Until every expert is resident."""
    while llm.assembly.cache.resident < llm.assembly.cache.total:
        llm.generate([models.prompt_of(64, seed=llm.assembly.cache.step)], models.greedy(1))


@pytest.mark.parametrize("precision", ["as-is", "int8", "int4"])
@pytest.mark.parametrize("count", [1, 3])
def test_logits_and_books_are_those_of_layers_in_python(
    precision: str, count: int, tmp_path: Path
) -> None:
    found = []
    for refused in (False, True):
        with whole(tmp_path, precision) as llm, seen(refused=refused) as layers:
            warm(llm)
            host, before = llm.assembly.host, llm.assembly.cache.step
            logits = models.run_logits_together(llm, PROMPTS[:count], FORCED[:count])
            counters = host.metrics.total.decode
            books = host.cache.last_used - before, counters.hits, counters.misses
            found.append((torch.stack(logits).float(), *books))
        assert bool(layers) is not refused
        if not refused:
            assert set(layers) == set(range(host.layers))
    for mine, other in zip(*found, strict=True):
        assert np.array_equal(mine, other)


def test_layers_that_may_lack_an_expert_take_their_turn(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "m", "olmoe", torch.bfloat16)
    with models.open_llm(folder, experts="50%") as llm, seen() as layers:
        models.run_logits(llm, PROMPTS[0], FORCED[0])
    assert not layers


@pytest.mark.parametrize("error", [KeyboardInterrupt, Cancelled])
def test_a_layer_that_was_begun_and_is_interrupted_leaves_nothing_behind(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.make(tmp_path / "m", "olmoe", torch.bfloat16)
    with models.open_llm(folder, experts="50%") as llm:
        truth = models.run_logits(llm, PROMPTS[0], FORCED[0])
        begun, touch = list[int](), llm.assembly.cache.touch

        def fail(demand: Any, tokens: int) -> None:
            begun.append(tokens)
            if begun.count(1) == 5:
                raise error("now")
            touch(demand, tokens)

        with monkeypatch.context() as patch:
            patch.setattr(llm.assembly.cache, "touch", fail)
            request = models.forced_request(PROMPTS[0], FORCED[0])
            with suppress(error):
                for _ in llm.run(request):
                    pass
        assert begun.count(1) == 5, "a lone token's layer"
        again = models.run_logits(llm, PROMPTS[0], FORCED[0])
        assert all(torch.equal(one, other) for one, other in zip(again, truth, strict=True))
        llm.assembly.cache.check()


def test_who_watches_sees_every_layer(tmp_path: Path) -> None:
    with whole(tmp_path) as llm, seen() as layers:
        warm(llm)
        watched = list[int]()
        llm.assembly.host.watch = lambda layer, *_: watched.append(layer)
        layers.clear()
        steps = len(models.run_logits(llm, PROMPTS[0], FORCED[0]))
        assert not layers
        assert len(watched) == steps * llm.assembly.host.layers


def test_a_request_is_cancelled_between_native_steps(tmp_path: Path) -> None:
    with whole(tmp_path) as llm, seen() as layers:
        warm(llm)
        layers.clear()
        request = models.forced_request(PROMPTS[0], FORCED[0])
        with suppress(Cancelled):
            for _ in llm.run(request):
                if len(layers) >= 2 * llm.assembly.host.layers:
                    request.cancelled.set()
        assert len(layers) == 2 * llm.assembly.host.layers
        assert len(request.token_ids) < len(FORCED[0])
        llm.assembly.cache.check()
        models.run_logits(llm, PROMPTS[0], FORCED[0])


# --- the library alone


class Layer:
    """A layer of four random experts of which every token chose two, as an instruction."""

    COUNT, K, HIDDEN, INNER = 4, 2, 70, 50

    def __init__(self, format: Format, dtype: torch.dtype, tokens: int) -> None:
        torch.manual_seed(tokens)
        self.shape = ExpertsShape(format, dtype, Activation.SILU, self.HIDDEN, self.INNER, self.K)
        self.weights, parts = kernels.experts_of(format, self.HIDDEN, self.INNER, self.COUNT)
        self.hidden = torch.randn(tokens, self.HIDDEN).to(dtype)
        self.index = torch.rand(tokens, self.COUNT + 1).topk(self.K, -1).indices
        self.given = torch.rand(tokens, self.K).to(dtype)
        self.out = torch.zeros(tokens, self.HIDDEN, dtype=dtype)
        self.noted, self.ran = np.zeros(tokens * self.K, dtype=np.int64), np.zeros(1, np.int64)
        self.enabled, self.seconds = np.ones(1, dtype=np.int32), np.zeros(1)
        self.state, self.weights32 = np.zeros(1, dtype=np.int32), np.zeros(self.K, dtype=np.float32)
        self.rows = torch.full((self.K, self.HIDDEN), UNTOUCHED)
        # In two slots, the second of them behind nothing: an expert's place is the sum of both.
        self.slots = np.array([0, 1, 0, 1], dtype=np.int32)
        self.parts = parts
        self.offsets = parts.numpy() - 64 * self.slots[:, None] * (parts.numpy() > 0)
        self.table = np.zeros(1, dtype=evaluator.LAYER)
        self.table["shape"] = self.shape.numbers
        self.table["tokens"], self.table["experts"] = tokens, self.COUNT
        types = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
        self.table["weights_type"], self.table["slot_bytes"] = types[dtype], 64
        for name in ("enabled", "slots", "offsets", "noted", "ran", "seconds"):
            self.table[name] = getattr(self, name).ctypes.data
        self.table["hidden"], self.table["index"] = self.hidden.data_ptr(), self.index.data_ptr()
        self.table["weights"], self.table["out"] = self.given.data_ptr(), self.out.data_ptr()
        self.table["state"], self.table["given"] = (
            self.state.ctypes.data,
            self.weights32.ctypes.data,
        )
        self.table["rows"] = self.rows.data_ptr()

    def run(self, library: native.Native) -> int:
        """Between two copies of a number; returns how many instructions ran."""
        program = self.program = np.zeros(3, dtype=evaluator.INSTRUCTION)
        self.copied = np.zeros((2, 2), dtype=np.float32)
        for row, pair in zip(program[::2], self.copied, strict=True):
            row["operation"], row["dimensions"], row["sizes"][0] = evaluator.COPY, 1, 1
            row["a"]["at"], row["out"]["at"] = pair[:1].ctypes.data, pair[1:].ctypes.data
        self.copied[:, 0] = 5.0, 6.0
        program[1]["operation"], program[1]["dimensions"] = evaluator.EXPERTS, 1
        program[1]["b"]["at"] = self.table.ctypes.data
        return library.evaluate(program.ctypes.data, len(program))

    def go_on(self, library: native.Native) -> int:
        """From the layer on; returns how many instructions ran."""
        return library.evaluate(self.program[1:].ctypes.data, 2)

    def fill(self, library: native.Native, rank: int) -> None:
        """Compute the row of one of a lone token's experts."""
        groups = torch.tensor([0, 1]), torch.tensor([rank])
        expert = self.index[0, rank]
        library.experts(self.shape, self.parts[expert : expert + 1], groups, self.hidden, self.rows)

    def truth(self, library: native.Native) -> torch.Tensor:
        """The same in two calls, an expert's pairs in order, as `model/work.py` makes them."""
        chosen = self.index.flatten()
        starts = chosen.bincount(minlength=self.COUNT + 1).cumsum(0)[: self.COUNT]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts])
        rows = torch.zeros(len(chosen), self.HIDDEN)
        groups = starts, chosen.argsort(stable=True)
        library.experts(self.shape, self.parts, groups, self.hidden, rows)
        return library.weighted_sum(rows, self.given.float(), self.shape.dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=attrgetter("name"))
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_is_its_experts_and_their_sum(isa: str, format: Format, dtype: torch.dtype) -> None:
    library = kernels.kernels(isa)
    for tokens in (1, 2, 7, 16):
        layer = Layer(format, dtype, tokens)
        assert layer.run(library) == 3
        assert torch.equal(layer.out, layer.truth(library))
        assert layer.noted.tolist() == layer.index.flatten().tolist()
        assert layer.ran[0] == 1
        assert layer.seconds[0] > 0
        assert layer.copied[:, 1].tolist() == [5.0, 6.0]


def lone(format: Format, dtype: torch.dtype, *, there: int) -> Layer:
    """A lone token's layer that is to be begun, and of whose two experts so many are there."""
    layer = Layer(format, dtype, 1)
    layer.index[0] = torch.tensor([3, 1])
    layer.enabled[0] = evaluator.BEGIN
    for expert in layer.index[0, there:]:
        layer.slots[int(expert)] = -1
    return layer


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=attrgetter("name"))
@pytest.mark.parametrize("isa", ISAS)
def test_a_layer_in_two_parts_is_the_same(isa: str, format: Format, dtype: torch.dtype) -> None:
    """However many of its experts are there, and whatever comes between: no bit differs."""
    library = kernels.kernels(isa)
    other = Layer(format, dtype, 5)
    weight, x = Weight(format, 300, 70, 0), torch.randn(5, 70)
    between, product = other.truth(library), library.linear(weight.matrix, x)
    for threads, there in itertools.product((1, 2, 4), (0, 1, 2)):
        library.set_threads(threads, 20)
        for turn in range(8):
            layer = lone(format, dtype, there=there)
            assert layer.run(library) == 1
            assert layer.state[0] == evaluator.BEGUN
            assert layer.noted.tolist() == [3, 1]
            assert layer.weights32.tolist() == layer.given[0].float().tolist()
            if turn % 2:
                assert torch.equal(library.linear(weight.matrix, x), product)
                assert torch.equal(other.truth(library), between)
            if turn % 4 == 2:
                time.sleep(1e-4)
            library.end_experts()
            for rank in range(there, 2):
                assert (layer.rows[rank] == UNTOUCHED).all()
                layer.fill(library, rank)
            layer.state[0] = evaluator.ATTENDED
            assert layer.go_on(library) == 2
            assert torch.equal(layer.out, layer.truth(library))
            assert layer.state[0] == evaluator.IDLE
            assert layer.copied[:, 1].tolist() == [5.0, 6.0]
            assert not layer.ran[0]
    library.set_threads(1, 0)


@pytest.mark.parametrize("threads", [1, 2])
def test_what_an_interrupted_caller_began_is_ended_by_who_comes_next(threads: int) -> None:
    library = kernels.every()[-1]
    library.set_threads(threads, 0)
    first, second = (lone(Format.INT8, torch.float32, there=2) for _ in range(2))
    for layer in (first, second):
        assert layer.run(library) == 1
    assert not (first.rows == UNTOUCHED).any()
    library.set_threads(1, 0)
    assert torch.equal(second.rows, first.rows)
    again = lone(Format.INT8, torch.float32, there=2)
    again.state[0] = evaluator.BEGUN  # by a step that was given up
    assert again.run(library) == 1
    assert again.state[0] == evaluator.BEGUN
    library.end_experts()
    library.end_experts()  # nothing is left


@pytest.mark.parametrize("why", ["not enabled", "named twice", "none", "no such expert"])
def test_a_lone_token_that_is_left_to_others(why: str) -> None:
    library = kernels.every()[-1]
    layer = lone(Format.INT4, torch.float32, there=2)
    if why == "not enabled":
        layer.enabled[0] = evaluator.OFF
    else:
        layer.index[0, 1] = {"named twice": 3, "none": layer.COUNT, "no such expert": -1}[why]
    assert layer.run(library) == 1
    assert layer.state[0] == evaluator.IDLE
    library.end_experts()
    assert (layer.rows == UNTOUCHED).all()
    assert not layer.out.any()


@pytest.mark.parametrize("why", ["not enabled", "absent", "no such expert"])
def test_a_layer_that_may_not_run_stops_the_step(why: str) -> None:
    library = native.library()
    assert library is not None
    layer = Layer(Format.INT4, torch.float32, 3)
    if why == "not enabled":
        layer.enabled[0] = 0
    elif why == "absent":
        layer.slots[int(layer.index[layer.index < layer.COUNT][0])] = -1
    else:
        layer.index[1, 1] = -5
    assert layer.run(library) == 1
    assert not layer.ran[0]
    assert not layer.out.any()
    assert layer.copied[:, 1].tolist() == [5.0, 0.0]
