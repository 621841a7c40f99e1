"""What all benchmarks of one command share: the checkpoint, the limit, the counts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.checkpoint import Checkpoint

from retinue.memory.machine import available_bytes

# Libraries, activations, and what a loader holds beside the weights at its peak.
RUNTIME_BYTES = 1_500_000_000
COMFORT = 1.25


@dataclass(frozen=True, slots=True)
class Setting:
    """`prompt_tokens` and `new_tokens` are None where each benchmark takes its own count."""

    checkpoint: Checkpoint
    memory_bytes: int
    runs: int
    small: Callable[[], Checkpoint]  # the small shape, written at the first call
    prompt_tokens: int | None = None
    new_tokens: int | None = None

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
