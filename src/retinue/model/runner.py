"""Runs the network on the next tokens of a sequence. Knows no requests and no text."""

import time

import numpy as np
import torch

from retinue.errors import NotFinite
from retinue.memory.mover import Mover
from retinue.metrics import Metrics
from retinue.model.experts import ExpertHost
from retinue.model.kv import SequenceCache
from retinue.model.load import Network
from retinue.model.reference import DAMAGED, damaged_expert, read_expert
from retinue.types import Phase


class Runner:
    """`run` is one forward pass; it fills the sequence's cache and returns the last logits."""

    def __init__(self, network: Network, host: ExpertHost, mover: Mover, metrics: Metrics) -> None:
        self._network, self._host, self._mover, self._metrics = network, host, mover, metrics
        self._model = network.model

    @property
    def host(self) -> ExpertHost:
        """The experts' side of the network."""
        return self._host

    def new_sequence(self, context: int) -> SequenceCache:
        """An empty sequence with room for `context` tokens."""
        return SequenceCache(self._network.text_config.num_hidden_layers, context)

    @torch.inference_mode()
    def run(self, tokens: list[int], sequence: SequenceCache, phase: Phase) -> torch.Tensor:
        """Append `tokens` to `sequence`; returns the logits after the last: [vocabulary].

        Raises NotFinite, Cancelled, or the error of a read; the sequence is then as before.
        """
        before, read = sequence.length, self._mover.bytes_read
        used = self._host.cache.used_bytes_read
        started = time.perf_counter()
        self._metrics.phase = phase
        self._host.cache.begin_step(phase)
        try:
            logits = self._model(
                input_ids=torch.tensor([tokens]),
                past_key_values=sequence,
                use_cache=True,
                logits_to_keep=1,
            ).logits[0, -1]
            if not bool(torch.isfinite(logits).all()):
                raise self._not_finite()
        except BaseException:
            sequence.truncate(before)
            self._host.cache.cancel_all()
            raise
        counters = self._metrics.now
        elapsed = time.perf_counter() - started
        counters.tokens += len(tokens)
        counters.seconds += elapsed
        counters.steps_s.append(elapsed)
        counters.bytes_read += self._mover.bytes_read - read
        counters.used_bytes_read += self._host.cache.used_bytes_read - used
        return torch.as_tensor(logits)

    def _not_finite(self) -> NotFinite:
        """Find out which weight made the logits NaN or infinite."""
        cache, layouts = self._host.cache, self._network.experts.layouts
        for name, parameter in self._model.named_parameters():
            if not parameter.is_meta and not bool(torch.isfinite(parameter).all()):
                return NotFinite(f"the weight `{name}` holds NaN or infinite values", hint=DAMAGED)
        # Of the experts that this pass used, some may have left again.
        for layer, expert in np.argwhere(cache.last_used == cache.step).tolist():
            layout, slot = layouts[layer][expert], int(cache.slot_of[layer, expert])
            views = cache.views(slot) if slot >= 0 else read_expert(layout)
            if (error := damaged_expert(layer, expert, layout, views)) is not None:
                return error
        return NotFinite(
            "the model computed NaN or infinite logits from finite weights",
            hint="a float16 checkpoint may overflow; use its bfloat16 or float32 form",
        )
