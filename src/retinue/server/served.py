"""The loaded model on the engine thread: what it is, and a picture of it for other threads.

Everything but `facts` and `picture` belongs to the engine thread.
"""

import time
from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinue.config import Config
from retinue.engine.learning import Learner, finished, open_learner
from retinue.engine.llm import LLM, Prompt
from retinue.engine.request import Request, State
from retinue.memory.machine import resident_bytes
from retinue.memory.reads import Reason
from retinue.metrics import LayerCounters, Metrics, PhaseCounters
from retinue.policy.base import BoolArray
from retinue.server.activity import Activity
from retinue.types import IntArray, Phase

if TYPE_CHECKING:
    from retinue.engine.assembly import Assembly

PHASES: tuple[Phase, ...] = ("prefill", "decode")
NOTHING = LayerCounters()
PICTURE_S = 0.25  # how old a picture may be while something runs


@dataclass(frozen=True, slots=True)
class Picture:
    """How the engine stood at one moment. Nobody changes it."""

    resident: BoolArray  # [layers, experts]
    activity: list[str]  # a layer each, a character an expert
    layers: list[dict[Phase, LayerCounters]]
    reads: dict[Reason, IntArray]  # [layers, 2]: experts that were read, and their bytes
    running: dict[str | None, int]  # requests, by task
    waiting: dict[str | None, int]
    period: int | None  # prompts between two forecasts, where the preset forecasts
    refreshes: dict[str, float]
    degraded: dict[str | None, list[float]]  # by task: the share of each layer's routing weight
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
        self._learner = _learner(self.llm) if config.learn else None
        self.tasks = self.assembly.task_names.known
        self._activity = Activity(self.assembly.network.experts.there, self.assembly.preset.exact)
        self.picture = draw(self.assembly, self._activity)

    def task_of(self, prompt: Prompt, ids: list[int], task: str | None) -> str | None:
        """The task of a request that may name one; None: unknown. From one thread at a time."""
        return self.llm.task_of(prompt, ids, task)

    def stepped(self, moved: list[Request]) -> None:
        """See `bridge.Model`: learns, and takes a new picture now and then."""
        if self._learner is not None:
            for request in moved:
                if request.state is State.DONE:
                    self._learner.learn(finished(request))
        old = time.monotonic() - self.picture.at >= PICTURE_S
        if old or not self.engine.busy:
            self.picture = draw(self.assembly, self._activity)

    def close(self) -> None:
        """Keep what was learnt; free threads, files and memory."""
        if self._learner is not None:
            self._learner.close()
        self.llm.close()


def _learner(llm: LLM) -> Learner | None:
    """Who learns from requests, if the preset reads a profile."""
    assembly = llm.assembly
    if not assembly.preset.profiled:
        return None
    return open_learner(assembly.folder, assembly.facts, llm.config.profile)


def draw(assembly: "Assembly", activity: Activity) -> Picture:
    """How things stand in `assembly`. On the engine thread."""
    scheduler, total = assembly.engine.scheduler, assembly.metrics.total
    pool, cache = scheduler.pool, assembly.cache
    there = cache.slot_of >= 0
    return Picture(
        resident=there,
        activity=activity.rows(there, cache.last_used, assembly.host.last_missed, cache.step),
        layers=[_layer(assembly.metrics, layer) for layer in range(len(there))],
        reads=dict(cache.reads.counts),
        running=dict(Counter(request.task for request in scheduler.running)),
        waiting=dict(Counter(request.task for request in scheduler.waiting)),
        period=assembly.residents.period if assembly.residents is not None else None,
        refreshes=_refreshes(assembly.metrics),
        degraded={
            task: usage.degraded_by_layer for task, usage in list(assembly.metrics.tasks.items())
        },
        kv_used=1 - pool.available / pool.blocks,
        prefill=_numbers(total.prefill),
        decode=_numbers(total.decode),
        resident_bytes=resident_bytes(),
        peak_bytes=resident_bytes(peak=True),
    )


def _layer(metrics: Metrics, layer: int) -> dict[Phase, LayerCounters]:
    return {phase: copy(metrics.layers.get((phase, layer), NOTHING)) for phase in PHASES}


def _refreshes(metrics: Metrics) -> dict[str, float]:
    return {
        "refreshes": metrics.refreshes,
        "seconds": metrics.refresh_s,
        "bytes_read": metrics.refresh_bytes,
    }


def _numbers(counters: PhaseCounters) -> dict[str, float]:
    names = (
        *("passes", "tokens", "seconds", "hits", "pending", "misses", "bytes_read"),
        *("used_bytes_read", "routed_weight", "degraded_weight", "stall_s", "missed", "fetched"),
    )
    return {name: getattr(counters, name) for name in names}
