"""What a preset costs in quality: loss and agreement with the plain model, task by task.

First the plain pass over all texts, of which only losses and first choices are kept, then the
preset's. An exact preset's own pass is the plain one, since residency changes no bit; what it
would read when decoding comes from a replay of the routing. A set that serves every token serves
whole texts as well; all other approximate presets decode them token by token (`forced.py`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np

from retinue.engine.assembly import Assembly
from retinue.engine.forced import run_forced, score_forced, scored_of
from retinue.engine.replay import Replay
from retinue.engine.tasks import TaskIds
from retinue.metrics import Usage
from retinue.model.scoring import Scored, Scorer
from retinue.policy.base import Prompt, Running
from retinue.trace import answers
from retinue.types import IntArray


@dataclass(frozen=True, slots=True)
class TaskScore:
    """Loss in nats a token under the preset and under the plain model, over `tokens` positions.

    `agreement` is the share of them at which both name the same next token. The degraded share is
    of the whole texts.
    """

    nll: float
    nll_plain: float
    agreement: float
    tokens: int
    degraded_share: float = 0.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores by task and over all tokens, and what the preset's pass cost.

    `misses`, `fetched` and `bytes_read` count as if every token had been decoded by itself; where
    the preset decodes, prompts count as they are read, a chunk at a time.
    """

    tasks: dict[str, TaskScore]
    total: TaskScore
    cost: "Cost"

    @property
    def degraded_share(self) -> float:
        """Of all routing weight, what was not served by the expert that its router chose."""
        return self.total.degraded_share

    @property
    def misses(self) -> int:
        """Tokens' chosen experts that were not there."""
        return self.cost.misses

    @property
    def fetched(self) -> int:
        """Experts that were read, ahead or for a token that missed them."""
        return self.cost.fetched

    @property
    def bytes_read(self) -> int:
        """Bytes of those, and of changes of the placement."""
        return self.cost.bytes_read


@dataclass(frozen=True, slots=True)
class Cost:
    """What a preset's pass over all texts cost; `used` says what was degraded, task by task."""

    misses: int
    fetched: int
    bytes_read: int
    used: Mapping[str, Usage] = field(default_factory=dict)

    @property
    def degraded_by_layer(self) -> list[float]:
        """Empty where the preset is exact."""
        return self._all.degraded_by_layer if self._all is not None else []

    @property
    def degraded_share(self) -> float:
        """Of all routing weight, over all texts."""
        return self._all.degraded_share if self._all is not None else 0.0

    @property
    def _all(self) -> Usage | None:
        return reduce(Usage.plus, self.used.values()) if self.used else None


def passes(assembly: Assembly, *, against: bool = False) -> int:
    """How often `evaluate` runs each text; `against`: with the plain model's scores at hand."""
    return 2 if assembly.host.changes.active and not against else 1


def score_plain(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> list[Scored]:
    """Score `texts` under an exact preset, for an evaluation of another model against this one."""
    scorer = _scorer(assembly)
    return [_score(scorer, text, advance) for text in texts]


def evaluate(
    assembly: Assembly,
    texts: Sequence[TaskIds],
    advance: Callable[[], object],
    plain: Sequence[Scored] | None = None,
) -> Evaluation:
    """Score `texts` in their order; `advance` is called after each text of each pass.

    `plain` are another model's scores of the same texts, if that is what to compare with. Raises
    Cancelled when the host's `stop` says so, NotFinite, or the error of a read.
    """
    scorer = _scorer(assembly)
    if not assembly.host.changes.active:
        scored, cost = _exact(assembly, scorer, texts, advance)
        plain = plain or scored
    elif assembly.residents is None:
        plain = plain or score_forced(assembly, texts, advance)
        scored, cost = _decoded(assembly, texts, advance)
    else:
        if plain is None:
            with assembly.residents.away():
                plain = [_score(scorer, text, advance) for text in texts]
        if assembly.residents.own:
            scored, cost = _answered(assembly, texts, advance)
        else:
            scored, cost = _restricted(assembly, _scorer(assembly), texts, advance)
    tasks = {}
    for name in dict.fromkeys(text.task for text in texts):
        at = [i for i, text in enumerate(texts) if text.task == name]
        share = cost.used[name].degraded_share if name in cost.used else 0.0
        tasks[name] = _compare([scored[i] for i in at], [plain[i] for i in at], share)
    return Evaluation(tasks, _compare(scored, plain, cost.degraded_share), cost)


def _scorer(assembly: Assembly) -> Scorer:
    return Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)


def _score(scorer: Scorer, text: TaskIds, advance: Callable[[], object]) -> Scored:
    scored = scorer.score(text.ids, text.scored)
    advance()
    return scored


