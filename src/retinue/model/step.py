"""Decoding steps that were prepared: recorded once for a number of sequences, then run natively.

A step of n sequences, one token each, is always the same list of small operations; transformers
needs most of its time to find that out. Where a family's steps cannot be prepared, or nothing is
there to run them, `run` says so once, and the network runs as it comes.
"""

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from retinue.errors import Unsupported
from retinue.memory import evaluator as layout
from retinue.memory import native
from retinue.model.kv import Pool, Segment, Store, window_left
from retinue.model.program import Program, Spans
from retinue.model.record import record


class Step:
    """The prepared step of `count` sequences."""

    def __init__(self, model: Any, store: Store, count: int, library: native.Native) -> None:
        self._store = store
        self._tokens = torch.zeros(1, count, dtype=torch.int64)
        self._positions = torch.arange(count, dtype=torch.int64).view(1, count)
        self._stops = np.zeros(count, dtype=np.int64)
        self._places = np.zeros(count, dtype=np.uint64)
        self._spans: dict[int | None, Spans] = {}
        recording = record(model, store, self._tokens, self._positions)
        pools = {n: layer for n, layer in enumerate(store.layers) if isinstance(layer, Pool)}
        self._program = Program(recording, library, pools, self._spans_of)
        self.native_share = self._program.native_share

    def run(self, segments: Items[Segment]) -> torch.Tensor:
        """The logits after each of the segments: [count, vocabulary]. The pass is to be committed.
        """
        sequences = [segment.sequence for segment in segments]
        lengths = [sequence.length for sequence in sequences]
        self._tokens.numpy()[0] = [segment.tokens[0] for segment in segments]
        self._positions.numpy()[0] = lengths
        self._stops[:] = lengths
        self._stops += 1
        self._places[:] = [sequence.places.data_ptr() for sequence in sequences]
        for spans in self._spans.values():
            spans.starts[:] = [window_left(sequence, spans.window) for sequence in sequences]
        self._program.run()
        return self._program.logits[0].clone()

    def _spans_of(self, window: int | None) -> Spans:
        if window not in self._spans:
            starts = np.zeros(len(self._stops), dtype=np.int64)
            table = np.zeros(1, dtype=layout.SEQUENCES)
            table["count"], table["places"] = len(starts), self._places.ctypes.data
            table["starts"], table["stops"] = starts.ctypes.data, self._stops.ctypes.data
            self._spans[window] = Spans(window, starts, table)
        return self._spans[window]
