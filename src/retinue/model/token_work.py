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

    chosen: [k] distinct experts, in router order; hidden: [1, hidden], contiguous; rows: fp32 [k,
    hidden], to be filled.
    """

    __slots__ = ("_hidden", "_kernel", "_ranks", "_rows")

    def __init__(
        self, kernel: ExpertKernel, chosen: Sequence[int], hidden: torch.Tensor, rows: torch.Tensor
    ) -> None:
        self._kernel, self._hidden, self._rows = kernel, hidden, rows
        self._ranks = {expert: rank for rank, expert in enumerate(chosen)}

    def compute(self, experts: Sequence[int], slots: IntArray) -> None:
        """Run `experts`, which lie in `slots`, in one call."""
        ranks = np.array([self._ranks[expert] for expert in experts])
        self._kernel.run_ranks(experts, slots, ranks, self._hidden, self._rows)
