"""One request's way: WAITING -> PREFILL -> DECODE -> DONE | FAILED | CANCELLED."""

import math
import threading
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from retinue.engine.blocks import Table
from retinue.engine.text import TextStream
from retinue.errors import RetinueError, UsageError
from retinue.metrics import Costs, Usage
from retinue.types import Deadline, FinishReason, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from retinue.model.kv import Sequence
    from retinue.model.sampler import Sampler


class State(Enum):
    """Where a request is; the last three are final."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether the request has ended, one way or another."""
        return self in (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(slots=True, eq=False)
class Request:
    """A prompt of token ids with its sampling, and what has become of it.

    `forced` replaces sampling by given ids, which benchmarks need for equal work. `reuse` lets
    what others have computed serve the prefix that they share. `task` is the kind of work. Times
    are those of the engine's clock.
    """

    prompt: list[int]
    params: SamplingParams
    sampler: "Sampler"
    text: TextStream
    reuse: bool = False
    forced: list[int] | None = None
    task: str | None = None
    deadline: Deadline | None = None
    arrived: float = field(default_factory=time.perf_counter)
    state: State = State.WAITING
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: int = 0  # tokens of prompt and answer whose keys and values are computed
    reused: int = 0  # of those, computed for another request
    begun: bool = False  # whether it was counted among those that run
    table: Table | None = None
    sequence: "Sequence | None" = None
    costs: Costs = field(default_factory=Costs)
    usage: Usage | None = None  # what the routers chose for it, where the host keeps accounts
    first_token_s: float = 0.0
    longest_gap_s: float = 0.0  # between two tokens
    last_token_at: float = 0.0  # when the last one came
    finish_reason: FinishReason | None = None
    error: RetinueError | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    _delta: str = ""

    @property
    def decoding(self) -> bool:
        """Whether it runs, and its prompt is done."""
        return self.state is State.DECODE

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return max(0, len(self.prompt) - self.done)

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.token_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest answer that was asked for."""
        return self.params.max_new_tokens

    @property
    def in_time(self) -> bool:
        """Whether every token so far has come within the deadline; without a deadline, always."""
        due = self.deadline or Deadline()
        first, gap = due.first_token_s or math.inf, due.between_tokens_s or math.inf
        return self.first_token_s <= first and self.longest_gap_s <= gap

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return self.prompt + self.token_ids

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt) + len(self.token_ids)

    def token_came(self, now: float) -> None:
        """Note when a token of the answer came."""
        if not self.token_ids:
            self.first_token_s = now - self.arrived
        else:
            self.longest_gap_s = max(self.longest_gap_s, now - self.last_token_at)
        self.last_token_at = now

    def tell(self, delta: str) -> None:
        """Put text that is new where `take_delta` finds it."""
        self._delta += delta

    def take_delta(self) -> str:
        """The text that is new since the last call."""
        delta, self._delta = self._delta, ""
        return delta

    def end(self, state: State, reason: FinishReason, error: RetinueError | None = None) -> None:
        """Enter a final state, once."""
        assert state.final, state
        assert not self.state.final, self.state
        self.state, self.finish_reason, self.error = state, reason, error


def new_request(
    prompt: list[int],
    params: SamplingParams,
    tokenizer: Any | None,
    *,
    reuse: bool = False,
    forced: list[int] | None = None,
    task: str | None = None,
    deadline: Deadline | None = None,
) -> Request:
    """A request that waits. Raises UsageError where `params` are not SamplingParams."""
    from retinue.model.sampler import Sampler  # imports torch, see engine/llm.py

    if not isinstance(params, SamplingParams):  # a dictionary, as other libraries take
        raise UsageError(
            f"sampling settings are a `SamplingParams`, not a `{type(params).__name__}`",
            hint="`from retinue import SamplingParams`, then `SamplingParams(temperature=0.7)`",
        )
    text = TextStream(tokenizer, params.stop)
    request = Request(prompt, params, Sampler(params), text, reuse=reuse, forced=forced, task=task)
    request.deadline = deadline
    return request
