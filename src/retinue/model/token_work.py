"""A lone token's work in one layer: a row for each of its experts, summed in router order.

What decoding does most, and where some of the experts may still be on their way: the same as
`model/work.py` does for any number of tokens, without sorting what is one of each.
"""

from collections.abc import Sequence

import numpy as np
import torch

from retinue.model.kernels import ExpertKernel
from retinue.types import IntArray


class TokenWork:
    """The rows of one token in one layer, computed natively.

    chosen: [k] distinct experts, in router order; hidden: [1, hidden]; weights: [1, k].
    """

    def __init__(
        self,
        kernel: ExpertKernel,
        chosen: Sequence[int],
        hidden: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        self._kernel, self._weights, self._dtype = kernel, weights, hidden.dtype
        self._hidden = hidden.contiguous()
        self._ranks = {expert: rank for rank, expert in enumerate(chosen)}
        self._rows = torch.empty(len(chosen), hidden.shape[1])
        self._begun = False

    def compute(self, experts: Sequence[int], slots: IntArray) -> None:
        """Run `experts`, which lie in `slots`, in one call."""
        ranks = self._ranks_of(experts)
        self._kernel.run_ranks(experts, slots, ranks, self._hidden, self._rows)

    def begin(self, experts: Sequence[int], slots: IntArray) -> None:
        """Let the other threads begin with `experts`, if any, who stay in `slots` until `end`."""
        if experts:
            ranks = self._ranks_of(experts)
            self._kernel.begin_ranks(experts, slots, ranks, self._hidden, self._rows)
            self._begun = True  # who is interrupted before this leaves it to the next who begins

    def end(self) -> None:
        """Compute what is left of what was begun, if anything is."""
        if self._begun:
            self._begun = False
            self._kernel.end()

    def result(self) -> torch.Tensor:
        """Weight the rows and sum them: [1, hidden]."""
        return self._kernel.sum(self._rows, self._weights, self._dtype)

    def _ranks_of(self, experts: Sequence[int]) -> IntArray:
        return np.array([self._ranks[expert] for expert in experts])
