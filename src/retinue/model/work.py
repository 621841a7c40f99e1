"""One layer's work in one step: which rows belong to which expert, their outputs, and the sum.

Each pair of a token and one of its experts has an output row of its own. `Work` computes expert by
expert with torch, for every family and type; `NativeWork` gives as many experts as are ready to
one call of the native kernels. Rows are summed in router order, in fp32.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from retinue.memory.formats import Packed
from retinue.memory.grouped import grouped_form
from retinue.memory.layout import Block
from retinue.memory.link import Views
from retinue.model.grouped_linear import grouped_product
from retinue.model.kernels import ExpertKernel
from retinue.model.linear import product
from retinue.types import Demand, IntArray

# Shows the parameters of (layer, expert) in a slot.
ViewsOf = Callable[[int, int, int], Views]
SUM_BLOCK_TOKENS = 64  # bounds the rows that are held in fp32


class Work:
    """The rows of one layer and step, computed with torch."""

    def __init__(
        self,
        module: nn.Module,
        views_of: Callable[[int, int], Views],
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """hidden: [tokens, hidden]; index, weights: [tokens, k], ids beyond the experts skipped.

        `views_of(expert, slot)` shows the parameters of an expert in its slot.
        """
        self._module, self._views_of = module, views_of
        self._hidden, self._weights = hidden, weights
        self._tokens, self._k = index.shape
        self._ids = index.reshape(-1).numpy()
        self._count: int = module.num_experts  # type: ignore[assignment]
        order = np.argsort(self._ids, kind="stable")
        self._order = order
        sorted_ids = self._ids[order]
        self._valid = int(np.searchsorted(sorted_ids, self._count))
        self.experts, starts = _runs(sorted_ids[: self._valid])
        spans = pairwise([*starts.tolist(), self._valid])
        self._spans = dict(zip(self.experts.tolist(), spans, strict=True))
        self._rows = self._new_rows()

    def _new_rows(self) -> torch.Tensor:
        shape, hidden = (self._tokens * self._k, self._hidden.shape[-1]), self._hidden
        everyone = self._valid == len(self._order)
        return hidden.new_empty(shape) if everyone else hidden.new_zeros(shape)

    def demand(self, layer: int) -> Demand:
        """The distinct experts, with their tokens and summed weights."""
        flat = self._weights.reshape(-1).float().numpy()
        weight = np.bincount(
            np.minimum(self._ids, self._count), weights=flat, minlength=self._count + 1
        )
        tokens = np.array([stop - start for start, stop in self._spans.values()], dtype=np.int64)
        return Demand(layer, self.experts, tokens, weight[self.experts].astype(np.float32))

    def compute(self, experts: Sequence[int], slots: IntArray) -> None:
        """Run `experts`, which lie in `slots`, on their tokens, into their rows."""
        for expert, slot in zip(experts, slots.tolist(), strict=True):
            self._compute_one(expert, self._views_of(expert, slot))

    def _compute_one(self, expert: int, views: Views) -> None:
        start, stop = self._spans[expert]
        rows = self._order[start:stop]
        if self._tokens == 1:
            output = apply_expert(self._module, self._hidden, views)[0]
            for row in rows.tolist():  # more than one where a router names an expert twice
                self._rows[row] = output
            return
        at = torch.from_numpy(rows)
        padding = padded_tokens(len(rows)) - len(rows)
        inputs = self._hidden.index_select(0, functional.pad(at // self._k, (0, padding)))
        outputs = apply_expert(self._module, inputs, views)[: len(rows)]
        self._rows.index_copy_(0, at, outputs.to(self._rows.dtype))

    def result(self) -> torch.Tensor:
        """Weight the rows and sum them in router order: [tokens, hidden]."""
        rows = self._rows.view(self._tokens, self._k, -1)
        out = torch.empty_like(self._hidden)
        for start in range(0, self._tokens, SUM_BLOCK_TOKENS):
            block = slice(start, start + SUM_BLOCK_TOKENS)
            out[block] = weighted_sum(rows[block], self._weights[block])
        return out


class NativeWork(Work):
    """The same through the native kernels, which take several experts at once.

    Where torch's matrix products are faster, for many tokens of a plain expert, torch computes.
    """

    def __init__(self, kernel: ExpertKernel, *arguments: Any) -> None:
        self._kernel = kernel
        super().__init__(*arguments)

    def _new_rows(self) -> torch.Tensor:
        everyone = self._valid == len(self._order)
        new = torch.empty if everyone else torch.zeros
        return new(self._tokens * self._k, self._hidden.shape[-1])

    def compute(self, experts: Sequence[int], slots: IntArray) -> None:
        """Run `experts`, which lie in `slots`, in one call but for those that torch runs faster."""
        if self._kernel.most_tokens < self._tokens:
            experts, slots = self._leave_to_torch(experts, slots)
        if experts:
            pairs = [self._order[slice(*self._spans[expert])] for expert in experts]
            self._kernel.run(experts, slots, pairs, self._hidden, self._rows)

    def _leave_to_torch(
        self, experts: Sequence[int], slots: IntArray
    ) -> tuple[Sequence[int], IntArray]:
        """Compute the experts with very many tokens; the others are returned."""
        sizes = [stop - start for start, stop in map(self._spans.__getitem__, experts)]
        many = np.array(sizes) > self._kernel.most_tokens
        super().compute([e for e, heavy in zip(experts, many, strict=True) if heavy], slots[many])
        return [e for e, heavy in zip(experts, many, strict=True) if not heavy], slots[~many]

    def result(self) -> torch.Tensor:
        """Weight the rows and sum them in router order: [tokens, hidden]."""
        return self._kernel.sum(self._rows, self._weights, self._hidden.dtype)


def _runs(ids: IntArray) -> tuple[IntArray, IntArray]:
    """The distinct ones of sorted `ids`, and where each begins."""
    begins = np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1]])) if len(ids) else ids
    return ids[begins], begins


def padded_tokens(count: int) -> int:
    """The number of rows that `count` tokens are computed as.

    The matrix library compiles a kernel for every number of rows it meets and keeps up to a
    megabyte for each; a prefill of 2,000 tokens met hundreds. With few sizes there are few.
    """
    if count <= 32:
        return 1 << (count - 1).bit_length()
    return -(-count // 32) * 32


def weighted_sum(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over k of `weights [n, k] * rows [n, k, hidden]`, one after the other, in fp32."""
    scales = weights.float().unsqueeze(-1)
    rows = rows.float()
    total = rows[:, 0] * scales[:, 0]
    for k in range(1, rows.shape[1]):
        total.addcmul_(rows[:, k], scales[:, k])
    return total


