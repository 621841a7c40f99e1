"""Random schedules: thousands of requests come, fail, are cancelled and end, each exactly once."""

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

import fakes
from fakes import END, VOCABULARY, Letters, Network, mixing
from retinue.engine.engine import Engine
from retinue.engine.request import Request, State, new_request
from retinue.engine.scheduler import Work
from retinue.errors import ReadError
from retinue.policy.order.cohort import Cohort
from retinue.types import BLOCK_TOKENS, SamplingParams

CONTEXT, CHUNK, BATCH, POOL = 400, 48, 6, 90
POISON = VOCABULARY - 1  # a pass that reads it fails
# Passes that fail by chance, and then do not when they are tried again.
FLAKY = 0.01


@dataclass(eq=False)
class Plan:
    """One request, when it comes, and what happens to it."""

    request: Request
    arrives: float
    cancel_at: float | None
    cancel_in: str | None  # within a pass of this phase
    expected: list[int] = field(default_factory=list)
    poisoned: bool = False

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + len(self.expected)


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def answer(request: Request) -> list[int]:
    """The tokens that the request should get, without blocks, batches or neighbours."""
    params, history, text = request.params, list(request.prompt), ""
    for count in range(1, params.max_new_tokens + 1):
        history.append(mixing(history))
        text += chr(history[-1] + 32)
        if any(stop in text for stop in params.stop):
            break
        if history[-1] == END and not params.ignore_eos:
            break
        if len(history) >= CONTEXT:
            break
        assert count
    return history[len(request.prompt) :]


def make_plans(chance: random.Random, count: int, longest: int) -> list[Plan]:
    """Bursts and pauses; a few common beginnings, of which some are long; all sorts of ends."""
    beginnings = [
        [chance.randrange(VOCABULARY - 1) for _ in range(blocks * BLOCK_TOKENS)]
        for blocks in (0, 0, 1, 3, 8, 18)
    ]
    plans, now = [], 0.0
    for _ in range(count):
        now += chance.expovariate(1 / 20) if chance.random() < 0.7 else 0.0
        own = [chance.randrange(VOCABULARY - 1) for _ in range(chance.randint(1, 30))]
        prompt = (chance.choice(beginnings) + own)[-longest:]
        before = chance.choice(plans[-8:]) if plans and chance.random() < 0.3 else None
        if before is not None and before.length + len(own) <= longest:  # a conversation goes on
            prompt = before.request.prompt + before.expected + own
        if chance.random() < 0.03:
            prompt[chance.randrange(len(prompt))] = POISON
        poisoned = POISON in prompt
        params = SamplingParams(
            max_new_tokens=chance.choice((1, 2, 7, 20, 60)),
            stop=[chr(chance.randrange(VOCABULARY) + 32)] if chance.random() < 0.2 else (),
            ignore_eos=chance.random() < 0.5,
        )
        reuse = chance.random() < 0.8
        request = new_request(prompt, params, Letters(), reuse=reuse)
        request.arrived = now
        late = chance.random() < 0.15
        plans.append(
            Plan(
                request,
                now,
                now + chance.expovariate(1 / 60) - 5 if late else None,
                chance.choice(("prefill", "decode")) if chance.random() < 0.1 else None,
                [] if poisoned else answer(request),
                poisoned,
            )
        )
    return plans