def _exact(
    assembly: Assembly,
    scorer: Scorer,
    texts: Sequence[TaskIds],
    advance: Callable[[], object],
) -> tuple[list[Scored], Cost]:
    policies = assembly.preset.build(assembly.given)  # of its own: the cache's have seen the pass
    replay = Replay(policies, assembly.cache.slots, assembly.facts.top_k, _read_bytes(assembly))
    scored = []
    asked = answers(policies.asks_ahead, own=policies.checking is not None)
    with scorer.recording({*policies.needs, *asked}) as routing:
        for number, text in enumerate(texts):
            scored.append(scorer.score(text.ids, text.scored))
            start = text.ids[: -text.scored]
            meaning = scorer.embedding(start) if "embedding" in policies.needs else None
            prompt = Prompt(number, text.task, np.array(start), meaning)
            replay.run(routing, prompt, np.array(text.ids))
            advance()
    return scored, Cost(replay.misses, replay.fetched, replay.bytes_read)


def _read_bytes(assembly: Assembly) -> IntArray:
    """What reading each expert moves: [layers, experts]."""
    found = np.zeros(assembly.network.experts.there.shape, dtype=np.int64)
    for layer, row in enumerate(assembly.network.experts.layouts):
        found[layer, : len(row)] = [layout.read_bytes for layout in row]
    return found


def _restricted(
    assembly: Assembly,
    scorer: Scorer,
    texts: Sequence[TaskIds],
    advance: Callable[[], object],
) -> tuple[list[Scored], Cost]:
    residents = assembly.residents
    assert residents is not None
    residents.begin([_running(texts[0], new=False)])  # the first placement is not the pass's
    assembly.host.arrival.settle()
    before = residents.bytes_read
    scored, used = [], dict[str, Usage]()
    for text in texts:
        residents.begin([_running(text, new=True)])
        scored.append(_score(scorer, text, advance))
        prompt, continuation = assembly.host.changes.accounts.usages
        residents.observe(text.task, prompt.used)  # all that a server would tell of it
        usage = prompt.plus(continuation)
        used[text.task] = used[text.task].plus(usage) if text.task in used else usage
    counters = scorer.costs
    read = residents.bytes_read - before + counters.fetched_bytes
    return scored, Cost(counters.missed, counters.fetched, read, used)


def _answered(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> tuple[list[Scored], Cost]:
    """As `_restricted`, through the engine: each answer has a set of its own, as its prompt says.

    So a text cannot be one pass.
    """
    residents = assembly.residents
    assert residents is not None
    residents.begin([_running(texts[0], new=False)])
    assembly.host.arrival.settle()
    read = -residents.bytes_read
    found, used, missed, fetched = [], dict[str, Usage](), 0, 0
    for text in texts:
        request = run_forced(assembly, text)
        found.append(scored_of(request))
        assert request.usage is not None
        usage = request.usage
        used[text.task] = used[text.task].plus(usage) if text.task in used else usage
        missed, fetched = missed + usage.missed, fetched + usage.fetched
        read += request.costs.prefill.fetched_bytes + request.costs.decode.fetched_bytes
        advance()
    return found, Cost(missed, fetched, read + residents.bytes_read, used)


def _decoded(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> tuple[list[Scored], Cost]:
    reads, mover = assembly.cache.reads, assembly.mover
    fetched, read = reads.started, mover.bytes_read
    found, used, misses = [], dict[str, Usage](), 0
    for text in texts:
        request = run_forced(assembly, text)
        found.append(scored_of(request))
        assert request.usage is not None
        usage = request.usage
        used[text.task] = used[text.task].plus(usage) if text.task in used else usage
        for counters in (request.costs.prefill, request.costs.decode):
            misses += counters.misses + counters.pending
        advance()
    return found, Cost(misses, reads.started - fetched, mover.bytes_read - read, used)


def _running(text: TaskIds, *, new: bool) -> Running:
    """A text as a request: its continuation is the answer."""
    return Running(text.task, len(text.ids) - text.scored, text.scored, new=new)


def _compare(scored: Sequence[Scored], plain: Sequence[Scored], degraded: float) -> TaskScore:
    nll = np.concatenate([item.nll for item in scored]).astype(np.float64)
    nll_plain = np.concatenate([item.nll for item in plain]).astype(np.float64)
    same = np.concatenate([a.best == b.best for a, b in zip(scored, plain, strict=True)])
    means = float(nll.mean()), float(nll_plain.mean()), float(same.mean())
    return TaskScore(*means, len(same), degraded)
