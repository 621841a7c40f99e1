"""What the tokens of a pass will choose in every layer, from their ids, as soon as it begins.

The routing paths of ExpertFlow (arXiv 2410.17954). Deviation: the paper predicts a batch while
another one runs, so that the first layer is foreseen too; here the ids are seen in the first
layer's turn.
"""

from collections.abc import Sequence

import numpy as np

from retinue.policy.base import BoolArray, Prompt, Signal, View
from retinue.policy.parts.paths import Context, fresh, paths, together
from retinue.policy.predict.likely import chances
from retinue.policy.preset import Arrays
from retinue.types import Demand, FloatArray, IntArray

LIKELY = 0.0  # a score above it says that an expert is rather chosen than not


class Paths:
    """Reads along what each request's tokens are.

    arrays: of the kind `expertflow`, see `parts/kinds.py`. routed: the layers that its rows are,
    of `layers` in all.
    """

    needs: frozenset[Signal] = frozenset({"token_ids"})

    def __init__(self, arrays: Arrays, routed: Sequence[int], layers: int) -> None:
        self._arrays, self._layers = arrays, layers
        self.row = {layer: row for row, layer in enumerate(routed)}
        self._routed = np.array(routed, dtype=np.int64)
        self._contexts: dict[int, Context] = {}  # by the request's number
        self._step = -1
        # Of the pass that runs: [tokens, rows, experts], each token's chances to choose an expert;
        # [layers, experts], the chance that any of them does.
        self.chances: FloatArray | None = None
        self.needed: FloatArray | None = None

    def begin(self, prompt: Prompt) -> None:
        """The request's text begins."""
        self._contexts[prompt.sequence] = fresh(self._arrays)

    def observe(self, demand: Demand, view: View) -> None:
        """In the first layer of a pass, predict all of them."""
        if view.step == self._step:
            return
        self._step, self.chances, self.needed = view.step, None, None
        route = view.route
        if route is None or route.token_ids is None:
            return
        owners = route.sequences.tolist()
        if not self._contexts.keys() >= set(owners):
            return
        self.chances = chances(self._read(route.token_ids, owners))
        unused = np.prod(1 - self.chances, axis=0)
        self.needed = np.zeros((self._layers, unused.shape[1]), np.float32)
        self.needed[self._routed] = 1 - unused

    def end(self, sequence: int) -> None:
        """Its text is forgotten."""
        self._contexts.pop(sequence, None)

    def path(self, token_ids: IntArray) -> BoolArray:
        """Which experts a text of its own is likely to use: `[rows, experts]`."""
        scores, _ = paths(self._arrays, fresh(self._arrays), token_ids)
        return np.asarray((scores > LIKELY).any(axis=0))

    def _read(self, token_ids: IntArray, owners: list[int]) -> FloatArray:
        """Scores of all tokens of a pass: [tokens, rows, experts]."""
        distinct = list(dict.fromkeys(owners))
        if len(distinct) == len(owners):  # one token of each text
            before = [self._contexts[owner] for owner in owners]
            scores, after = together(self._arrays, before, token_ids)
            self._contexts.update(zip(owners, after, strict=True))
            return scores
        whose, parts, places = np.array(owners), [], []
        for owner in distinct:
            places.append(np.flatnonzero(whose == owner))
            ids, before_it = token_ids[places[-1]], self._contexts[owner]
            part, self._contexts[owner] = paths(self._arrays, before_it, ids)
            parts.append(part)
        order = np.argsort(np.concatenate(places))
        return np.asarray(np.concatenate(parts)[order], dtype=np.float32)
