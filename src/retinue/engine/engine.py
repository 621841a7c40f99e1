"""The one loop: take a request, run a chunk or a token, update it, hand out what is new.

One request runs at a time; others wait in the order of arrival. One thread calls `step`; `cancel`
may come from any. The engine knows neither files nor slots.
"""

import time
from collections import deque
from typing import Protocol

import torch

from retinue.engine.request import Request, State
from retinue.errors import Cancelled, RetinueError, UsageError
from retinue.metrics import Metrics
from retinue.model.experts import ExpertHost
from retinue.model.kv import SequenceCache
from retinue.types import Phase


class Runner(Protocol):
    """What the engine needs of the network; `model.runner.Runner`, or a test's fake."""

    @property
    def host(self) -> ExpertHost: ...

    def new_sequence(self, context: int) -> SequenceCache: ...

    def run(self, tokens: list[int], sequence: SequenceCache, phase: Phase) -> torch.Tensor: ...


class Engine:
    """Runs requests. `context` bounds prompt and answer together, `chunk` one prefill pass."""

    def __init__(
        self,
        runner: Runner,
        metrics: Metrics,
        *,
        context: int,
        chunk: int,
        vocabulary: int,
        end_tokens: frozenset[int],
    ) -> None:
        self._runner, self.metrics = runner, metrics
        self.context, self._chunk, self._vocabulary = context, chunk, vocabulary
        self._end_tokens = end_tokens
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._sequence = runner.new_sequence(context)
        self._stored: list[int] = []  # the ids whose keys and values the sequence holds
        self._runner.host.stop = self._stopped

    def add(self, request: Request) -> None:
        """Queue `request`. Raises UsageError for a prompt that can never run."""
        self.check(request.prompt)
        self._waiting.append(request)

    def check(self, prompt: list[int]) -> None:
        """Raise UsageError for a prompt that can never run."""
        length = len(prompt)
        if length == 0:
            raise UsageError("the prompt is empty", hint="give at least one token")
        if length >= self.context:
            raise UsageError(
                f"the prompt has {length} tokens, the context only {self.context}",
                hint="shorten the prompt, or use a larger `--context`",
            )
        wrong = [token for token in prompt if not 0 <= token < self._vocabulary]
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
        return self._running is not None or bool(self._waiting)

    def step(self) -> tuple[Request, str] | None:
        """Advance one request by a chunk or a token; returns it with the text that is new."""
        request = self._running or self._start()
        if request is None:
            return None
        delta = ""
        try:
            if self._stopped():
                raise Cancelled("the request was cancelled")
            delta = self._advance(request)
        except Cancelled:
            request.end(State.CANCELLED, "cancelled")
        except RetinueError as error:
            request.end(State.FAILED, "error", error)
        except BaseException:
            request.end(State.FAILED, "error")
            self._running = None
            raise
        if request.state.final:
            delta += request.text.finish()
            self._running = None
        return request, delta

    def idle(self) -> None:
        """Assert that the books balance; for when nothing runs."""
        assert self._running is None
        self._runner.host.cache.check()
        assert self._sequence.length == len(self._stored)

    def close(self) -> None:
        """Let go of the network."""
        self._runner.host.close()

    def _start(self) -> Request | None:
        if not self._waiting:
            return None
        request = self._running = self._waiting.popleft()
        request.state = State.PREFILL
        self.metrics.reset()
        keep = _common_prefix(self._stored, request.prompt) if request.reuse else 0
        # The last prompt token always runs: its logits choose the first new one.
        request.reused = min(keep, len(request.prompt) - 1)
        self._sequence.truncate(request.reused)
        del self._stored[request.reused :]
        return request

    def _advance(self, request: Request) -> str:
        self._runner.host.begin([request.task])
        if request.state is State.DECODE:
            logits = self._run([request.token_ids[-1]], "decode")
            return self._accept(request, logits)
        done = len(self._stored)
        tokens = request.prompt[done : done + self._chunk]
        logits = self._run(tokens, "prefill")
        if len(self._stored) < len(request.prompt):
            return ""
        request.state = State.DECODE
        return self._accept(request, logits)

    def _run(self, tokens: list[int], phase: Phase) -> torch.Tensor:
        logits = self._runner.run(tokens, self._sequence, phase)
        self._stored.extend(tokens)
        return logits

    def _accept(self, request: Request, logits: torch.Tensor) -> str:
        """Choose the next token from `logits` and see whether the answer ends with it."""
        params, count = request.params, len(request.token_ids)
        if request.forced is not None:
            token = request.forced[count]
        else:
            token = request.sampler.choose(logits, request.prompt, request.token_ids)
        if count == 0:
            request.first_token_s = time.perf_counter() - request.arrived
        request.token_ids.append(token)
        if (logprob := request.sampler.logprob(logits, token)) is not None:
            request.logprobs.append(logprob)
        delta = request.text.push(token)
        full = len(request.prompt) + len(request.token_ids) >= self.context
        ended = token in self._end_tokens and not params.ignore_eos
        if ended or request.text.stopped:
            request.end(State.DONE, "stop")
        elif len(request.token_ids) >= params.max_new_tokens or full:
            request.end(State.DONE, "length")
        return delta

    def _stopped(self) -> bool:
        return self._running is not None and self._running.cancelled.is_set()


def _common_prefix(left: list[int], right: list[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
