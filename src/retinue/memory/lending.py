"""Lends experts what was promised to others: memory of a budget that nobody uses now.

A budget is divided for the worst case: the longest prompt, every sequence full, a runtime as large
as it ever was (`memory/budget.py`). While tokens are decoded most of that lies idle. So what this
process holds is looked at now and then, and slots are added for the rest; before a prompt as many
are given up as its pass may need. What experts were promised they never lose.

No paper's. vLLM (arXiv 2309.06180) and others take what is left after a trial run, once.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from retinue.memory.budget import RESERVE_BYTES, Split, workspace_bytes
from retinue.memory.cache import ExpertCache
from retinue.memory.machine import resident_bytes
from retinue.memory.tier import Tier
from retinue.types import Facts, Phase

EVERY = 16  # decoding passes from one look to the next, and after a prompt to the first
SPARE_BYTES = 32 << 20  # stays free for what comes between two looks, such as a text's tokens
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Lending:
    """The slots of `tier`, more than `split` has promised as long as memory is free.

    `resident` says how many bytes this process holds. It belongs to the engine's thread.
    """

    def __init__(
        self,
        facts: Facts,
        split: Split,
        tier: Tier,
        cache: ExpertCache,
        resident: Callable[[], int] = resident_bytes,
    ) -> None:
        self._facts, self._split, self._tier, self._cache = facts, split, tier, cache
        self._resident = resident
        self._passes = 0  # decoding ones since the last look
        # Pages of keys and values come in pieces so large that all may come with one token.
        self._keeps_kv = _huge_pages_everywhere()

    @property
    def lent(self) -> int:
        """How many slots there are beyond the promised ones."""
        return self._tier.slots - self._split.slots

    def begin_pass(self, phase: Phase, tokens: int, lengths: Sequence[int]) -> None:
        """A pass over `tokens` tokens comes next; `lengths` of sequences, with the new tokens."""
        if phase == "prefill":
            self._passes = 0
            if self.lent:
                self._shrink(self._unused(self._needed(tokens, lengths, tokens)))
            return
        self._passes += 1
        if self._passes < EVERY:
            return
        self._passes = 0
        needed = self._needed(tokens, lengths, EVERY * tokens) - self._facts.workspace_bytes
        unused = self._unused(needed)
        self._shrink(unused)
        # What was added last may still be on its way into memory, by a thread that works then.
        if not self._tier.untouched:
            self._grow(unused)

    def _needed(self, tokens: int, lengths: Sequence[int], coming: int) -> int:
        """Bytes for a pass over `tokens`, and for what sequences keep of `coming` tokens."""
        facts = self._facts
        needed = workspace_bytes(facts, tokens, max(lengths), sum(lengths))
        if self._keeps_kv:
            return needed + self._split.kv
        return needed + facts.kv_bytes_per_token * coming + 2 * facts.state_bytes * len(lengths)

    def _unused(self, needed: int) -> int:
        """Bytes of the budget that are left beside `needed`, which may be fewer than none."""
        coming = needed + self._tier.untouched * self._tier.slot_bytes
        held = self._resident() + coming + self._split.beside + RESERVE_BYTES
        return self._split.budget - held

    def _grow(self, unused: int) -> None:
        slots = (unused - SPARE_BYTES) // self._tier.slot_bytes
        if (count := min(slots, self._tier.more)) > 0:
            self._tier.grow(count)

    def _shrink(self, unused: int) -> None:
        lacking = -(unused // self._tier.slot_bytes)
        if (count := min(lacking, self.lent)) > 0:
            self._cache.vacate(count)
            self._tier.shrink(count)


def _huge_pages_everywhere() -> bool:
    try:
        return "[always]" in _HUGE_PAGES.read_text()
    except OSError:
        return False
