"""Whole experts, their weighted sum, and the threads that compute them."""

import os
import subprocess
import sys
import textwrap
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import kernels
from kernels import ISAS, TYPES, Weight, relative, seen
from retinue.memory.native import Activation, ExpertsShape, Format, Native

name = attrgetter("name")
ACTIVATIONS = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
}
UNTOUCHED = 7.0


class Call:
    """Some experts' work on random tokens, of which the last expert's pairs are left out."""

    def __init__(self, shape: ExpertsShape, count: int, tokens: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape, self.tokens = shape, tokens
        self.weights, self.parts = kernels.experts_of(
            shape.format, shape.hidden, shape.inner, count
        )
        self.x = torch.randn(tokens, shape.hidden).to(shape.dtype)
        self.choose(torch.rand(tokens, count + 1).topk(shape.k, -1).indices.flatten(), count)

    def choose(self, chosen: torch.Tensor, count: int) -> None:
        """The expert of each pair; `count` stands for none."""
        self.chosen = chosen  # [tokens * k]
        starts = chosen.bincount(minlength=count + 1).cumsum(0)[:count]
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), starts])
        self.pairs = chosen.argsort(stable=True)

    def run(self, native: Native) -> torch.Tensor:
        """[tokens * k, hidden]."""
        rows = torch.full((self.tokens * self.shape.k, self.shape.hidden), UNTOUCHED)
        native.experts(self.shape, self.parts, (self.starts, self.pairs), self.x, rows)
        return rows

    def truth(self) -> torch.Tensor:
        """The same in fp64, each expert for all its tokens, rounded where torch rounds."""
        kind, dtype = self.shape.format, self.shape.dtype
        rounded = dtype if kind is Format.BF16 else torch.float64
        rows = torch.full((self.tokens * self.shape.k, self.shape.hidden), UNTOUCHED).double()
        for expert, (gate, up, down) in enumerate(self.weights):
            pairs = (self.chosen == expert).nonzero().flatten()
            if not len(pairs):
                continue
            x = seen(kind, self.x[pairs // self.shape.k])
            gated, lifted = ((x @ part.numbers.T).to(rounded) for part in (gate, up))
            inner = ACTIVATIONS[self.shape.activation](gated.double()).to(rounded) * lifted
            rows[pairs] = (seen(kind, inner) @ down.numbers.T).to(rounded).double()
        return rows


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_experts_are_their_products(isa: str, format: Format, dtype: torch.dtype) -> None:
    native = kernels.kernels(isa)
    sizes = ((1, 32, 32, 2), (2, 70, 50, 37), (3, 33, 129, 90))
    for activation, (k, hidden, inner, tokens) in zip(Activation, (*sizes, sizes[1]), strict=True):
        call = Call(ExpertsShape(format, dtype, activation, hidden, inner, k), 4, tokens)
        native.set_threads(k, 10)
        given, truth = call.run(native), call.truth()
        left_out = call.chosen == 4
        assert (given[left_out] == UNTOUCHED).all()
        limit = 1e-3 if format is not Format.BF16 or dtype == torch.float32 else 1e-2
        assert relative(given[~left_out], truth[~left_out]) < limit
        if format is Format.BF16:  # rounded to the type, as eager torch's rows are
            assert torch.equal(given, given.to(dtype).float())
    native.set_threads(1, 0)


@pytest.mark.parametrize("format", Format, ids=name)
def test_lone_tokens_of_several_experts(format: Format) -> None:
    """Neighbouring experts share the input of one token, and only of one."""
    native = kernels.every()[-1]
    call = Call(ExpertsShape(format, torch.float32, Activation.SILU, 40, 32, 2), 4, 3)
    call.choose(torch.tensor([0, 1, 2, 4, 3, 4]), 4)
    served = call.chosen < 4
    assert relative(call.run(native)[served], call.truth()[served]) < 1e-3


@pytest.mark.parametrize("format", Format, ids=name)
def test_many_tokens_go_in_turns(format: Format) -> None:
    """More for one expert, and more in all, than are worked on at once: no row differs."""
    native = kernels.every()[-1]
    call = Call(ExpertsShape(format, torch.float32, Activation.SILU, 32, 32, 3), 3, 1700)
    rows = call.run(native)
    assert relative(rows, call.truth()) < 1e-3


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("format", Format, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_independent(isa: str, format: Format, dtype: torch.dtype) -> None:
    """Of the other tokens and experts of the call, and of the threads: to the bit."""
    native = kernels.kernels(isa)
    shape = ExpertsShape(format, dtype, Activation.SILU, 100, 70, 2)
    call = Call(shape, 3, 60)
    together = {}
    for threads in (1, 2, 4):
        native.set_threads(threads, 20)
        together[threads] = call.run(native)
    assert torch.equal(together[1], together[2])
    assert torch.equal(together[1], together[4])
    native.set_threads(1, 0)
    company = 2 if format is Format.BF16 else 1  # a lone token is summed in another order there
    groups = torch.tensor([0, company]), torch.arange(company) * 2
    rows = torch.empty(2 * company, 100)
    for pair in range(0, 120, 7):
        expert = int(call.chosen[pair])
        if expert < 3:
            x = call.x[pair // 2].expand(company, -1).contiguous()
            native.experts(shape, call.parts[expert : expert + 1], groups, x, rows)
            assert torch.equal(rows[0], together[1][pair])


def test_quantised_experts_are_the_same_everywhere() -> None:
    """For all instructions the same bits, activations included."""
    first, *others = kernels.every()
    for activation in Activation:
        call = Call(ExpertsShape(Format.INT4, torch.bfloat16, activation, 96, 80, 2), 3, 40)
        truth = call.run(first)
        for native in others:
            assert torch.equal(call.run(native), truth), native.features


@pytest.mark.parametrize("activation", Activation, ids=name)
@pytest.mark.parametrize("isa", ISAS)
def test_activations_are_exact(isa: str, activation: Activation) -> None:
    """Through experts that change nothing: within a millionth, also where little is left."""
    native = kernels.kernels(isa)
    eye, ones = torch.eye(32).bfloat16(), torch.zeros(32, 32).bfloat16()
    ones[:, 31] = 1
    parts = torch.tensor([[eye.data_ptr(), 0, ones.data_ptr(), 0, eye.data_ptr(), 0]])
    values = torch.linspace(-12, 12, 31 * 400).view(-1, 31)
    x = torch.cat([values, torch.ones(400, 1)], 1)
    rows = torch.empty(400, 32)
    shape = ExpertsShape(Format.BF16, torch.float32, activation, 32, 32, 1)
    native.experts(shape, parts, (torch.tensor([0, 400]), torch.arange(400)), x, rows)
    truth = ACTIVATIONS[activation](values.double())
    # Far below zero GELU is smaller than what is lost in its argument's square.
    slack = 1e-12 if activation in (Activation.SILU, Activation.RELU) else 2e-7
    torch.testing.assert_close(rows[:, :31].double(), truth, rtol=1e-6, atol=slack)


@pytest.mark.parametrize("isa", ISAS)
def test_what_is_no_number_stays_in_its_rows(isa: str) -> None:
    native = kernels.kernels(isa)
    for kind in Format:
        call = Call(ExpertsShape(kind, torch.float32, Activation.SILU, 64, 64, 2), 3, 20)
        clean = call.run(native)
        call.x[5, 9] = float("nan")
        spoilt = call.run(native)
        served = (call.chosen < 3).view(20, 2)
        assert not spoilt.view(20, 2, 64)[5][served[5]].isfinite().any()
        others = torch.arange(40) // 2 != 5
        assert torch.equal(spoilt[others], clean[others])


@pytest.mark.parametrize("isa", ISAS)
def test_the_sum_is_in_order(isa: str) -> None:
    native = kernels.kernels(isa)
    torch.manual_seed(1)
    rows, weights = torch.randn(7 * 3, 45), torch.rand(7, 3)
    truth = torch.zeros(7, 45)
    for rank in range(3):
        truth += weights[:, rank, None] * rows.view(7, 3, 45)[:, rank]
    for dtype in TYPES:
        assert torch.equal(native.weighted_sum(rows, weights, dtype), truth.to(dtype))


def run(code: str) -> str:
    """What a process of its own prints, which loads the library that the tests built."""
    library = kernels.built()
    if library is None:
        pytest.skip("no C++ compiler")
    prelude = f"""
        import os, time, torch
        from pathlib import Path
        from kernels import Weight
        from retinue.memory.native import Format, Native
        native = Native(Path({str(library)!r}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_threads_sleep_and_end() -> None:
    """Idle threads wait in the kernel, and none is left when one is asked for."""
    out = run("""
        def state(thread):
            return Path(f"/proc/self/task/{thread}/stat").read_text().rpartition(")")[2].split()[0]
        before = set(os.listdir("/proc/self/task"))
        native.set_threads(4, 100)
        ours = set(os.listdir("/proc/self/task")) - before
        while any(state(thread) != "S" for thread in ours):
            time.sleep(0.01)
        native.set_threads(1, 0)
        print(len(ours), len(set(os.listdir("/proc/self/task")) - before))
    """)
    assert out == "3 0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_alone() -> None:
    out = run("""
        native.set_threads(3, 1000)
        weight, x = Weight(Format.INT4, 500, 256, 0), torch.ones(2, 256)
        truth = native.linear(weight.matrix, x)
        child = os.fork()
        same = torch.equal(native.linear(weight.matrix, x), truth)
        if child == 0:
            native.set_threads(2, 0)
            os._exit(0 if same and torch.equal(native.linear(weight.matrix, x), truth) else 1)
        print(same, os.waitpid(child, 0)[1])
    """)
    assert out == "True 0"


def test_many_short_calls_on_more_threads_than_cores() -> None:
    """Threads come late, fall asleep and wake: no unit is lost and none is done twice."""
    native = kernels.every()[-1]
    weight, x = Weight(Format.INT8, 200, 64, 0), torch.randn(3, 64)
    truth = native.linear(weight.matrix, x)
    for threads, spin_us in ((5, 0), (2, 5), (3, 200)):
        native.set_threads(threads, spin_us)
        for _ in range(300):
            assert torch.equal(native.linear(weight.matrix, x), truth)
    native.set_threads(1, 0)
