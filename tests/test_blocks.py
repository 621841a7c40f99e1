"""The pool of blocks against a model of dictionaries, and by hand where the choice matters."""

import random
from collections import Counter

import pytest

from retinue.engine import blocks
from retinue.engine.blocks import WORTH_WAITING_BLOCKS, BlockPool, Table
from retinue.types import BLOCK_TOKENS

Prefix = tuple[int, ...]


def text(*letters: int, tail: int = 1) -> list[int]:
    """A prompt of one whole block a letter, and `tail` tokens more."""
    return [letter for letter in letters for _ in range(BLOCK_TOKENS)] + [99] * tail


def prefixes(tokens: list[int]) -> list[Prefix]:
    """What each whole block of `tokens` stands for: all up to its end."""
    stops = range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS)
    return [tuple(tokens[:stop]) for stop in stops]


def take(pool: BlockPool, prompt: list[int], room: int = 0, *, reuse: bool = True) -> Table:
    table = pool.take(prompt, room or len(prompt), reuse=reuse)
    assert table is not None
    return table


def computed(pool: BlockPool, prompt: list[int]) -> Table:
    """A table whose tokens are all there for others."""
    table = take(pool, prompt)
    pool.publish(table, prompt)
    return table


class Model:
    """What the pool should know, the slow way: who owns what, and which prefix lies where."""

    def __init__(self, count: int) -> None:
        self.count, self.pool = count, BlockPool(count)
        self.tables: list[tuple[Table, list[int]]] = []  # with all tokens that each will hold
        self.block_of: dict[Prefix, int] = {}
        self.idle: list[int] = []  # the first one leaves first
        self.coming: list[list[Prefix]] = []  # of each table

    def owned(self) -> Counter[int]:
        return Counter(block for table, _ in self.tables for block in table.blocks)

    def free(self) -> set[int]:
        return set(range(self.count)) - set(self.owned()) - set(self.idle)

    def take(self, tokens: list[int], prompt: int, reuse: bool) -> bool:
        """Take a table for `tokens`, the first `prompt` of which are the prompt."""
        wanted = prefixes(tokens[: prompt - 1]) if reuse else []
        shared: list[int] = []
        while len(shared) < len(wanted) and wanted[len(shared)] in self.block_of:
            shared.append(self.block_of[wanted[len(shared)]])
        missing = wanted[len(shared) :]
        others = Counter(prefix for each in self.coming for prefix in each)
        own = -(-len(tokens) // BLOCK_TOKENS) - len(shared)
        waits = sum(others[prefix] > 0 for prefix in missing) >= blocks.WORTH_WAITING_BLOCKS
        free, left = self.free(), [block for block in self.idle if block not in shared]
        table = self.pool.take(tokens[:prompt], len(tokens), reuse=reuse)
        if waits or own > len(free) + len(left):
            assert table is None
            return False
        assert table is not None
        assert table.blocks[: len(shared)] == shared
        assert table.reused == len(shared) * BLOCK_TOKENS
        self.idle = left
        self._picked(table.blocks[len(shared) :], own, free, shared[-1] if shared else None)
        self.tables.append((table, tokens))
        self.coming.append(missing)
        return True

    def extend(self, at: int, more: list[int]) -> None:
        table, tokens = self.tables[at]
        before, room = list(table.blocks), len(tokens) + len(more)
        own, free = -(-room // BLOCK_TOKENS) - len(before), self.free()
        fits = own <= len(free) + len(self.idle)
        assert self.pool.extend(table, room) is fits
        if not fits:
            assert table.blocks == before
            return
        assert table.blocks[: len(before)] == before
        self._picked(table.blocks[len(before) :], max(0, own), free, before[-1])
        self.tables[at] = table, tokens + more

    def publish(self, at: int, count: int) -> None:
        table, tokens = self.tables[at]
        self.pool.publish(table, tokens[:count])
        for block, prefix in zip(table.blocks, prefixes(tokens[:count]), strict=False):
            if block not in self.block_of.values() and prefix not in self.block_of:
                self.block_of[prefix] = block
        self.coming[at] = []

    def give(self, at: int) -> None:
        table, _ = self.tables.pop(at)
        self.coming.pop(at)
        given, owners = list(table.blocks), self.owned()
        self.pool.give(table)
        assert table.blocks == []
        known = set(self.block_of.values())
        self.idle += [b for b in reversed(given) if not owners[b] and b in known]

    def _picked(self, new: list[int], count: int, free: set[int], after: int | None) -> None:
        """The pool chose `new`: nobody's blocks, the oldest prefixes if any, neighbours if any."""
        assert len(new) == len(set(new)) == count
        while len(free) < count:
            lost = self.idle.pop(0)
            self.block_of = {p: block for p, block in self.block_of.items() if block != lost}
            free.add(lost)
        assert free.issuperset(new)
        if after is not None and free.issuperset(range(after + 1, after + 1 + count)):
            assert new == list(range(after + 1, after + 1 + count))
        elif any(free.issuperset(range(start, start + count)) for start in free):
            assert new == list(range(new[0], new[0] + count)) if new else not count

    def check(self) -> None:
        self.pool.check([table for table, _ in self.tables])
        assert self.pool.available == len(self.free()) + len(self.idle)


@pytest.mark.parametrize("count", [1, 7, 24, 60])
@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_random_operations(
    count: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "WORTH_WAITING_BLOCKS", 3)
    chance, model, taken, refused = random.Random(seed), Model(count), 0, 0
    for _ in range(1500):
        act, at = chance.random(), chance.randrange(len(model.tables)) if model.tables else -1
        if act < 0.4 or at < 0:
            length = chance.randint(1, 8)
            tokens = text(*(chance.choice((1, 1, 2)) for _ in range(length)))
            tokens = tokens[: chance.randint(1, len(tokens))]
            worked = model.take(tokens, chance.randint(1, len(tokens)), chance.random() < 0.8)
            taken, refused = taken + worked, refused + (not worked)
        elif act < 0.6:
            model.publish(at, chance.randint(0, len(model.tables[at][1])))
        elif act < 0.7:
            model.extend(at, text(3, 4)[: chance.randint(0, 33)])
        else:
            model.give(at)
        model.check()
    assert taken > 100
    assert refused > 10
    while model.tables:
        model.give(-1)
    model.check()
    assert model.pool.available == count


# --- sharing


def test_an_equal_prefix_is_shared_by_whole_blocks() -> None:
    pool = BlockPool(10)
    first = computed(pool, text(1, 2, 3))
    second = take(pool, text(1, 2, 4, 5))
    assert second.blocks[:2] == first.blocks[:2]
    assert not set(second.blocks[2:]) & set(first.blocks)
    assert (first.reused, second.reused) == (0, 2 * BLOCK_TOKENS)
    pool.check([first, second])


def test_the_last_token_of_a_prompt_is_never_shared() -> None:
    pool = BlockPool(10)
    computed(pool, text(1, 2, tail=0))
    assert take(pool, text(1, 2, tail=0)).reused == BLOCK_TOKENS
    assert take(pool, text(1, 2, tail=1)).reused == 2 * BLOCK_TOKENS


def test_equal_blocks_after_different_ones_are_not_the_same() -> None:
    pool = BlockPool(10)
    computed(pool, text(1, 2))
    assert take(pool, text(3, 2)).reused == 0


def test_keys_do_not_run_together() -> None:
    """Tokens are told apart whatever bytes they are made of."""
    pool = BlockPool(10)
    computed(pool, [1, 256] * 8 + [5])
    assert take(pool, [256, 1] * 8 + [5]).reused == 0
    assert take(pool, [1, 257] * 8 + [5]).reused == 0


def test_what_is_not_computed_is_not_shared() -> None:
    pool = BlockPool(10)
    first = take(pool, text(1, 2, 3))
    assert take(pool, text(1, 2, 3)).reused == 0
    pool.publish(first, text(1, 2, 3)[: 2 * BLOCK_TOKENS + 5])
    assert take(pool, text(1, 2, 3)).reused == 2 * BLOCK_TOKENS


def test_nothing_is_shared_with_those_who_do_not_ask() -> None:
    pool = BlockPool(10)
    computed(pool, text(1, 2))
    assert take(pool, text(1, 2), reuse=False).reused == 0


def test_a_shared_block_stays_until_its_last_owner_gives_it() -> None:
    pool = BlockPool(4)
    first = computed(pool, text(1, 2, tail=0))
    second = take(pool, text(1, 2, 3, tail=0))
    assert second.reused == 2 * BLOCK_TOKENS
    pool.give(first)
    assert pool.available == 1
    assert take(pool, text(4, tail=0), reuse=False).blocks[0] not in second.blocks


def test_the_least_recently_used_prefix_leaves_first() -> None:
    """And of one prefix its end, since its beginning serves more."""
    pool = BlockPool(4)
    for letters in ((1, 2), (3,)):
        pool.give(computed(pool, text(*letters, tail=0)))
    pool.give(take(pool, text(1, tail=1)))  # used once more; its own block was free
    take(pool, text(7, 8, tail=0), reuse=False)
    assert take(pool, text(1, 2, 3)[: BLOCK_TOKENS + 1]).reused == BLOCK_TOKENS
    pool = BlockPool(4)
    pool.give(computed(pool, text(1, 2, 3, 4, tail=0)))
    taken = take(pool, text(9, tail=0), reuse=False)
    pool.check([taken])
    assert take(pool, text(1, 2, 3, tail=0)).reused == 2 * BLOCK_TOKENS


def test_a_prompt_that_needs_what_it_shares_does_not_evict_it() -> None:
    """The idle prefix is not room for the prompt that begins with it."""
    pool = BlockPool(4)
    pool.give(computed(pool, text(1, 2, tail=0)))
    assert pool.take(text(1, 2, 3, 4, 5), 5 * BLOCK_TOKENS, reuse=True) is None
    table = take(pool, text(1, 2, 3, tail=BLOCK_TOKENS))
    assert table.reused == 2 * BLOCK_TOKENS
    assert sorted(table.blocks) == [0, 1, 2, 3]


# --- room


def test_room_for_the_answer_is_taken_with_the_prompt() -> None:
    pool = BlockPool(4)
    assert len(take(pool, text(1), 3 * BLOCK_TOKENS).blocks) == 3
    assert pool.take(text(2), 2 * BLOCK_TOKENS, reuse=False) is None
    assert pool.available == 1


def test_neighbours_if_there_are_such() -> None:
    pool = BlockPool(10)
    tables = [take(pool, text(at, tail=0), reuse=False) for at in range(10)]
    for at in (1, 2, 4, 5, 6, 8):
        pool.give(tables[at])
    assert take(pool, text(1, 2, tail=0)).blocks == [1, 2]  # the tightest run
    assert take(pool, text(1, 2, 3, tail=0), reuse=False).blocks == [4, 5, 6]
    pool.give(tables[3])
    assert take(pool, text(1, 2, tail=0), reuse=False).blocks == [3, 8]  # there is no run


def test_what_follows_a_shared_prefix_lies_beside_it() -> None:
    pool = BlockPool(10)
    pool.give(computed(pool, text(1, 2, tail=0)))
    assert take(pool, text(1, 2, 3, 4)).blocks == [0, 1, 2, 3, 4]


def test_a_table_grows_beside_its_last_block_or_not_at_all() -> None:
    pool = BlockPool(5)
    table = take(pool, text(1))
    other = take(pool, text(2, tail=0), reuse=False)
    assert table.blocks == [0, 1]
    assert pool.extend(table, 2 * BLOCK_TOKENS)
    assert table.blocks == [0, 1]
    assert not pool.extend(table, 5 * BLOCK_TOKENS)
    assert table.blocks == [0, 1]
    pool.give(other)
    assert pool.extend(table, 5 * BLOCK_TOKENS)
    assert table.blocks == [0, 1, 2, 3, 4]
    pool.check([table])


# --- waiting for a prefix that is coming

LONG = text(*range(WORTH_WAITING_BLOCKS))


def test_a_long_prefix_that_is_being_computed_is_worth_waiting_for() -> None:
    pool = BlockPool(100)
    first = take(pool, LONG)
    assert pool.take(LONG, len(LONG), reuse=True) is None
    assert take(pool, LONG, reuse=False).reused == 0
    assert take(pool, LONG[: -BLOCK_TOKENS - 1]).reused == 0  # too short to wait
    pool.publish(first, LONG)
    assert take(pool, LONG).reused == len(LONG) - 1


@pytest.mark.parametrize("end", ["give", "publish a part"])
def test_nobody_waits_for_what_will_not_come(end: str) -> None:
    pool = BlockPool(100)
    first = take(pool, LONG)
    if end == "give":
        pool.give(first)
    else:
        pool.publish(first, LONG[: 3 * BLOCK_TOKENS])
    assert take(pool, LONG).reused == (0 if end == "give" else 3 * BLOCK_TOKENS)


def test_one_of_two_that_compute_a_prefix_may_end() -> None:
    pool = BlockPool(100)
    short = LONG[:-BLOCK_TOKENS]
    first, second = take(pool, short), take(pool, short[:-BLOCK_TOKENS])
    pool.give(second)
    assert pool.take([*LONG, 5], len(LONG) + 1, reuse=True) is not None
    pool.give(first)


# --- the books


@pytest.mark.parametrize("damage", ["lost", "twice", "coming", "foreign"])
def test_check_notices(damage: str) -> None:
    pool = BlockPool(4)
    table = take(pool, text(1, 2))
    pool.check([table])
    if damage == "lost":
        table.blocks.pop()
    elif damage == "twice":
        table.blocks[0] = table.blocks[1]
    elif damage == "coming":
        table.coming = []
    else:
        table.blocks.append(3)
    with pytest.raises(AssertionError):
        pool.check([table])
