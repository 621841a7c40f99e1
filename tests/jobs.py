"""Requests as the orders see them, and an estimate with round numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retinue.metrics import PhaseCounters
from retinue.policy.order.base import Queues
from retinue.policy.order.estimate import Estimate
from retinue.types import Deadline, Phase

PREFILL, DECODE = (1.0, 0.01), (0.1, 0.01)  # seconds: base, and for each token


@dataclass(eq=False)
class Waiting:
    """A request of 100 tokens that wants 10, and came at 0."""

    task: str | None = None
    arrived: float = 0.0
    deadline: Deadline | None = None
    prompt_left: int = 100
    answered: int = 0
    longest: int = 10
    last_token_at: float = 0.0
    prompt: Sequence[int] = ()


def due(first_s: float | None, between_s: float | None = None, **fields: Any) -> Waiting:
    """One with a deadline."""
    return Waiting(deadline=Deadline(first_s, between_s), **fields)


def decoding(answered: int = 1, **fields: Any) -> Waiting:
    """One that runs, and whose prompt is done."""
    return Waiting(prompt_left=0, answered=answered, **fields)


def learnt(loads: Callable[[str | None], int] | None = None) -> Estimate:
    """An estimate that has seen enough passes of PREFILL and DECODE, and loads of a second each."""
    estimate = Estimate(loads=loads)
    for tokens in range(1, 21):
        show(estimate, "prefill", 10 * tokens, PREFILL)
        show(estimate, "decode", tokens, DECODE)
        estimate.loaded(tokens, float(tokens))
    return estimate


def show(estimate: Estimate, phase: Phase, tokens: int, line: tuple[float, float]) -> None:
    """A pass that has cost what `line` says."""
    estimate.passed(phase, PhaseCounters(tokens=tokens, seconds=line[0] + line[1] * tokens))


def queues(
    waiting: list[Waiting] | None = None, running: list[Waiting] | None = None, **fields: Any
) -> Queues:
    """At 0, with four seats that all decode together, and chunks of 200 tokens."""
    known: dict[str, Any] = {"now": 0.0, "seats": 4, "together": 4, "chunk": 200}
    return Queues(waiting=waiting or [], running=running or [], **(known | fields))
