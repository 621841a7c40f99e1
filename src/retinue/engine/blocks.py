"""Who owns which blocks of the key/value pool. Numbers only: it knows no tensors.

A block holds `BLOCK_TOKENS` tokens. A full one has a key that stands for all tokens up to its end,
so that a prompt that begins like another one shares its blocks instead of computing them. Blocks
that nobody owns keep their key until the room is needed, the least recently used leaving first.

Sequences get neighbouring blocks if they can: attention then reads them without a copy.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from retinue.types import BLOCK_TOKENS

# A prefix that another prompt is just computing is worth waiting for from this length on.
WORTH_WAITING_BLOCKS = 16


@dataclass(slots=True)
class Table:
    """The blocks of one sequence in order; the first `reused` tokens were computed before."""

    blocks: list[int]
    reused: int = 0
    coming: list[bytes] = field(default_factory=list)  # keys that its prefill will publish


class BlockPool:
    """`blocks` blocks, each free, idle (kept for its tokens), or owned by one or more tables."""

    def __init__(self, blocks: int) -> None:
        assert blocks > 0, blocks
        self.blocks = blocks
        self._owners = [0] * blocks
        self._free = set(range(blocks))
        self._idle: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._coming: Counter[bytes] = Counter()

    @property
    def available(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free) + len(self._idle)

    def take(self, prompt: Sequence[int], room_tokens: int, *, reuse: bool) -> Table | None:
        """Blocks for `room_tokens`, of which a prefix of `prompt` may be shared; or None.

        None means later: there is no room, or another prompt is computing a long common prefix.
        The last token of a prompt is never shared, since its logits choose the first new one.
        """
        keys = list(_keys(prompt[:-1])) if reuse else []
        shared: list[int] = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            shared.append(block)
        missing = keys[len(shared) :]
        if sum(1 for key in missing if self._coming[key]) >= WORTH_WAITING_BLOCKS:
            return None
        own = -(-room_tokens // BLOCK_TOKENS) - len(shared)
        if own > self.available - sum(1 for block in shared if not self._owners[block]):
            return None
        for block in shared:
            self._own(block)
        blocks = shared + self._pick(own, after=shared[-1] if shared else None)
        self._coming.update(missing)
        return Table(blocks, len(shared) * BLOCK_TOKENS, missing)

    def extend(self, table: Table, room_tokens: int) -> bool:
        """Give `table` blocks for `room_tokens` in all, or change nothing and return False."""
        lacking = -(-room_tokens // BLOCK_TOKENS) - len(table.blocks)
        if lacking > self.available:
            return False
        table.blocks += self._pick(max(0, lacking), after=table.blocks[-1])
        return True

    def publish(self, table: Table, tokens: Sequence[int]) -> None:
        """Let others share what `table` holds: `tokens`, all of them computed."""
        for block, key in zip(table.blocks, _keys(tokens), strict=False):
            if block not in self._key_of and key not in self._block_of:
                self._key_of[block], self._block_of[key] = key, block
        self._forget_coming(table)

    def give(self, table: Table) -> None:
        """`table` ends; what it published stays until the room is needed."""
        self._forget_coming(table)
        for block in reversed(table.blocks):  # a prefix is worth more than what follows it
            self._owners[block] -= 1
            if self._owners[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.add(block)
        table.blocks = []

    def check(self, tables: Iterable[Table] = ()) -> None:
        """Assert that the books balance: `tables` are all that there are."""
        owners = Counter(block for table in tables for block in table.blocks)
        assert all(self._owners[block] == owners[block] for block in range(self.blocks))
        nobody = {block for block in range(self.blocks) if not self._owners[block]}
        assert self._free | set(self._idle) == nobody, "a block is lost"
        assert not self._free & set(self._idle), "a block is free twice"
        assert set(self._idle) == nobody & set(self._key_of)
        assert {block: key for key, block in self._block_of.items()} == self._key_of
        coming = Counter(key for table in tables for key in table.coming)
        assert +self._coming == coming, "a prompt that ended is still being waited for"

    def _forget_coming(self, table: Table) -> None:
        self._coming.subtract(table.coming)
        self._coming = +self._coming
        table.coming = []

    def _own(self, block: int) -> None:
        self._idle.pop(block, None)
        self._owners[block] += 1

    def _pick(self, count: int, after: int | None) -> list[int]:
        """`count` blocks that nobody owns, neighbours if there are such."""
        while len(self._free) < count:
            block, _ = self._idle.popitem(last=False)
            del self._block_of[self._key_of.pop(block)]
            self._free.add(block)
        following = range(after + 1, after + 1 + count) if after is not None else range(0)
        if not following or not self._free.issuperset(following):
            following = self._run(count)
        blocks = list(following) or sorted(self._free)[:count]
        self._free.difference_update(blocks)
        for block in blocks:
            self._owners[block] += 1
        return blocks

    def _run(self, count: int) -> range:
        """The tightest run of at least `count` free neighbours, cut to size; empty without one."""
        best = range(0)
        for run in _runs(sorted(self._free)):
            if len(run) >= count and (not best or len(run) < len(best)):
                best = run
        return best[:count]


def _runs(numbers: Sequence[int]) -> Iterable[range]:
    """The stretches of successive numbers in `numbers`, which ascend."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield range(numbers[start], numbers[at - 1] + 1)
            start = at


def _keys(tokens: Sequence[int]) -> Iterable[bytes]:
    """The key of each full block of `tokens`: a digest of all tokens up to its end."""
    digest = hashlib.blake2b(digest_size=16)
    for stop in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        digest.update(array("q", tokens[stop - BLOCK_TOKENS : stop]).tobytes())
        yield digest.copy().digest()
