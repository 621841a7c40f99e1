"""A network without weights for tests of the loop: it remembers tokens where keys would be.

Its next token follows from all tokens of a sequence as the pool holds them. So a block that was
given to the wrong request, overwritten, or counted as computed when it was not, shows in answers.
"""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from retinue.engine.blocks import BlockPool
from retinue.engine.engine import Engine
from retinue.engine.request import Request, new_request
from retinue.engine.scheduler import Limits, Scheduler
from retinue.errors import Cancelled
from retinue.metrics import Metrics, PhaseCounters
from retinue.model.accounts import Accounts
from retinue.model.kv import Segment
from retinue.model.kv import Sequence as Memory
from retinue.policy.base import Running
from retinue.policy.order.base import Order
from retinue.policy.order.cohort import Cohort
from retinue.types import BLOCK_TOKENS, SamplingParams

VOCABULARY, CONTEXT, CHUNK, BATCH, END = 100, 32, 4, 3, 50
ALL = Cohort(layers=1, experts=1, top_k=1, slots=1)  # every expert is in memory: all run together
Next = Callable[[list[int]], int]


def counting(history: list[int]) -> int:
    """The next token is the last one plus one."""
    return (history[-1] + 1) % VOCABULARY


def mixing(history: list[int]) -> int:
    """The next token depends on every token before and on its place."""
    total = 7
    for token in history:
        total = (total * 31 + token + 1) % 1_000_003
    return total % VOCABULARY


class Books:
    checks, balanced = 0, True

    def check(self) -> None:
        self.checks += 1
        assert self.balanced


class Host:
    def __init__(self) -> None:
        self.cache, self.metrics, self.closed = Books(), Metrics(), False
        self.changes = SimpleNamespace(accounts=Accounts(layers=1, experts=1))
        self.stop: Callable[[], bool] = lambda: False
        self.inside: list[int] = []  # numbers of requests that run
        self.running: list[list[Running]] = []  # before each pass

    def begin(self, running: list[Running]) -> int:
        self.running.append(running)
        return 0

    def enter(self, sequence: int, task: str | None, prompt: list[int]) -> None:
        self.inside.append(sequence)

    def leave(self, sequence: int) -> None:
        self.inside.remove(sequence)

    def close(self) -> None:
        self.closed = True


class Network:
    """A runner that notes what it was asked. `before` is called in each run, and may raise."""

    def __init__(self, blocks: int, following: Next) -> None:
        self.host, self._following = Host(), following
        self.pool: list[int | None] = [None] * (blocks * BLOCK_TOKENS)
        self.runs: list[tuple[str, list[tuple[list[int], int]]]] = []  # phase, (tokens, position)
        self.before: Callable[[], None] = lambda: None
        self.apart = False  # each segment has a pass of its own

    def new_sequence(self, blocks: list[int], length: int) -> Memory:
        return Memory(blocks, length)

    def groups(self, segments: Sequence[Segment]) -> list[list[int]]:
        everyone = list(range(len(segments)))
        return [[index] for index in everyone] if self.apart else [everyone]

    def run(self, segments: Sequence[Segment], phase: str) -> tuple[torch.Tensor, PhaseCounters]:
        self.runs.append((phase, [(list(s.tokens), s.sequence.length) for s in segments]))
        assert segments
        for segment in segments:
            self._write(segment)  # what a pass that fails has written is there, and never counts
        self.before()
        if self.host.stop():
            raise Cancelled("stopped in the middle of a layer")
        rows = torch.zeros(len(segments), VOCABULARY)
        for row, segment in zip(rows, segments, strict=True):
            segment.sequence.length += len(segment.tokens)
            row[self._following(self.history(segment.sequence))] = 5.0
        return rows, PhaseCounters(tokens=sum(len(s.tokens) for s in segments), seconds=1.0)

    def _write(self, segment: Segment) -> None:
        sequence, count = segment.sequence, len(segment.tokens)
        assert sequence.length + count <= sequence.room
        places = sequence.places[sequence.length : sequence.length + count].tolist()
        for place, token in zip(places, segment.tokens, strict=True):
            self.pool[place] = token

    def history(self, sequence: Memory) -> list[int]:
        """All tokens of the sequence, as its blocks hold them."""
        found = [self.pool[place] for place in sequence.places[: sequence.length].tolist()]
        return [token for token in found if token is not None]

    @property
    def ran(self) -> list[tuple[str, list[int], int]]:
        """The runs, in which there was one request each time."""
        return [(phase, *part) for phase, (part,) in self.runs]


class Letters:
    """A tokenizer whose token n is the letter chr(n + 32)."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(token + 32) for token in ids)


def make(
    *,
    blocks: int = 40,
    following: Next = counting,
    apart: bool = False,
    cohort: Cohort = ALL,
    order: Order | None = None,
    clock: Callable[[], float] = time.perf_counter,
    **fields: Any,
) -> tuple[Engine, Network]:
    """An engine over a fake network; `fields` are those of Limits."""
    network = Network(blocks, following)
    network.apart = apart
    limits = Limits(**({"context": CONTEXT, "chunk": CHUNK, "batch": BATCH} | fields))
    engine = Engine(
        network,  # type: ignore[arg-type]
        Scheduler(BlockPool(blocks), limits, cohort, order, clock),
        vocabulary=VOCABULARY,
        end_tokens=frozenset([END]),
    )
    return engine, network


def ask(prompt: list[int], count: int = 3, *, reuse: bool = False, **fields: Any) -> Request:
    params = SamplingParams(max_new_tokens=count, **fields)
    return new_request(prompt, params, Letters(), reuse=reuse)


def finish(engine: Engine, *requests: Request) -> str:
    """Run to the end; the text of the first request."""
    for request in requests:
        engine.add(request)
    text = ""
    while engine.busy:
        moved = engine.step()
        assert moved, "a step in which nothing happens"
        assert len(moved) == len({id(request) for request in moved}), "moved twice"
        text += "".join(request.take_delta() for request in requests[:1])
        engine.scheduler.check()
    engine.idle()
    assert not engine._runner.host.inside, "who ended is not known to have"  # type: ignore[attr-defined]
    return text
