"""What `train-predictor` learns from: texts that run through the model, or a trace of it."""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from retinue.cli.kinds import (
    ASKING,
    NETWORKS,
    ONE_LAYER,
    ONWARD,
    kinds_from_trace,
    kinds_of,
    signals_of,
)
from retinue.cli.measure import bar, measured
from retinue.cli.terminal import note
from retinue.config import Config, format_size
from retinue.engine.assembly import Assembly
from retinue.engine.tracing import record, trace_head
from retinue.errors import Refused, UsageError
from retinue.memory.budget import budget_bytes
from retinue.memory.grouped import PRECISIONS
from retinue.memory.home import locate
from retinue.model.gates import gates
from retinue.model.scoring import Scorer
from retinue.model.survey import survey
from retinue.model.whole import WholeModel, whole_bytes
from retinue.model.without_last import without_last
from retinue.trace import Routed, Trace, TraceHead
from retinue.train.examples import LIMIT_BYTES, Example, example_of, room
from retinue.train.measures import Measures, some
from retinue.train.texts import RoutedText, divide, from_trace
from retinue.types import Facts, FloatArray

RUNNING = ("memory", "experts", "context", "precision", "threads", "self_check")
WHOLE = ("adapmoe", "edgemoe")  # kinds that are tried on the whole model in fp32


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded of the checkpoint in `folder`; `measures` are what was tried on it."""

    folder: Path
    facts: Facts
    head: TraceHead
    kinds: list[str]
    texts: list[RoutedText]
    examples: list[Example]
    measures: Measures

    @property
    def parts(self) -> list[str]:
        """The kinds that are no networks of eMoE's."""
        return [kind for kind in self.kinds if kind not in NETWORKS]

    @property
    def networks(self) -> list[str]:
        """Those that are."""
        return [kind for kind in self.kinds if kind in NETWORKS]


def recorded(options: Namespace, config: Config) -> Recorded:
    """Run the texts of `--data`, or read `--trace`, for the kinds of `--kind`.

    Raises UsageError for a trace that is another model's, or not enough.
    """
    return _traced(options, config) if options.trace else _run(options, config)


def _run(options: Namespace, config: Config) -> Recorded:
    """The model is closed again before it is loaded whole."""
    kinds, seed = kinds_of(options.kind), config.seed or 0
    beside = LIMIT_BYTES if {*kinds} - {*NETWORKS} else 0
    with measured(options, config, beside) as (assembly, ids):
        divide(ids, seed)  # refuse too few texts before they run
        facts, folder = assembly.facts, assembly.folder
        kinds = _possible(kinds, "all" in options.kind, assembly, config)
        parts = [kind for kind in kinds if kind not in NETWORKS]
        whole = bool({*WHOLE} & {*kinds}) and _fits(facts, config)
        head = trace_head(
            assembly, "tokens" if parts else "histogram", signals_of(kinds), config.precision
        )
        measures = Measures(
            gates=gates(assembly.network, head.experts)
            if {"pre-gated", "adapmoe"} & {*kinds}
            else (),
        )
        with bar(len(ids)) as advance:
            requests = record(assembly, head, ids, advance)
            texts, examples = _kept(head, requests, [text.ids for text in ids], bool(parts), seed)
        if "adapmoe" in kinds and not whole:
            measures = replace(measures, without_last=_tried(assembly, examples, seed))
    if whole:
        measures = replace(measures, whole=WholeModel(folder))
    return Recorded(folder, facts, head, kinds, texts, examples, measures)


def _traced(options: Namespace, config: Config) -> Recorded:
    for name in ("data", "per_task", *RUNNING):
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"`{flag}` is of no use with `--trace`, which runs no texts",
                hint="leave one of both out",
            )
    trace, folder = Trace(Path(options.trace)), locate(options.model, note)
    facts, head = survey(folder, config.precision), trace.head
    if (head.layers, head.experts, head.top_k) != (
        facts.layers,
        facts.experts_per_layer,
        facts.top_k,
    ):
        raise UsageError(
            f"the trace `{trace.file}` is of another model: `{head.model}`",
            hint="record one of this model with `retinue trace`",
        )
    named = kinds_of(options.kind)
    kinds = kinds_from_trace(named, "all" in options.kind, head)
    parts = [kind for kind in kinds if kind not in NETWORKS]
    requests = trace.requests(signals_of(kinds))
    texts, examples = _kept(head, requests, None, bool(parts), config.seed or 0, len(trace.tasks))
    return Recorded(folder, facts, head, kinds, texts, examples, Measures())


def _kept(
    head: TraceHead,
    requests: Iterable[Routed],
    ids: Sequence[Sequence[int]] | None,
    wanted: bool,
    seed: int,
    count: int = 0,
) -> tuple[list[RoutedText], list[Example]]:
    """The requests with both parts as sums, and token by token where that is `wanted`."""
    random = np.random.default_rng(seed)
    most = room(head, count if ids is None else len(ids))
    texts: list[RoutedText] = []
    examples: list[Example] = []
    for at, request in enumerate(requests):
        added = list(from_trace(head, [request]))
        texts += added
        if added and wanted:
            examples.append(example_of(request, None if ids is None else ids[at], most, random))
    return texts, examples


def _possible(kinds: list[str], everything: bool, assembly: Assembly, config: Config) -> list[str]:
    """Those of `kinds` that this model and budget allow; the others are said to be left out.

    Raises Refused for one that was asked for by name. Routers that cannot be asked are left to
    who asks them.
    """
    left_out = dict[str, str]()
    needed = format_size(whole_bytes(assembly.facts))
    hints = {"edgemoe": f"give it the plain checkpoint and `--memory {needed}`"}
    if assembly.facts.moe_layers < 2:
        left_out |= dict.fromkeys(ONWARD, ONE_LAYER)
    if not _fits(assembly.facts, config):
        left_out["edgemoe"] = f"it tries the whole plain model in fp32, which takes {needed}"
    if not assembly.host.sees_ahead and everything:
        left_out |= dict.fromkeys(ASKING, "some routers of this model cannot be asked")
    for kind in kinds:
        if kind in left_out and not everything:
            raise Refused(
                f"no `{kind}`: {left_out[kind]}",
                hint=hints.get(kind, "leave it out of `--kind`"),
            )
        if kind in left_out:
            note(f"note: no `{kind}`: {left_out[kind]}", "yellow")
    return [kind for kind in kinds if kind not in left_out]


def _fits(facts: Facts, config: Config) -> bool:
    """Whether the whole model may be loaded in fp32: encoded layers have no gradients."""
    plain = facts.stored not in PRECISIONS
    return plain and whole_bytes(facts) <= budget_bytes(config.memory)


def _tried(assembly: Assembly, examples: Sequence[Example], seed: int) -> FloatArray:
    """Each layer without its tokens' last experts, on texts that are not held out."""
    scorer = Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)
    learn, _ = divide(examples, seed)
    return without_last(scorer, assembly.network.experts.modules, some(learn))
