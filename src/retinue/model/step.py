"""Decoding steps that were prepared: recorded once for a number of sequences, then run natively.

A step of n sequences, one token each, is always the same list of small operations; transformers
needs most of its time to find that out. Where a family's steps cannot be prepared, or nothing is
there to run them, `run` says so once, and the network runs as it comes.
"""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import torch

from retinue.errors import Unsupported
from retinue.memory import evaluator as layout
from retinue.memory import native
from retinue.metrics import Clock
from retinue.model.kv import Pool, Segment, Store, window_left
from retinue.model.native_layers import NativeLayers
from retinue.model.program import Memory, Program, Spans
from retinue.model.record import record

MOST_SEQUENCES = 16  # of a prepared step; with more, what a step costs besides products is little
LEAST_NATIVE = 0.8  # of a step's operations; with less it is not worth the preparation
TYPES = (torch.float32, torch.bfloat16)


class Steps:
    """The prepared steps of one model, by the number of sequences; made when first needed.

    `say` is told once why steps run unprepared, if they do. `reason`, if it is given, is why none
    can be prepared. `clock` counts the time of steps but for their experts. `native_layers` says
    which experts may run within a step.
    """

    def __init__(
        self,
        model: Any,
        store: Store,
        say: Callable[[str], None],
        reason: str = "",
        clock: Clock | None = None,
        native_layers: NativeLayers | None = None,
    ) -> None:
        self._clock, self._native_layers = clock or Clock(), native_layers
        self._model, self._store, self._say = model, store, say
        self._steps: dict[int, Step | None] = {}
        self._library = native.library()
        self._off = False
        if self._library is None:
            reason = f"the native library is missing ({native.why_not()})"
        elif model.dtype not in TYPES:
            reason = f"not for {str(model.dtype).removeprefix('torch.')}"
        if reason:
            self._give_up(reason)

    def run(self, segments: Items[Segment]) -> torch.Tensor | None:
        """The logits after each segment [segments, vocabulary], of a pass that is to be committed.

        None where the network has to run as it comes. Raises what experts raise.
        """
        count = len(segments)
        if self._off or count > MOST_SEQUENCES:
            return None
        if not all(len(s.tokens) == 1 and s.sequence.length for s in segments):
            return None
        step = self.prepare(count)
        if step is None:
            return None
        self._store.begin(segments)
        return step.run(segments)

    def prepare(self, count: int) -> "Step | None":
        """The step of `count` sequences, recorded if it was not yet."""
        if count not in self._steps and not self._off:
            try:
                assert self._library is not None
                clock, native_layers = self._clock, self._native_layers
                step = Step(self._model, self._store, count, self._library, clock, native_layers)
                self._steps[count] = step
                if step.native_share < LEAST_NATIVE:
                    raise Unsupported(f"only {step.native_share:.0%} of its operations are known")
            except Exception as error:  # whatever a family's own code raises
                self._steps[count] = None
                self._give_up(str(error).splitlines()[0] if str(error) else repr(error))
        return self._steps.get(count)

    def _give_up(self, reason: str) -> None:
        self._off = True
        self._say(f"decoding steps run unprepared, which takes longer: {reason}")


class Step:
    """The prepared step of `count` sequences."""

    def __init__(
        self,
        model: Any,
        store: Store,
        count: int,
        library: native.Native,
        clock: Clock,
        native_layers: NativeLayers | None,
    ) -> None:
        self._store = store
        self._tokens = torch.zeros(1, count, dtype=torch.int64)
        self._positions = torch.arange(count, dtype=torch.int64).view(1, count)
        self._stops = np.zeros(count, dtype=np.int64)
        self._places = np.zeros(count, dtype=np.uint64)
        self._spans: dict[int | None, Spans] = {}
        recording = record(model, store, self._tokens, self._positions)
        pools = {n: layer for n, layer in enumerate(store.layers) if isinstance(layer, Pool)}
        memory = Memory(pools, self._spans_of)
        self._program = Program(recording, library, memory, clock, native_layers, count)
        self.native_share = self._program.native_share

    def run(self, segments: Items[Segment]) -> torch.Tensor:
        """The logits after each segment [count, vocabulary], of a pass to be committed."""
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
