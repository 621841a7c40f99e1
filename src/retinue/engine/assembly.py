"""Puts the parts together, once: checkpoint, network, memory, policies."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinue.config import Config
from retinue.engine.blocks import BlockPool
from retinue.engine.engine import Engine
from retinue.engine.ordering import order_of
from retinue.engine.precisions import nested_of
from retinue.engine.reserve import Reserved
from retinue.engine.residents import Beforehand, Residents, known_beforehand, residents_of
from retinue.engine.scheduler import Limits, Scheduler
from retinue.engine.task_names import TaskNames, task_names
from retinue.memory.budget import Split
from retinue.memory.cache import ExpertCache
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.lending import Lending
from retinue.memory.link import DiskLink, sizes_of
from retinue.memory.machine import cores
from retinue.memory.mover import Mover
from retinue.memory.placing import place
from retinue.memory.tier import Tier
from retinue.metrics import Metrics
from retinue.model.abilities import Abilities
from retinue.model.attention import install
from retinue.model.experts import IMPLEMENTATION, ExpertHost
from retinue.model.kernels import find_kernels, use_threads
from retinue.model.kv import Store
from retinue.model.load import Network, build, end_tokens, load_dense, load_tokenizer
from retinue.model.quantise import left_plain
from retinue.model.reference import self_check
from retinue.model.routing import find_routers
from retinue.model.runner import Runner
from retinue.model.step import Steps
from retinue.model.survey import survey_abilities
from retinue.policy.classify.classifiers import Classifier, classifier
from retinue.policy.order.base import Order
from retinue.policy.order.cohort import Cohort
from retinue.policy.policies import Policies
from retinue.policy.preset import Given, Preset
from retinue.types import BLOCK_TOKENS, Facts

BLIND = "no look-ahead: some routers of this model cannot be asked"
APPROXIMATE = "this preset is approximate: its tokens are not those of the plain model"


@dataclass(slots=True)
class Assembly:
    """A loaded model and everything that serves it."""

    facts: Facts
    split: Split
    preset: Preset
    given: Given
    threads: int
    network: Network
    tokenizer: Any | None
    reader: Reader
    tier: Tier
    mover: Mover
    cache: ExpertCache
    host: ExpertHost
    engine: Engine
    residents: Residents | None
    classifier: Classifier  # of requests without a task; knows none where the preset asks for none
    task_names: TaskNames
    metrics: Metrics
    load_s: float
    notes: list[str]

    @property
    def expand_s(self) -> float | None:
        """See `DiskLink.expand_s`."""
        link = self.cache.reads.link
        return link.expand_s if isinstance(link, DiskLink) else None

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


def assemble(reserved: Reserved) -> Assembly:
    """Load a model into the memory that is reserved for it, which is given back on an error."""
    started = time.perf_counter()
    config, folder, facts = reserved.config, reserved.folder, reserved.facts
    policies, limits, tier = reserved.policies, reserved.split, reserved.tier
    threads, notes = config.threads or cores(), [*reserved.notes]
    use_threads(threads)
    with ExitStack() as undo:
        undo.callback(reserved.release)
        known = known_beforehand(folder, facts, policies, config)
        network = build(open_checkpoint(folder), config.precision)
        network.model.set_experts_implementation(IMPLEMENTATION)
        abilities = survey_abilities(network)
        reader, metrics = Reader(), Metrics()
        undo.callback(reader.close)
        load_dense(network, reader, embedding_stays=limits.embedding_stays)
        mover = Mover(reader, bytes_per_s=config.read_bytes_per_s)
        undo.callback(mover.close)
        host = _host(network, tier, mover, policies, metrics, reader)
        _start(host, network, policies, check=config.self_check)
        if facts.plain_bytes and host.cache.holds_everything and not policies.placement.fixed:
            place(host.cache, network.experts.there)  # encoded once, here, and not while it answers
        store = _store(network, limits, abilities)
        order = order_of(config, facts, known.profile, policies, host.cache)
        scheduler = _scheduler(facts, limits, config, abilities, store, order)
        steps = None if config.eager else _steps(network, host, store, abilities, notes)
        lending = Lending(facts, limits, tier, host.cache) if tier.more else None
        runner = Runner(network, host, mover, metrics, store, steps, lending)
        engine = Engine(runner, scheduler, facts.vocab_size, end_tokens(network))
        tokenizer = load_tokenizer(folder)
        residents = _residents(host, policies, known, network, config)
        infers = _classifier(config, policies, known, tokenizer)
        undo.pop_all()
    notes += [*filter(None, [reader.note]), *abilities.notes]
    notes += _policy_notes(reserved.preset, policies, host)
    notes += _precision_notes(network, facts, limits, config)
    load_s = reserved.seconds + time.perf_counter() - started
    return Assembly(
        facts,
        limits,
        reserved.preset,
        reserved.given,
        threads,
        network,
        tokenizer,
        reader,
        tier,
        mover,
        host.cache,
        host,
        engine,
        residents,
        infers,
        task_names(config, known.profile),
        metrics,
        load_s,
        notes,
    )


def _start(host: ExpertHost, network: Network, policies: Policies, *, check: bool) -> None:
    """Check some experts as they are; from now on policies may change things."""
    if check:
        experts = network.experts
        self_check(host, experts.modules, experts.layouts, network.model.dtype)
    host.changes.active = not policies.exact and not policies.placement.fixed


def _classifier(
    config: Config, policies: Policies, known: Beforehand, tokenizer: Any | None
) -> Classifier:
    """Who says which task a request without one is of, where the placement asks for it."""
    by_task = known.profile if policies.placement.by_task else None
    return classifier(config.infer_task, by_task, tokenizer and tokenizer.decode)


def _policy_notes(preset: Preset, policies: Policies, host: ExpertHost) -> list[str]:
    """What the user has to know of a preset."""
    alone = [f"one place computes here, so that no misses are divided: {preset.alone}"]
    blind = "next_scores" in policies.needs and not host.sees_ahead
    notes = [BLIND] * blind + [APPROXIMATE] * (not policies.exact)
    return notes + alone * bool(preset.alone)


def _precision_notes(network: Network, facts: Facts, limits: Split, config: Config) -> list[str]:
    """What is slow, or not as asked for, in a model that is encoded."""
    notes = []
    if facts.plain_bytes and limits.slots < facts.total_experts:
        notes.append(
            f"each expert that is missing is read in full and encoded to {config.precision} anew;"
            f" hint: retinue pack {network.checkpoint.folder} OUT --precision {config.precision}"
        )
    left = left_plain(network.model, network.experts) if network.linears else []
    if left:
        notes.append(f"{len(left)} linear layers stay in {facts.dtype}, such as {left[0]}")
    return notes


def _store(network: Network, limits: Split, abilities: Abilities) -> Store:
    """Keys, values and states of all sequences, and the attention over them."""
    store = Store(network.model.config, limits.kv_tokens, shareable=abilities.batching)
    if store.shareable:
        install(network.model, store, network.dense)
    return store


def _scheduler(
    facts: Facts, limits: Split, config: Config, abilities: Abilities, store: Store, order: Order
) -> Scheduler:
    cohort = Cohort(
        layers=facts.moe_layers,
        experts=facts.experts_per_layer,
        top_k=facts.top_k,
        slots=limits.slots,
    )
    bounds = Limits(
        limits.context,
        limits.chunk,
        config.batch or 1,
        whole_prompts=not abilities.chunked_prefill,
        sharing=store.packable,
        queue=config.queue,
    )
    return Scheduler(BlockPool(store.tokens // BLOCK_TOKENS), bounds, cohort, order)


def _steps(
    network: Network, host: ExpertHost, store: Store, abilities: Abilities, notes: list[str]
) -> Steps:
    """The prepared steps; that of one sequence is recorded now, as nobody waits for a token."""
    plain = host.changes.restriction is None
    reason = abilities.unprepared if plain else abilities.unprepared_restricted
    steps = Steps(network.model, store, notes.append, reason, network.dense, host.native_layers)
    steps.prepare(1)
    return steps


def _host(
    network: Network,
    tier: Tier,
    mover: Mover,
    policies: Policies,
    metrics: Metrics,
    reader: Reader,
) -> ExpertHost:
    modules, layouts = network.experts.modules, network.experts.layouts
    nested = nested_of(network, policies.precision, reader)
    link = DiskLink(layouts, tier, mover, nested)
    sizes = sizes_of(layouts, nested)
    cache = ExpertCache(sizes, tier, link, policies.evictor, network.top_k)
    if policies.ring is not None:
        cache.division.give(round(policies.ring * tier.slots))
    routers = find_routers(network.model, modules)
    kernels = find_kernels(modules, layouts, tier, network.model.dtype)
    host = ExpertHost(modules, routers, cache, link.views, policies, metrics, kernels)
    host.embed = network.mean_embedding
    return host


def _residents(
    host: ExpertHost, policies: Policies, known: Beforehand, network: Network, config: Config
) -> Residents | None:
    """The set that stays, loaded and serving, if the preset has one."""
    if not policies.placement.fixed:
        return None
    residents = residents_of(host, policies, known, network.experts.there, config)
    residents.start(config.task)
    return residents