def apply_expert(module: nn.Module, inputs: torch.Tensor, views: Views) -> torch.Tensor:
    """One expert's feed-forward network: inputs [n, hidden] -> [n, hidden], in inputs' type.

    `views` holds its parameters in the checkpoint's own type and layout; the module's flags say
    how they are to be read.
    """
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up = _linear(module, inputs, views, up_name)
    activate = module._apply_gate if module.has_gate else module.act_fn
    out = _linear(module, activate(up), views, "down_proj")  # type: ignore[operator]
    return module.post_expert_norm(out) if module.has_post_expert_norm else out  # type: ignore[operator]


def _linear(module: nn.Module, inputs: torch.Tensor, views: Views, name: str) -> torch.Tensor:
    biases = views.get(f"{name}_bias")
    bias = _whole(biases, inputs.dtype) if biases is not None else None
    blocks = [_product(inputs, block, module.is_transposed) for block in views[name]]
    out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
    return out if bias is None else out + bias


def _product(inputs: torch.Tensor, weight: Block, transposed: Any) -> torch.Tensor:
    if isinstance(weight, Packed) and (form := grouped_form(weight.format)) is not None:
        return grouped_product(form, weight.weights, weight.scales, inputs)
    numbers = in_type(weight, inputs.dtype)
    return product(inputs, numbers.T if transposed else numbers)


def in_type(block: Block, dtype: torch.dtype) -> torch.Tensor:
    """`block` in the type that is computed with. What was packed lives until it was used."""
    return block.decode(dtype) if isinstance(block, Packed) else block.to(dtype)


def _whole(blocks: tuple[Block, ...], dtype: torch.dtype) -> torch.Tensor:
    numbers = [in_type(block, dtype) for block in blocks]
    return numbers[0] if len(numbers) == 1 else torch.cat(numbers)
