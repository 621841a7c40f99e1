"""What all benchmarks of one command share: the checkpoint, the limit, the counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import Checkpoint

from retinue.memory.home import SAMPLE
from retinue.memory.machine import available_bytes

# Libraries, activations, and what a loader holds beside the weights at its peak.
RUNTIME_BYTES = 1_500_000_000
COMFORT = 1.25


@dataclass(frozen=True, slots=True)
class Setting:
    """Counts, shares and limits are None where each benchmark takes its own.

    `model` is what needs a profile runs with: the checkpoint, or the sample if none was given.
    """

    checkpoint: Checkpoint
    memory_bytes: int
    runs: int
    small: Callable[[], Checkpoint]  # the small shape, written at the first call
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    model: str | Path = SAMPLE
    data: Path | None = None  # task texts; None: those of the sample
    per_task: int | None = None  # so many of them
    shares: Sequence[int] | None = None  # of the experts, in percent
    read_limits: Sequence[int] | None = None  # MB/s

    def counts(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """The counts that were asked for, or else these."""
        return {
            "prompt_tokens": self.prompt_tokens or prompt_tokens,
            "new_tokens": self.new_tokens or new_tokens,
        }


def fits_comfortably(checkpoint: Checkpoint, extra_bytes: int = 0) -> bool:
    """Whether a plain engine can hold all weights without the machine getting short."""
    needed = checkpoint.total_bytes * COMFORT + RUNTIME_BYTES + extra_bytes
    return needed <= available_bytes()
