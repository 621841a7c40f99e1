"""Runs the network on the next tokens of sequences. Knows no requests and no text."""

import time
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from retinue.errors import NotFinite
from retinue.memory.lending import Lending
from retinue.memory.mover import Mover
from retinue.metrics import Metrics, PhaseCounters
from retinue.model.experts import ExpertHost
from retinue.model.kernels import torch_threads
from retinue.model.kv import Segment, Sequence, Store
from retinue.model.load import Network
from retinue.model.reference import DAMAGED, damaged_expert, read_expert
from retinue.model.step import Steps
from retinue.types import Phase


class Runner:
    """`run` appends tokens to sequences and returns the logits after each one's last.

    Decoding goes through `steps` where they are given and can. `lending` hears of each pass.
    """

    def __init__(
        self,
        network: Network,
        host: ExpertHost,
        mover: Mover,
        metrics: Metrics,
        store: Store,
        steps: Steps | None = None,
        lending: Lending | None = None,
    ) -> None:
        self._network, self._host, self._mover, self._metrics = network, host, mover, metrics
        self._model, self._store, self._steps = network.model, store, steps
        self._lending = lending
        # What is left to torch in a prepared step is too small to share between threads.
        native = network.model.dtype == torch.bfloat16 and len(host.kernels) == host.layers
        self._step_threads = 1 if native else torch.get_num_threads()

    @property
    def host(self) -> ExpertHost:
        """The experts' side of the network."""
        return self._host

    def new_sequence(self, blocks: list[int], length: int = 0) -> Sequence:
        """A sequence over `blocks` of the pool, whose first `length` tokens are there already."""
        return Sequence(blocks, length)

    def groups(self, segments: Items[Segment]) -> list[list[int]]:
        """Indices of the segments that can share a forward pass.

        Running states advance row by row, so families with them share passes of one token each.
        """
        everyone = list(range(len(segments)))
        single = all(len(segment.tokens) == 1 and segment.sequence.length for segment in segments)
        if self._store.packable or (self._store.shareable and single):
            return [everyone]
        return [[index] for index in everyone]

    @torch.inference_mode()
    def run(self, segments: Items[Segment], phase: Phase) -> tuple[torch.Tensor, PhaseCounters]:
        """One pass: the logits after each segment [segments, vocabulary], and what it cost.

        `segments` are a group of `groups`, so that an expert is read once for all of them. Raises
        NotFinite, Cancelled, or the error of a read; the sequences are then as before (but for
        those with a cache of their own, which are lost).
        """
        read, used = self._mover.bytes_read, self._host.cache.used_bytes_read
        started_reads = self._host.cache.reads.started
        dense = self._network.dense.seconds
        started = time.perf_counter()
        counters = self._metrics.begin(phase)
        try:
            rows = [len(segment.tokens) for segment in segments]
            numbers = [segment.sequence.number for segment in segments]
            tokens = [token for segment in segments for token in segment.tokens]
            if self._lending is not None:
                lengths = [s.sequence.length + len(s.tokens) for s in segments]
                self._lending.begin_pass(phase, len(tokens), lengths)
            self._host.begin_pass(phase, rows, numbers, tokens)
            logits = self._logits(segments, phase)
            if not _is_finite(logits):
                raise self._not_finite()
            self._store.commit()
        except BaseException:
            self._store.end()
            self._host.end_pass(succeeded=False)
            raise
        self._host.end_pass(succeeded=True)
        counters.passes = 1
        counters.tokens = sum(len(segment.tokens) for segment in segments)
        counters.seconds = time.perf_counter() - started
        counters.steps_s.append(counters.seconds)
        counters.dense_s = self._network.dense.seconds - dense
        counters.bytes_read = self._mover.bytes_read - read
        counters.reads = self._host.cache.reads.started - started_reads
        counters.used_bytes_read = self._host.cache.used_bytes_read - used
        self._metrics.finish()
        return logits, counters

    def _logits(self, segments: Items[Segment], phase: Phase) -> torch.Tensor:
        if not self._store.shareable:
            return self._alone(segments[0])
        if self._steps is not None and phase == "decode":
            with torch_threads(self._step_threads):
                logits = self._steps.run(segments)
            if logits is not None:
                return logits
        return shared_pass(self._model, self._store, segments)

    def _alone(self, segment: Segment) -> torch.Tensor:
        """A pass over one sequence and the cache that the model makes for it."""
        sequence = segment.sequence
        output = self._model(
            input_ids=torch.tensor([list(segment.tokens)]),
            past_key_values=sequence.own,
            use_cache=True,
            logits_to_keep=1,
        )
        sequence.own = output.past_key_values
        sequence.length += len(segment.tokens)
        return torch.as_tensor(output.logits[:, -1])

    def _not_finite(self) -> NotFinite:
        """Find out which weight made the logits NaN or infinite."""
        cache, layouts = self._host.cache, self._network.experts.layouts
        for name, parameter in self._model.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                return NotFinite(f"the weight `{name}` holds NaN or infinite values", hint=DAMAGED)
        # Of the experts that this pass used, some may have left again.
        for layer, expert in np.argwhere(cache.last_used == cache.step).tolist():
            layout, slot = layouts[layer][expert], int(cache.slot_of[layer, expert])
            views = self._host.views(layer, expert, slot) if slot >= 0 else read_expert(layout)
            if (error := damaged_expert(layer, expert, layout, views)) is not None:
                return error
        return NotFinite(
            "the model computed NaN or infinite logits from finite weights",
            hint="a float16 checkpoint may overflow; use its bfloat16 or float32 form",
        )


def _is_finite(logits: torch.Tensor) -> bool:
    """Whether all are finite. Their sum says it, unless it is too large itself."""
    with torch_threads(1):
        return bool(logits.sum().isfinite()) or bool(logits.isfinite().all())


def shared_pass(model: Any, store: Store, segments: Items[Segment]) -> torch.Tensor:
    """A pass over the store, to be committed: the logits after each segment [segments, vocabulary].

    One row of tokens, or a column where running states advance row by row.
    """
    column = not store.packable and len(segments) > 1
    tokens = torch.tensor([token for segment in segments for token in segment.tokens])
    positions = torch.cat([_positions(segment) for segment in segments])
    ends = torch.tensor([len(segment.tokens) for segment in segments]).cumsum(0) - 1
    shape = (-1, 1) if column else (1, -1)
    store.begin(segments)
    logits: torch.Tensor = model(
        input_ids=tokens.view(shape),
        position_ids=positions.view(shape),
        past_key_values=store,
        use_cache=True,
        logits_to_keep=1 if column or len(segments) == 1 else ends,
    ).logits
    logits = logits[:, -1] if column else logits[0]
    if len(logits) != len(segments):  # not every class of model knows `logits_to_keep`
        logits = logits[ends]
    return logits


def _positions(segment: Segment) -> torch.Tensor:
    start = segment.sequence.length
    return torch.arange(start, start + len(segment.tokens))
