"""Runs whole texts through the network without a KV cache: how likely each token was, and routing.

One forward pass a text, so that a model of any family is measured as it is. It knows neither
tasks nor presets: whoever calls it says whether routers are restricted.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from retinue.errors import NotFinite
from retinue.memory.mover import Mover
from retinue.metrics import Metrics, PhaseCounters
from retinue.model.experts import ExpertHost
from retinue.model.load import Network
from retinue.trace import AHEAD
from retinue.types import FloatArray, IntArray

BLOCK_LOGITS = 1 << 20  # converted to fp32 at once


@dataclass(frozen=True, slots=True)
class Scored:
    """Per scored position the loss in nats and the id that the model would have chosen: `[n]`."""

    nll: FloatArray
    best: IntArray


@dataclass(frozen=True, slots=True)
class LayerRouting:
    """What one layer's router said of every token of a text."""

    layer: int
    experts: IntArray  # [tokens, k]; ids beyond the experts mean none
    weights: FloatArray  # [tokens, k]
    # If asked for, see `trace.Routed`; there are no more layers ahead than there are.
    scores: FloatArray | None = None  # [tokens, experts]
    ahead: Mapping[str, FloatArray] = field(default_factory=dict)  # [tokens, experts], by signal
    hidden: FloatArray | None = None  # [tokens, hidden]


class Scorer:
    """Scores texts. One thread, and nothing else may run on the host meanwhile."""

    def __init__(self, network: Network, host: ExpertHost, mover: Mover, metrics: Metrics) -> None:
        self._model, self._host = network.model, host
        self._mover, self._metrics = mover, metrics
        self.costs = PhaseCounters()  # of all texts so far

    @torch.inference_mode()
    def score(self, ids: list[int], count: int) -> Scored:
        """Run `ids` and score the last `count` of them, fewer than all.

        The host's accounts hold two usages then: of the tokens before those, and of those. Raises
        NotFinite, Cancelled, or the error of a read.
        """
        assert 1 <= count < len(ids)
        read = self._mover.bytes_read
        counters = self._metrics.begin("prefill")
        try:
            # Accounts keep apart what was asked and what was answered.
            rows = [len(ids) - count, count]
            self._host.begin_pass("prefill", rows, [0, 0], ids)
            logits = self._model(
                input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=count + 1
            ).logits[0, -count - 1 : -1]  # not every class of model knows `logits_to_keep`
        except BaseException:
            self._host.end_pass(succeeded=False)
            raise
        self._host.end_pass(succeeded=True)
        counters.tokens = len(ids)
        counters.bytes_read = self._mover.bytes_read - read
        self.costs.add(counters)
        return _scored(logits, torch.tensor(ids[-count:]))

    @torch.inference_mode()
    def embedding(self, ids: list[int]) -> FloatArray:
        """The mean of the embeddings of `ids`: [hidden]."""
        rows = self._model.get_input_embeddings()(torch.tensor(ids)).float()
        mean: FloatArray = rows.mean(dim=0).numpy()
        return mean

    @contextmanager
    def recording(self, signals: Collection[str] = ()) -> Iterator[list[LayerRouting]]:
        """Within, the list holds the routing of the last text, a layer each, in order.

        `signals`: which of `scores`, those of `AHEAD`, and `hidden` are recorded with it.
        """
        seen: list[LayerRouting] = []

        def watch(
            layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
        ) -> None:
            if seen and seen[-1].layer >= layer:
                seen.clear()
            ids, given = index.numpy().astype(np.int64), weights.float().numpy()
            scores = self._host.scores(layer, hidden) if "scores" in signals else None
            ahead = self._ahead(layer, hidden, signals)
            inputs = hidden.float().numpy().copy() if "hidden" in signals else None
            seen.append(LayerRouting(layer, ids, given.copy(), scores, ahead, inputs))

        self._host.watch = watch
        try:
            yield seen
        finally:
            self._host.watch = None

    def _ahead(
        self, layer: int, hidden: torch.Tensor, signals: Collection[str]
    ) -> dict[str, FloatArray]:
        """What coming layers' routers say of this layer's input, as far as they can be asked."""
        found: dict[str, FloatArray] = {}
        for name in AHEAD:
            layer = self._host.attendance.following.get(layer, -1)
            scores = self._host.scores(layer, hidden) if name in signals else None
            if scores is not None:
                found[name] = scores
        return found


def _scored(logits: torch.Tensor, targets: torch.Tensor) -> Scored:
    """Loss and first choice, a few rows at a time: fp32 copies of all logits may be large."""
    rows = max(1, BLOCK_LOGITS // logits.shape[-1])
    nll, best = np.empty(len(targets), np.float32), np.empty(len(targets), np.int64)
    for start in range(0, len(targets), rows):
        block = slice(start, start + rows)
        values = logits[block].float()
        chosen = values.gather(-1, targets[block, None]).squeeze(-1)
        nll[block] = (values.logsumexp(-1) - chosen).numpy()
        best[block] = values.argmax(-1).numpy()
    if not np.isfinite(nll).all():
        raise NotFinite(
            "the model computed NaN or infinite logits",
            hint="`retinue run` on this model says which weight is damaged",
        )
    return Scored(nll, best)
