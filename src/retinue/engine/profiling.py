"""Measures what a profile holds: routing by task, sensitivity, lengths of answers, costs.

The counts need one pass over each text. The rest takes more passes over few texts, and can be left
out: `Effort` says how much is done, `planned` how many texts will run.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from retinue.config import INSENSITIVE_ABOVE
from retinue.engine.assembly import Assembly
from retinue.engine.request import new_request
from retinue.engine.tasks import TaskIds
from retinue.engine.tracing import record, trace_head
from retinue.memory.machine import machine_name
from retinue.memory.placing import place
from retinue.model.restriction import Restriction
from retinue.model.routing import find_routers
from retinue.model.scoring import Scored, Scorer
from retinue.policy.measured import Damage, MachineCosts, Sensitivity, rounded_length
from retinue.policy.periods import Prompt, measure_periods
from retinue.policy.profile import Profile, TaskCounts
from retinue.policy.route.random_layers import RandomLayers
from retinue.policy.transitions import TransitionCounter
from retinue.trace import TraceHead
from retinue.types import IntArray, SamplingParams

Advance = Callable[[], object]
_Sides = tuple[dict[int, Damage], dict[int, Damage], dict[int, Damage]]  # first, last, alone
ANSWER_TOKENS = 256  # of an answer that the model writes to show how long its answers are
PASS_TOKENS = (16, 64, 256)  # of the passes whose time is measured
LOADS = (1, 4, 16, 64)  # experts that are read at once to measure what that takes
ALONE = 16  # layers that are tried one by one; what lies between is interpolated where it is used
REPEATS = 3  # the fastest of them counts: others may compute here, too


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured beside counts: texts of each task (0: not measured), and costs."""

    sensitivity: int = 0
    insensitive_above: float = INSENSITIVE_ABOVE
    answers: int = 0
    costs: bool = False


COUNTS = Effort()


def make_profile(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Advance, effort: Effort = COUNTS
) -> Profile:
    """Measure `texts` by task; `advance` is called after each text that ran.

    Raises Cancelled when the host's `stop` says so, NotFinite, Unsupported for routers that do not
    obey random routing, or the error of a read.
    """
    facts, tasks, prompts = assembly.facts, {}, []
    names = list(dict.fromkeys(text.task for text in texts))
    for name in names:
        tasks[name], used = _count(assembly, _few(texts, name, len(texts)), advance)
        prompts += used
    for name in names if effort.answers else ():
        answers = _answers(assembly, _few(texts, name, effort.answers), advance)
        tasks[name] = replace(tasks[name], answers=answers)
    some = [text for name in names for text in _few(texts, name, effort.sensitivity)]
    for name, found in _sensitivities(assembly, some, advance, effort.insensitive_above).items():
        tasks[name] = replace(tasks[name], sensitivity=found)
    shape = (facts.layers, facts.experts_per_layer, facts.top_k)
    periods = measure_periods(prompts, facts.top_k)
    longest = max(texts, key=lambda text: len(text.ids)).ids
    costs = measure_costs(assembly, longest) if effort.costs else None
    return Profile(facts.name, *shape, tasks, periods, costs)


def planned(assembly: Assembly, texts: Sequence[TaskIds], effort: Effort) -> int:
    """How often `make_profile` will run a text."""
    names = {text.task for text in texts}
    some = sum(len(_few(texts, name, effort.sensitivity)) for name in names)
    answers = sum(len(_few(texts, name, effort.answers)) for name in names)
    return len(texts) + answers + some * (1 + len(_trials(trace_head(assembly).routed)))


def measure_costs(assembly: Assembly, ids: list[int]) -> MachineCosts:
    """Time passes over the beginning of `ids`, and reads of experts; two straight lines.

    Waiting for reads is not counted to the passes. Afterwards few experts are resident.
    """
    scorer, passes = _scorer(assembly), []
    for tokens in sorted({min(tokens, len(ids)) for tokens in PASS_TOKENS}):
        for _ in range(REPEATS):
            stalled, started = scorer.costs.stall_s, time.perf_counter()
            scorer.score(ids[:tokens], 1)
            passes.append((tokens, time.perf_counter() - started - scorer.costs.stall_s + stalled))
    cache, there = assembly.cache, assembly.network.experts.there
    all_experts = np.random.default_rng(0).permutation(np.argwhere(there))
    loads = []
    for count in sorted({min(count, cache.slots, len(all_experts)) for count in LOADS}):
        wanted = np.zeros_like(there)
        wanted[tuple(all_experts[:count].T)] = True
        for _ in range(REPEATS):
            place(cache, np.zeros_like(there))
            started = time.perf_counter()
            place(cache, wanted)
            loads.append((count, time.perf_counter() - started))
    return MachineCosts(*_line(passes), *_line(loads), machine=machine_name())


def _count(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Advance
) -> tuple[TaskCounts, list[Prompt]]:
    """One task's counts, and its prompts with the weight of each expert."""
    facts, head = assembly.facts, trace_head(assembly)
    counter = TransitionCounter(head.routed, head.experts)
    choices = np.zeros((facts.layers, facts.experts_per_layer), np.int64)
    weight = np.zeros_like(choices, np.float32)
    words: Counter[int] = Counter()
    lengths: Counter[int] = Counter()
    prompts: list[Prompt] = []
    for text, routed in zip(texts, record(assembly, head, texts, advance), strict=True):
        assert routed.experts is not None
        counter.add(routed.experts, routed.sums.sum(axis=0))
        choices += _choices(head, routed.experts)
        weight += routed.used(head) + routed.used(head, answer=True)
        words.update(text.ids[: routed.prompt_tokens])
        lengths[rounded_length(text.scored)] += 1
        prompts.append((text.task, routed.used(head)))
    counts = TaskCounts(
        len(texts),
        sum(len(text.ids) for text in texts),
        choices,
        weight,
        words=words,
        words_total=words.total(),
        continuations=lengths,
        transitions=counter.result(),
    )
    return counts, prompts