class Schedule:
    """Runs plans, and holds the engine to its promises after every step."""

    def __init__(
        self, seed: int, plans: list[Plan], engine: Engine, network: Network, clock: Clock
    ) -> None:
        self.chance, self.plans, self.engine, self.network = (
            random.Random(seed),
            plans,
            engine,
            network,
        )
        self.clock, self.ends = clock, 0
        self.of = {plan.request: plan for plan in plans}
        self.admitted: list[Request] = []
        self.waited = 0
        self.last: str | None = None
        self.now: list[Plan] = []  # of the pass that runs
        self.failed_by_chance = 0
        network.before = self.in_a_pass
        self._watch()

    def _watch(self) -> None:
        """Look at what the scheduler decides, as it decides it."""
        scheduler = self.engine.scheduler
        admit, following = scheduler.admit, scheduler.next

        def watched_admit() -> Request | None:
            head = scheduler.waiting[0] if scheduler.waiting else None
            request = admit()
            if request is not None:
                assert request is head
                self.admitted.append(request)
                self.waited = 0
            return request

        def watched_next() -> Work | None:
            ready = {("decode" if r.decoding else "prefill") for r in scheduler.running}
            work = following()
            assert (work is None) == (not ready)
            if work is not None:
                assert work.phase in ready
                assert work.phase != self.last or len(ready) == 1, "the phases take turns"
                self.last = work.phase
                self.check(work)
            return work

        scheduler.admit = watched_admit  # type: ignore[method-assign]
        scheduler.next = watched_next  # type: ignore[method-assign]

    def check(self, work: Work) -> None:
        limits, running = self.engine.limits, self.engine.scheduler.running
        requests = [request for request, _ in work.parts]
        assert len(running) + len(self.engine.scheduler.parked) <= limits.batch
        assert len(set(requests)) == len(requests) <= limits.batch
        self.now = [self.of[request] for request in requests]
        counts = [len(tokens) for _, tokens in work.parts]
        assert min(counts) >= 1
        if work.phase == "decode":
            assert counts == [1] * len(requests)
            ready = [request for request in running if request.decoding]
            assert requests == ready[: self.engine.scheduler.cohort.size(len(ready))]
        else:
            assert sum(counts) <= limits.chunk
            # The chunk is full, or all that prefill are in it.
            left = {r for r in running if not r.decoding} - set(requests)
            assert not left or sum(counts) == limits.chunk or limits.whole_prompts
        for request, tokens in work.parts:
            assert request.sequence is not None
            assert request.sequence.length == request.done
            assert request.tokens[request.done : request.done + len(tokens)] == tokens

    def in_a_pass(self) -> None:
        phase, parts = self.network.runs[-1]
        self.clock.now += 1 + 0.1 * sum(len(tokens) for tokens, _ in parts)
        for plan in self.now:
            if plan.cancel_in == phase and self.chance.random() < 0.5:
                self.engine.cancel(plan.request)
        if any(POISON in tokens for tokens, _ in parts):
            raise ReadError("that token cannot be read")
        if self.chance.random() < FLAKY:
            self.failed_by_chance += 1
            raise ReadError("by chance")

    def run(self) -> None:
        coming = iter(self.plans)
        plan = next(coming, None)
        late = sorted(
            (p for p in self.plans if p.cancel_at is not None), key=lambda p: p.cancel_at or 0
        )
        while plan is not None or self.engine.busy:
            if plan is not None and not self.engine.busy:
                self.clock.now = max(self.clock.now, plan.arrives)
            while plan is not None and plan.arrives <= self.clock.now:
                self.engine.add(plan.request)
                plan = next(coming, None)
            while late and (late[0].cancel_at or 0) <= self.clock.now:
                self.engine.cancel(late.pop(0).request)
            self.step()
        self.engine.idle()

    def step(self) -> None:
        head = self.engine.scheduler.waiting[0] if self.engine.scheduler.waiting else None
        before = [*self.engine.scheduler.waiting, *self.engine.scheduler.running]
        moved = self.engine.step()
        assert len(moved) == len(set(moved))
        for request in before:
            if request.state.final:
                assert request in moved, "its end is told"
        self.engine.scheduler.check()
        self.network.runs.clear()
        still = self.engine.scheduler.waiting[0] if self.engine.scheduler.waiting else None
        self.waited = self.waited + 1 if still is head and still is not None else 0
        # Whoever runs is done by then: the longest prompts in turn, and the longest answer.
        limits = self.engine.limits
        bound = 2 * limits.batch * (limits.context // limits.chunk + 1 + limits.context)
        assert self.waited <= bound, "the first one that waits is not served"


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Every entry into a final state."""
    found: list[Request] = []
    plain = Request.end

    def end(self: Request, *arguments: Any) -> None:
        found.append(self)
        plain(self, *arguments)

    monkeypatch.setattr(Request, "end", end)
    return found


KINDS: dict[str, dict[str, Any]] = {
    "shared blocks": {},
    "one at a time": {"batch": 1},
    "no room": {"blocks": 26},
    "few at a time": {"cohort": Cohort(layers=2, experts=8, top_k=2, slots=7)},
    "passes apart": {"apart": True, "sharing": False},
    "whole prompts": {"apart": True, "sharing": False, "whole_prompts": True, "chunk": 100},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_schedule(kind: str, ends: list[Request]) -> None:
    """2,000 requests in the usual kind of engine, fewer in the others."""
    settings = {"blocks": POOL, "context": CONTEXT, "chunk": CHUNK, "batch": BATCH} | KINDS[kind]
    clock = Clock()
    engine, network = fakes.make(following=mixing, clock=clock.perf_counter, **settings)
    count = 2000 if kind == "shared blocks" else 400
    plans = make_plans(random.Random(7), count, 90 if engine.limits.whole_prompts else 350)
    schedule = Schedule(8, plans, engine, network, clock)
    schedule.run()

    requests = [plan.request for plan in plans]
    assert sorted(map(id, ends)) == sorted(map(id, requests)), "each one ends exactly once"
    places = {request: at for at, request in enumerate(requests)}
    order = [places[request] for request in schedule.admitted]
    assert order == sorted(order), "admitted in the order of arrival"
    for plan in plans:
        check_end(plan)
    states = [request.state for request in requests]
    if kind == "shared blocks":
        # All sorts of ends have happened, and often.
        assert states.count(State.DONE) > 1200
        assert states.count(State.CANCELLED) > 100
        assert states.count(State.FAILED) > 30
        assert schedule.failed_by_chance > 20
        assert sum(request.reused > 0 for request in requests) > 200
    elif engine.limits.whole_prompts:
        assert not any(request.reused for request in requests)
    elif not engine.limits.sharing:
        # Whole sequences went on, at any token.
        assert sum(request.reused % BLOCK_TOKENS > 0 for request in requests) > 3


def check_end(plan: Plan) -> None:
    """It ended as it should: the tokens are its own, and so are the costs."""
    request = plan.request
    assert request.state.final
    assert request.table is None
    assert request.sequence is None
    assert request.take_delta() == request.text.text, "text that nobody has seen"
    if plan.poisoned:
        assert request.state in (State.FAILED, State.CANCELLED)
        assert request.token_ids == []
        return
    assert request.token_ids == plan.expected[: len(request.token_ids)]
    if request.state is not State.DONE:
        assert request.state is State.FAILED or request.cancelled.is_set()
        assert (request.error is not None) == (request.state is State.FAILED)
        return
    assert request.token_ids == plan.expected
    assert request.costs.prefill.tokens == len(request.prompt) - request.reused
    assert request.costs.decode.tokens == len(request.token_ids) - 1
    assert 0 <= request.reused < len(request.prompt)
    assert request.reuse or not request.reused
    assert request.first_token_s > 0


@pytest.mark.parametrize("damage", ["a block twice", "a prefix too early"])
def test_the_schedule_notices(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake network does see when blocks go wrong: the check above can fail."""
    engine, _ = fakes.make(following=mixing, blocks=POOL, context=CONTEXT, chunk=CHUNK)
    pool = engine.scheduler.pool
    if damage == "a block twice":
        plain = pool._pick
        monkeypatch.setattr(pool, "_pick", lambda count, after: [*plain(count, after)[1:], 0])
    else:
        monkeypatch.setattr(pool, "publish", lambda table, _: None)
        plain_take = pool.take

        def early(prompt: list[int], room: int, *, reuse: bool) -> Any:
            table = plain_take(prompt, room, reuse=reuse)
            if table is not None:
                table.reused = min(BLOCK_TOKENS, len(prompt) - 1)
            return table

        monkeypatch.setattr(pool, "take", early)
    prompts = [[at, 2, 3] * 9 for at in range(3)]
    requests = [fakes.ask(prompt, 5, ignore_eos=True) for prompt in prompts]
    for request in requests:
        engine.add(request)
    while engine.busy:
        engine.step()
    assert [r.token_ids for r in requests] != [answer(r) for r in requests]
