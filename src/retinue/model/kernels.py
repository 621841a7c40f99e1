"""Which layers' experts the native kernels can run whole, and how they are called.

A kernel needs gate, up and down as three matrices without biases, and an activation that it knows.
The activation is not looked up by name but tried: a family that clamps or scales within its gate
shows it there. All else is run by torch, which takes every family.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from retinue.memory import native
from retinue.memory.grouped import Grouped
from retinue.memory.layout import ExpertLayout, Window
from retinue.memory.native import Activation, ExpertsShape, Native
from retinue.memory.tier import Tier
from retinue.model.expert_map import ExpertsModule
from retinue.types import IntArray

MOST_PLAIN_TOKENS = 64  # of one bf16 expert; torch is faster from about 100 on, see docs/LOG.md
UNLIMITED = 1 << 62
SPIN_US = 50  # how long the pool looks for work before it sleeps

_COUNTING = torch.arange(1025)  # more than any router chooses

_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
}


class ExpertKernel:
    """One layer's experts for the native library.

    offsets: [experts, 6], where codes and scales of gate, up and down lie in an expert's slot.
    """

    def __init__(self, library: Native, shape: ExpertsShape, offsets: IntArray, tier: Tier) -> None:
        self._library, self._offsets = library, np.ascontiguousarray(offsets, dtype=np.int64)
        self._shapes = {shape.k: shape}
        self._shape = shape
        self._base, self._slot_bytes = tier.slab.data_ptr(), tier.slot_bytes
        self._plain = shape.format is native.Format.BF16

    @property
    def most_tokens(self) -> int:
        """With more tokens than these for one expert torch is faster."""
        return MOST_PLAIN_TOKENS if self._plain else UNLIMITED

    def run(
        self,
        experts: Sequence[int],
        slots: IntArray,
        pairs: Sequence[IntArray],
        hidden: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """Compute `experts`, which lie in `slots`, for their `pairs` (token * k + rank).

        hidden: [tokens, hidden]; rows: fp32 [tokens * k, hidden], of which those of `pairs` are
        written.
        """
        starts = np.zeros(len(pairs) + 1, dtype=np.int64)
        np.cumsum([len(some) for some in pairs], out=starts[1:])
        groups = torch.from_numpy(starts), torch.from_numpy(np.concatenate(pairs))
        shape, parts = self._of(len(rows) // len(hidden)), self._parts(experts, slots)
        self._library.experts(shape, parts, groups, hidden, rows)

    def run_token(
        self,
        experts: IntArray,
        slots: IntArray,
        ranks: IntArray,
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """The sum over `experts`, which lie in `slots`, for the one token that they all serve.

        hidden: [1, hidden]; weights: [1, k], those at `ranks` are the experts'. Returns hidden's
        shape and type.
        """
        count, k = len(experts), weights.shape[1]
        new = torch.empty if count == k else torch.zeros
        rows = new(k, hidden.shape[1])
        self.run_ranks(experts, slots, ranks, hidden.contiguous(), rows)
        return self.sum(rows, weights, hidden.dtype)

    def run_ranks(
        self,
        experts: Sequence[int] | IntArray,
        slots: IntArray,
        ranks: IntArray,
        hidden: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """Compute `experts`, which lie in `slots`, for the one token that they all serve.

        hidden: [1, hidden], contiguous; rows: fp32 [k, hidden], of which those at `ranks` are
        written, an expert each.
        """
        groups = _COUNTING[: len(ranks) + 1], torch.from_numpy(ranks)
        parts = self._parts(experts, slots)
        self._library.experts(self._of(len(rows)), parts, groups, hidden, rows)

    def end(self) -> None:
        """Compute what is left of what a layer of a step has begun, if anything was."""
        self._library.end_experts()

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self._shape.hidden

    def describe(self, table: Any, k: int) -> None:
        """Write into `table`, an `evaluator.LAYER`, what it says of the experts and their slots."""
        table["shape"] = self._of(k).numbers
        table["experts"] = len(self._offsets)
        table["offsets"] = self._offsets.ctypes.data
        table["slab"], table["slot_bytes"] = self._base, self._slot_bytes

    def _parts(self, experts: Sequence[int] | IntArray, slots: IntArray) -> torch.Tensor:
        """The addresses of codes and scales of gate, up and down: [experts, 6]."""
        parts = self._offsets[experts]
        parts += (self._base + slots * self._slot_bytes)[:, None]
        if self._plain:
            parts[:, 1::2] = 0  # there are no scales
        return torch.from_numpy(parts)

    def sum(self, rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Weight rows [tokens * k, hidden] and sum them in router order: [tokens, hidden]."""
        return self._library.weighted_sum(rows, weights.float().contiguous(), dtype)

    def _of(self, k: int) -> ExpertsShape:
        if k not in self._shapes:
            self._shapes[k] = replace(self._shape, k=k)
        return self._shapes[k]


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix of an expert in its slot, as the library names formats."""

    format: native.Format
    rows: int
    columns: int
    codes: int
    scales: int

    @property
    def size(self) -> tuple[native.Format, int, int]:
        """What all experts of a layer have in common."""
        return self.format, self.rows, self.columns

    def halves(self) -> "tuple[_Matrix, _Matrix] | None":
        """Its upper and its lower rows, unless a tile of rows would be cut."""
        rows, rest = divmod(self.rows, 2)
        if rest or (self.format is not native.Format.BF16 and rows % native.LANES):
            return None
        upper = replace(self, rows=rows)
        codes, scales = native.codes_bytes(*upper.size), native.scales_bytes(*upper.size)
        return upper, replace(upper, codes=self.codes + codes, scales=self.scales + scales)


def use_threads(threads: int) -> None:
    """Let torch and the native library compute with `threads` threads, the caller among them."""
    torch.set_num_threads(threads)
    if (library := native.library()) is not None:
        library.set_threads(threads, SPIN_US)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Within, torch computes with so many threads.

    While a model decodes, torch has little to do, now and then. To wake another thread for that
    takes longer than to do it: on a machine of two cores 8 ms, for the copy of 150,000 logits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def find_kernels(
    modules: Sequence[ExpertsModule],
    layouts: Sequence[Sequence[ExpertLayout]],
    tier: Tier,
    dtype: torch.dtype,
) -> Mapping[int, ExpertKernel]:
    """The kernel of each layer that has one, by layer; empty where the library is not there."""
    library = native.library()
    if library is None:
        return {}
    found: dict[int, ExpertKernel] = {}
    for module in modules:
        activation = _activation(module.module)
        experts = [_matrices(layout) for layout in layouts[module.layer]]
        parts = [matrices for matrices in experts if matrices is not None]
        if activation is None or len(parts) < len(experts):
            continue
        gate, _, down = parts[0]
        same = all([m.size for m in ms] == [gate.size, gate.size, down.size] for ms in parts)
        plain = gate.format is native.Format.BF16
        if not same or gate.format is not down.format or (plain and dtype != torch.bfloat16):
            continue
        shape = ExpertsShape(gate.format, dtype, activation, gate.columns, gate.rows, k=1)
        offsets = np.array([[place for m in ms for place in (m.codes, m.scales)] for ms in parts])
        found[module.layer] = ExpertKernel(library, shape, offsets, tier)
    return found


def _matrices(layout: ExpertLayout) -> tuple[_Matrix, _Matrix, _Matrix] | None:
    """Gate, up and down of an expert, if these are all that it has."""
    if layout.windows.keys() != {"gate_up_proj", "down_proj"}:
        return None
    gate_up = [_matrix(window) for window in layout.windows["gate_up_proj"]]
    down = [_matrix(window) for window in layout.windows["down_proj"]]
    if len(gate_up) == 1 and gate_up[0] is not None:
        gate_up = list(gate_up[0].halves() or [])
    if len(gate_up) != 2 or len(down) != 1:
        return None
    gate, up = gate_up
    if gate is None or up is None or down[0] is None:
        return None
    return gate, up, down[0]


def _matrix(window: Window) -> _Matrix | None:
    stored = window.format
    if isinstance(stored, Grouped) and window.scales is not None:
        kind = native.Format.INT4 if stored.bits == 4 else native.Format.INT8
        return _Matrix(kind, stored.rows, stored.columns, window.offset, window.scales.offset)
    plain = stored is None and window.strides is None and len(window.shape) == 2
    if plain and window.dtype == torch.bfloat16:
        rows, columns = window.shape
        return _Matrix(native.Format.BF16, rows, columns, window.offset, 0)
    return None


def _activation(module: nn.Module) -> Activation | None:
    """Which activation stands between the matrices, if it is one that the library has."""
    if not module.has_gate or not module.is_concatenated or module.is_transposed:
        return None
    if module.has_bias or module.has_post_expert_norm:
        return None
    wide = torch.tensor([-1e3, -50.0, 50.0, 1e3])
    gate = torch.cat([torch.linspace(-12, 12, 97), wide])
    up = gate.flip(0) + 0.5
    got = module._apply_gate(torch.cat([gate, up]).unsqueeze(0))[0]  # type: ignore[operator]
    for activation, function in _ACTIVATIONS.items():
        if torch.allclose(got, function(gate) * up, rtol=1e-5, atol=1e-6):
            return activation
    return None
