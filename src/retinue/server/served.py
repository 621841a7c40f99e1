"""The loaded model on the engine thread: what it is, and a picture of it for other threads.

Everything but `facts` and `picture` belongs to the engine thread.
"""

import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinue.config import Config
from retinue.engine.llm import LLM
from retinue.engine.request import Request
from retinue.memory.machine import resident_bytes
from retinue.metrics import LayerCounters, PhaseCounters
from retinue.policy.base import BoolArray
from retinue.types import Phase

PHASES: tuple[Phase, ...] = ("prefill", "decode")
NOTHING = LayerCounters()
PICTURE_S = 0.25  # how old a picture may be while something runs


@dataclass(frozen=True, slots=True)
class Picture:
    """How the engine stood at one moment. Nobody changes it."""

    resident: BoolArray  # [layers, experts]
    layers: list[dict[Phase, LayerCounters]]
    running: dict[str | None, int]  # requests, by task
    waiting: dict[str | None, int]
    kv_used: float  # share of the blocks
    prefill: dict[str, float]  # the counters of all passes so far
    decode: dict[str, float]
    resident_bytes: int
    peak_bytes: int
    at: float = field(default_factory=time.monotonic)


class Served:
    """A model that is served. Opened on the engine thread; raises what LLM raises."""

    def __init__(self, model: str | Path, config: Config, beside: int) -> None:
        self.llm = LLM.from_config(model, config, beside=beside)
        self.assembly = self.llm.assembly
        self.engine = self.assembly.engine
        self.tokenizer: Any | None = self.llm.tokenizer
        self.loaded_at = int(time.time())
        self.picture = self._take()

    def infer(self, ids: list[int]) -> str | None:
        """The task of a prompt that names none; None: unknown. From any thread."""
        return None

    def stepped(self, moved: list[Request]) -> None:
        """See `bridge.Model`: takes a new picture now and then, and when nothing is left to do."""
        old = time.monotonic() - self.picture.at >= PICTURE_S
        if old or not self.engine.busy:
            self.picture = self._take()

    def close(self) -> None:
        """Free threads, files and memory."""
        self.llm.close()

    def _take(self) -> Picture:
        scheduler, cache = self.engine.scheduler, self.assembly.cache
        total = self.assembly.metrics.total
        pool = scheduler.pool
        return Picture(
            resident=cache.slot_of >= 0,
            layers=[self._layer(layer) for layer in range(len(cache.slot_of))],
            running=dict(Counter(request.task for request in scheduler.running)),
            waiting=dict(Counter(request.task for request in scheduler.waiting)),
            kv_used=1 - pool.available / pool.blocks,
            prefill=_numbers(total.prefill),
            decode=_numbers(total.decode),
            resident_bytes=resident_bytes(),
            peak_bytes=resident_bytes(peak=True),
        )

    def _layer(self, layer: int) -> dict[Phase, LayerCounters]:
        counted = self.assembly.metrics.layers
        return {phase: copy(counted.get((phase, layer), NOTHING)) for phase in PHASES}


def _numbers(counters: PhaseCounters) -> dict[str, float]:
    names = (
        *("passes", "tokens", "seconds", "hits", "pending", "misses", "bytes_read"),
        *("used_bytes_read", "routed_weight", "degraded_weight", "stall_s"),
    )
    return {name: getattr(counters, name) for name in names}