def _choices(head: TraceHead, experts: IntArray) -> IntArray:
    """How often each expert was chosen: [layers, experts]."""
    choices = np.zeros((head.layers, head.experts), np.int64)
    for column, layer in enumerate(head.routed):
        chosen = experts[:, column].ravel()
        choices[layer] = np.bincount(chosen, minlength=head.experts + 1)[: head.experts]
    return choices


def _answers(assembly: Assembly, texts: Sequence[TaskIds], advance: Advance) -> Counter[int]:
    """Lengths of the model's own greedy answers; none where it does not end most of them."""
    lengths: Counter[int] = Counter()
    ended = 0
    for text in texts:
        prompt = text.ids[: -text.scored]
        room = min(ANSWER_TOKENS, assembly.split.context - len(prompt))
        params = SamplingParams(temperature=0.0, max_new_tokens=room)
        request = new_request(prompt, params, assembly.tokenizer, task=text.task)
        assembly.engine.add(request)
        while assembly.engine.busy:
            assembly.engine.step()
        if request.error is not None:
            raise request.error
        lengths[rounded_length(len(request.token_ids))] += 1
        ended += request.finish_reason == "stop"
        advance()
    return lengths if 2 * ended > len(texts) else Counter()


def _sensitivities(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Advance, above: float
) -> dict[str, Sensitivity]:
    """Per task, what random routing does in the first layers, the last ones, and one by one."""
    if not texts:
        return {}
    scorer = _scorer(assembly)
    plain = [_score(scorer, text, advance) for text in texts]
    names = list(dict.fromkeys(text.task for text in texts))
    sides: dict[str, _Sides] = {name: ({}, {}, {}) for name in names}
    layers, routed = assembly.facts.layers, trace_head(assembly).routed
    for random_layers in _trials(routed):
        with _random_routing(assembly, random_layers):
            scored = [_score(scorer, text, advance) for text in texts]
        for name, (first, last, alone) in sides.items():
            at = [i for i, text in enumerate(texts) if text.task == name]
            damage = _damage([scored[i] for i in at], [plain[i] for i in at])
            if random_layers[0] == routed[0]:
                first[random_layers[-1] + 1] = damage
            if random_layers[-1] == routed[-1]:
                last[layers - random_layers[0]] = damage
            if len(random_layers) == 1:
                alone[random_layers[0]] = damage
    ordered = {
        name: [dict(sorted(side.items())) for side in found] for name, found in sides.items()
    }
    return {name: Sensitivity(above, *found) for name, found in ordered.items()}


def _trials(routed: Sequence[int]) -> list[tuple[int, ...]]:
    """The layers to randomise in turn.

    One, a quarter, half and all of them, from both sides; then up to ALONE layers one by one, the
    first and the last among them, evenly spread.
    """
    count = len(routed)
    sizes = sorted({1, max(1, count // 4), max(1, count // 2)} - {count})
    sides = [*(tuple(routed[:size]) for size in sizes), *(tuple(routed[-size:]) for size in sizes)]
    spread = np.linspace(0, count - 1, min(count, ALONE)).round().astype(int)
    singles = [(routed[at],) for at in spread.tolist()]
    return list(dict.fromkeys([*sides, tuple(routed), *singles]))


@contextmanager
def _random_routing(assembly: Assembly, layers: Sequence[int]) -> Iterator[None]:
    """Within, routers choose at random in `layers`; what they choose is fetched as ever."""
    network = assembly.network
    modules, there = network.experts.modules, network.experts.there
    restriction = Restriction(
        find_routers(network.model, modules),
        modules,
        RandomLayers(layers),
        lambda choice: np.broadcast_to(there[choice.layer], choice.scores.shape),
    )
    try:
        restriction.active = True
        yield
    finally:
        restriction.close()


def _damage(scored: Sequence[Scored], plain: Sequence[Scored]) -> Damage:
    same = np.concatenate([a.best == b.best for a, b in zip(scored, plain, strict=True)])
    added = np.concatenate([a.nll - b.nll for a, b in zip(scored, plain, strict=True)])
    return Damage(len(scored), float(same.mean()), float(added.astype(np.float64).mean()))


def _few(texts: Sequence[TaskIds], task: str, count: int) -> list[TaskIds]:
    return [text for text in texts if text.task == task][:count]


def _scorer(assembly: Assembly) -> Scorer:
    return Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)


def _score(scorer: Scorer, text: TaskIds, advance: Advance) -> Scored:
    scored = scorer.score(text.ids, text.scored)
    advance()
    return scored


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Base and slope through the fastest time of each count, by least squares, neither below 0."""
    fastest: dict[int, float] = {}
    for count, seconds in points:
        fastest[count] = min(seconds, fastest.get(count, seconds))
    x, y = np.array(list(fastest)), np.array(list(fastest.values()))
    if len(x) < 2:
        return 0.0, float(y[0] / x[0])
    slope, base = np.polyfit(x, y, 1)
    if base < 0 or slope < 0:  # noise: a line through the origin
        return 0.0, float((x * y).sum() / (x * x).sum())
    return float(base), float(slope)
