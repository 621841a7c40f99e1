"""Puts the parts together, once: checkpoint, network, memory, policies."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinue.config import Config
from retinue.engine.engine import Engine
from retinue.memory.budget import Split, split
from retinue.memory.cache import ExpertCache
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.home import locate
from retinue.memory.machine import cores
from retinue.memory.mover import Mover
from retinue.memory.tier import Tier
from retinue.metrics import Metrics
from retinue.model.experts import IMPLEMENTATION, ExpertHost
from retinue.model.load import Network, build, end_tokens, load_dense, load_tokenizer
from retinue.model.reference import self_check
from retinue.model.routing import find_routers
from retinue.model.runner import Runner
from retinue.model.survey import facts_of, survey
from retinue.policy.presets import Preset, preset
from retinue.types import Facts


@dataclass(slots=True)
class Assembly:
    """A loaded model and everything that serves it."""

    facts: Facts
    split: Split
    preset: Preset
    threads: int
    network: Network
    tokenizer: Any | None
    reader: Reader
    tier: Tier
    mover: Mover
    cache: ExpertCache
    engine: Engine
    metrics: Metrics
    load_s: float
    notes: list[str]

    @property
    def folder(self) -> Path:
        """The checkpoint's folder."""
        return self.network.checkpoint.folder

    def close(self) -> None:
        """Stop the readers, close the files, give the slots' memory back."""
        self.mover.close()
        self.reader.close()
        self.engine.close()
        self.tier.release()


def assemble(model: str | Path, config: Config) -> Assembly:
    """Load `model` under `config`. Refuses before loading what cannot fit."""
    started = time.perf_counter()
    notes: list[str] = []
    folder = locate(model, notes.append)
    chosen = preset(config.preset)
    threads = config.threads or cores()
    facts = survey(folder)
    limits = split(facts, memory=config.memory, context=config.context, experts=config.experts)
    torch.set_num_threads(threads)
    with ExitStack() as undo:
        tier = Tier(limits.slots, limits.slot_bytes)
        undo.callback(tier.release)
        tier.touch()  # while the network is built and its other weights are read
        network = build(open_checkpoint(folder))
        network.model.set_experts_implementation(IMPLEMENTATION)
        facts = facts_of(network)
        reader, metrics, policies = Reader(), Metrics(), chosen.build()
        undo.callback(reader.close)
        load_dense(network, reader)
        mover = Mover(reader)
        undo.callback(mover.close)
        layouts = network.experts.layouts
        cache = ExpertCache(layouts, tier, mover, policies.evictor, network.top_k)
        routers = find_routers(network.model, network.experts.modules)
        host = ExpertHost(network.experts.modules, routers, cache, policies, metrics)
        if config.self_check:
            hidden = network.text_config.hidden_size
            self_check(host, network.experts.modules, layouts, hidden, network.model.dtype)
        engine = Engine(
            Runner(network, host, mover, metrics),
            metrics,
            context=limits.context,
            chunk=limits.chunk,
            vocabulary=facts.vocab_size,
            end_tokens=end_tokens(network),
        )
        tokenizer = load_tokenizer(folder)
        undo.pop_all()
    if reader.note:
        notes.append(reader.note)
    if policies.predictor.needs and None in routers:
        notes.append("no look-ahead: some routers of this model cannot be asked")
    load_s = time.perf_counter() - started
    return Assembly(
        facts,
        limits,
        chosen,
        threads,
        network,
        tokenizer,
        reader,
        tier,
        mover,
        cache,
        engine,
        metrics,
        load_s,
        notes,
    )
