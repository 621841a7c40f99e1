"""What policies are shown of a pass token by token, where one of them looks."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from retinue.model.restriction import Rerouted
from retinue.policy.base import Route
from retinue.policy.policies import Policies
from retinue.types import FloatArray, IntArray


class Shown:
    """Makes the routes of one pass after the other; `wanted` says whether anybody looks.

    `scores(layer, hidden)` asks a layer's own router.
    """

    def __init__(
        self, policies: Policies, scores: Callable[[int, torch.Tensor], FloatArray | None]
    ) -> None:
        self._needs, self._scores = policies.needs, scores
        self.wanted = policies.sees_tokens
        self._sequences: IntArray = np.zeros(0, dtype=np.int64)
        self._token_ids: Sequence[int] = ()

    def close(self) -> None:
        """Let go of the routers."""
        self._scores = lambda layer, hidden: None

    def begin_pass(
        self, rows: Sequence[int], sequences: Sequence[int] | None, token_ids: Sequence[int]
    ) -> None:
        """A pass over `token_ids` starts, `rows[i]` of them of the request `sequences[i]`."""
        if self.wanted:
            whose = range(len(rows)) if sequences is None else sequences
            self._sequences = np.repeat(np.asarray(whose), np.asarray(rows))
            self._token_ids = token_ids

    def route(
        self,
        layer: int,
        hidden: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        rerouted: Rerouted | None,
    ) -> Route | None:
        """What the layer's own router chose, with the signals that are needed; None: nobody looks.

        hidden: [tokens, hidden]; index, weights: [tokens, k].
        """
        if not self.wanted:
            return None
        if rerouted is None:
            chosen, given = index.numpy(), weights.float().numpy()
        else:
            chosen, given = rerouted.chosen, rerouted.weights
        needs = self._needs
        scores = self._scores(layer, hidden) if "scores" in needs else None
        shown = hidden.float().numpy() if "hidden" in needs else None
        tokens = np.asarray(self._token_ids, np.int64) if "token_ids" in needs else None
        return Route(layer, chosen, given, self._sequences, scores, shown, tokens)
