"""The one loop: admit requests, run a pass for all that are ready, update them.

One thread calls `step`; `cancel` may come from any. The engine knows neither files nor slots.
"""

from collections.abc import Sequence as Items
from typing import Protocol

import torch

from retinue.engine.request import Request, State
from retinue.engine.scheduler import Scheduler, Work
from retinue.errors import Cancelled, RetinueError, UsageError
from retinue.metrics import PhaseCounters
from retinue.model.experts import ExpertHost
from retinue.model.kernels import torch_threads
from retinue.model.kv import Segment, Sequence
from retinue.policy.base import Running
from retinue.types import FinishReason, Phase, SamplingParams

Part = tuple[Request, Segment]


class Runner(Protocol):
    """What the engine needs of the network; `model.runner.Runner`, or a test's fake."""

    @property
    def host(self) -> ExpertHost: ...

    def new_sequence(self, blocks: list[int], length: int) -> Sequence: ...

    def groups(self, segments: Items[Segment]) -> list[list[int]]: ...

    def run(self, segments: Items[Segment], phase: Phase) -> tuple[torch.Tensor, PhaseCounters]: ...


class Engine:
    """Runs requests, many at once. `vocabulary` bounds token ids, `end_tokens` end an answer."""

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        vocabulary: int,
        end_tokens: frozenset[int],
    ) -> None:
        self._runner, self._vocabulary, self._end_tokens = runner, vocabulary, end_tokens
        self.scheduler, self.limits = scheduler, scheduler.limits

    def add(self, request: Request) -> None:
        """Queue `request`.

        Raises UsageError for a prompt that can never run, and Overloaded when it would wait too
        long: past its deadline, or behind more than may wait.
        """
        self.check(request.prompt, request.params)
        self.scheduler.add(request)

    def check(self, prompt: list[int], params: SamplingParams | None = None) -> None:
        """Raise UsageError for a prompt that can never run, and for a bias of no token."""
        length, limits = len(prompt), self.limits
        if length == 0:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if length >= limits.context:
            raise UsageError(
                f"the prompt has {length} tokens, the context only {limits.context}",
                hint="shorten the prompt, or use a larger `--context`",
            )
        if limits.whole_prompts and length > limits.chunk:
            raise UsageError(
                f"the prompt has {length} tokens; this family takes prompts in one piece, and a"
                f" piece has {limits.chunk}",
                hint="shorten the prompt, or use a larger `--chunk`",
            )
        named = [*prompt, *(params.logit_bias if params is not None else ())]
        wrong = [token for token in named if not 0 <= token < self._vocabulary]
        if wrong:
            raise UsageError(
                f"token id out of range: `{wrong[0]}`", hint=f"from 0 to {self._vocabulary - 1}"
            )

    def cancel(self, request: Request) -> None:
        """End `request` as soon as its running layer allows. From any thread."""
        request.cancelled.set()

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.busy

    def step(self) -> list[Request]:
        """One pass of the network; returns the requests that got further, or ended."""
        moved = self.end_cancelled()
        while (request := self.scheduler.admit()) is not None:
            self._start(request)
        work = self.scheduler.next()
        if work is not None:
            moved += self._run(work)
        return moved

    def idle(self) -> None:
        """Assert that the books balance; for when nothing runs."""
        assert not self.busy
        self._runner.host.cache.check()
        self.scheduler.check()

    def close(self) -> None:
        """Let go of the network."""
        self._runner.host.close()

    def _start(self, request: Request) -> None:
        request.state = State.PREFILL
        if request.sequence is None:
            assert request.table is not None
            request.sequence = self._runner.new_sequence(request.table.blocks, request.done)
        self._runner.host.enter(request.sequence.number, request.task, request.prompt)

    def end_cancelled(self) -> list[Request]:
        """End the requests that were cancelled; returns them. `step` does so as well."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        cancelled = [request for request in [*waiting, *running] if request.cancelled.is_set()]
        for request in cancelled:
            self._end(request, State.CANCELLED)
        return cancelled

    def _run(self, work: Work) -> list[Request]:
        """Run the passes of `work`, one for all requests where the family allows it."""
        parts = [(request, _segment(request, tokens)) for request, tokens in work.parts]
        try:
            for group in self._runner.groups([segment for _, segment in parts]):
                counters = self._pass([parts[index] for index in group], work.phase)
                whole = len(group) == len(parts)
                if counters is not None and work.phase == "decode" and whole:
                    self.scheduler.cohort.observe(counters, len(parts), work.ready)
        finally:
            # Others run the network too, such as `eval`: they are not cancelled with these.
            self._runner.host.stop = lambda: False
        return [request for request, _ in parts]

    def _pass(self, parts: list[Part], phase: Phase) -> PhaseCounters | None:
        """One forward pass; returns what it cost.

        If it fails for several requests, each one gets a pass of its own.
        """
        requests, host = [request for request, _ in parts], self._runner.host
        # A pass stops in its middle if nobody wants it any more.
        host.stop = lambda: all(request.cancelled.is_set() for request in requests)
        try:
            started, refreshed_s = self.scheduler.clock(), host.metrics.refresh_s
            read = self._begin()
            begun_s = self.scheduler.clock() - started
            logits, counters = self._runner.run([segment for _, segment in parts], phase)
            refreshed_s = host.metrics.refresh_s - refreshed_s
            self.scheduler.passed(phase, counters, read, refreshed_s)
            host.metrics.charge(begun_s)
        except Cancelled:
            for request in requests:
                self._end(request, State.CANCELLED)
        except RetinueError as error:
            if len(parts) == 1:
                self._end(requests[0], State.FAILED, error)
            else:
                for part in parts:
                    self._pass([part], phase)
        except BaseException:
            # Whoever called ends what it asked for; what others asked for is tried again.
            for request in requests:
                if _is_lost(request):
                    self._end(request, State.FAILED)
            raise
        else:
            self._account(requests)
            for row, (request, segment) in enumerate(parts):
                count = len(segment.tokens)
                request.costs.of(phase).add(counters, tokens=count)
                request.done += count
                self._advance(request, logits[row])
            return counters
        return None

    def _begin(self) -> int:
        """Say what runs next; returns the bytes that its pass reads before it serves."""
        running = self.scheduler.running
        read = self._runner.host.begin([_running(each) for each in running])
        for each in running:
            each.begun = True
        return read

    def _account(self, requests: list[Request]) -> None:
        """Keep what the routers chose for `requests` in the pass that succeeded."""
        host = self._runner.host
        for request, usage in zip(requests, host.changes.accounts.usages, strict=False):
            host.metrics.account(request.task, usage)
            if request.usage is None:
                request.usage = usage
            else:
                request.usage.add(usage)

    def _advance(self, request: Request, logits: torch.Tensor) -> None:
        if request.done < len(request.prompt):
            return
        if request.state is State.PREFILL:
            request.state = State.DECODE
            if request.usage is not None:
                self._runner.host.observe(request.task, request.usage.used)
            self.scheduler.share(request)
        self._accept(request, logits)

    def _accept(self, request: Request, logits: torch.Tensor) -> None:
        """Choose the next token from `logits` and see whether the answer ends with it."""
        params, count = request.params, len(request.token_ids)
        with torch_threads(1):
            if request.forced is not None:
                token = request.forced[count]
            else:
                token = request.sampler.choose(logits, request.prompt, request.token_ids)
            logprob = request.sampler.logprob(logits, token)
        request.token_came(self.scheduler.clock())
        request.token_ids.append(token)
        if logprob is not None:
            request.logprobs.append(logprob)
        request.tell(request.text.push(token))
        full = request.length >= self.limits.context
        ended = token in self._end_tokens and not params.ignore_eos
        if ended or request.text.stopped:
            self._end(request, State.DONE, reason="stop")
        elif len(request.token_ids) >= params.max_new_tokens or full:
            self._end(request, State.DONE, reason="length")

    def _end(
        self,
        request: Request,
        state: State,
        error: RetinueError | None = None,
        reason: FinishReason | None = None,
    ) -> None:
        """Enter a final state, and free what the request holds."""
        if request.sequence is not None:
            self._runner.host.leave(request.sequence.number)
        if request.state is State.WAITING:
            self.scheduler.waiting.remove(request)
        else:
            intact = state is State.DONE or (state is State.CANCELLED and not _is_lost(request))
            self.scheduler.leave(request, intact=intact)
        if state is State.DONE:
            self.scheduler.order.ended(request)
        request.end(state, reason or ENDED_BY[state], error)
        request.tell(request.text.finish())


ENDED_BY: dict[State, FinishReason] = {State.CANCELLED: "cancelled", State.FAILED: "error"}


def _is_lost(request: Request) -> bool:
    """Whether a pass that stopped in its middle has damaged a cache of the model's own."""
    return request.sequence is not None and request.sequence.own is not None


def _running(request: Request) -> Running:
    """What is known of `request` before a pass."""
    limit = request.params.max_new_tokens
    return Running(request.task, len(request.prompt), limit, new=not request.begun)


def _segment(request: Request, tokens: list[int]) -> Segment:
    assert request.sequence is not None
    return Segment(request.sequence, tokens)
