"""Who is in a layer's slots, token by token: by hand, against a slow model, and in any pieces."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disk import STEADY, ids
from retinue.policy.base import Choice
from retinue.policy.miss.book import HALF_LIFE, PRIOR, Books, LayerBook, Served

EXPERTS, TOP_K = 8, 2


def choice(experts: list[list[int]], weights: list[list[float]], layer: int = 0) -> Choice:
    """What a router says; scores play no part."""
    shape = (len(experts), TOP_K)
    chosen = np.array(experts, dtype=np.int64).reshape(shape)
    given = np.array(weights, dtype=np.float32).reshape(shape)
    return Choice(layer, np.zeros((len(experts), EXPERTS), np.float32), chosen, given)


def book(*there: int, above: float = 0.5, popular: tuple[int, ...] = ()) -> LayerBook:
    """Experts `there` are in the slots; the later in `popular` the more popular."""
    known = np.zeros(EXPERTS)
    for rank, expert in enumerate(popular):
        known[expert] = rank + 1
    return LayerBook(np.isin(np.arange(EXPERTS), there), known, above)


def rows(may: np.ndarray) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in may]


def test_by_hand() -> None:
    """Three slots; a share above a half is fetched, and the coldest that is not needed leaves."""
    served = book(0, 1, 2, above=0.5).serve(
        choice(
            [[0, 1], [3, 0], [4, 5], [5, 2], [2, 3]],
            # 3 with 0.75 comes for 2; 4 and 5 share evenly; 5 with 0.6 for 1, used least.
            [[0.5, 0.5], [0.6, 0.2], [0.1, 0.1], [0.6, 0.4], [0.1, 0.1]],
        )
    )
    assert served.fetched.tolist() == [3, 5]
    assert served.missed.tolist() == [0, 1, 2, 2, 1]
    assert served.reads.tolist() == [0, 1, 0, 1, 0]
    assert rows(served.may) == [[0, 1, 2], [0, 1, 3], [0, 1, 3], [0, 3, 5], [0, 3, 5]]
    assert np.flatnonzero(served.stay).tolist() == [0, 3, 5]


def test_what_a_token_needs_does_not_leave_for_it() -> None:
    """0 is the coldest, but the token needs it."""
    served = book(0, 1, popular=(0, 1)).serve(choice([[5, 0]], [[0.9, 0.1]]))
    assert rows(served.may) == [[0, 5]]


def test_two_of_one_token() -> None:
    served = book(0, 1, 2, above=0.2, popular=(1, 0, 2)).serve(choice([[6, 7]], [[0.5, 0.5]]))
    assert served.fetched.tolist() == [6, 7]
    assert rows(served.may) == [[2, 6, 7]]
    assert served.reads.tolist() == [2]


@pytest.mark.parametrize(("above", "fetched"), [(0.0, [3, 4]), (0.4, [3]), (0.8, []), (1.0, [])])
def test_the_threshold(above: float, fetched: list[int]) -> None:
    served = book(0, 1, above=above).serve(choice([[3, 4]], [[0.7, 0.3]]))
    assert served.fetched.tolist() == fetched
    assert served.missed.tolist() == [2]


def test_zero_fetches_what_weighs_nothing() -> None:
    served = book(0, 1, above=0.0).serve(choice([[3, 4]], [[0.0, 0.0]]))
    assert served.fetched.tolist() == [3, 4]


def test_warmth_fades() -> None:
    """0 was used often and long ago, 1 a little and just now."""
    kept = book(0, 1, above=0.9)
    kept.serve(choice([[0, 2]] * 3, [[0.9, 0.1]] * 3))
    kept.serve(choice([[3, 4]] * HALF_LIFE * 6, [[0.5, 0.5]] * HALF_LIFE * 6))
    kept.serve(choice([[1, 2]], [[0.2, 0.8]]))
    assert rows(kept.serve(choice([[5, 6]], [[0.95, 0.05]])).may) == [[1, 5]]


class Slow:
    """The same, an expert and a token at a time, with heat that decays."""

    def __init__(self, there: set[int], popular: np.ndarray, above: float) -> None:
        self.there, self.above = set(there), above
        gains = sum(2.0 ** (step / HALF_LIFE) for step in range(HALF_LIFE))
        self.heat = [float(share) * (PRIOR * gains) for share in popular]
        self.tokens = 0

    def serve(self, experts: list[int], weights: list[float]) -> tuple[list[int], list[int]]:
        """Who may serve the token, and what it fetches."""
        total = sum(float(np.float32(weight)) for weight in weights) or 1.0
        shares = [float(np.float32(weight)) / total for weight in weights]
        for expert, share in zip(experts, shares, strict=True):
            self.heat[expert] += share * 2.0 ** ((self.tokens % HALF_LIFE) / HALF_LIFE)
        self.tokens += 1
        if self.tokens % HALF_LIFE == 0:
            self.heat = [heat / 2 for heat in self.heat]
        fetched = []
        for expert, share in zip(experts, shares, strict=True):
            if expert not in self.there and (share > self.above or self.above == 0):
                others = sorted(self.there - set(experts))
                self.there.remove(min(others, key=lambda other: self.heat[other]))
                self.there.add(expert)
                fetched.append(expert)
        return sorted(self.there), fetched


@st.composite
def texts(draw: st.DrawFn) -> tuple[Choice, LayerBook, Slow]:
    """Tokens of any number, and a book and a slow model of the same layer."""
    count, room = draw(st.integers(1, 3 * HALF_LIFE)), draw(st.integers(TOP_K, EXPERTS))
    above = draw(st.sampled_from([0.0, 0.3, 0.5, 0.8, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 999)))
    scores = random.random((count, EXPERTS)) ** 2 * random.random(EXPERTS)
    experts = np.argsort(-scores, axis=1)[:, :TOP_K]
    weights = np.take_along_axis(scores, experts, axis=1)
    popular = random.random(EXPERTS) * draw(st.sampled_from([0.0, 1.0]))
    there = set(random.permutation(EXPERTS)[:room].tolist())
    made = LayerBook(np.isin(np.arange(EXPERTS), list(there)), popular, above)
    return choice(experts.tolist(), weights.tolist()), made, Slow(there, popular, above)


@STEADY
@given(texts())
def test_equals_the_slow_model(case: tuple[Choice, LayerBook, Slow]) -> None:
    given_choice, fast, slow = case
    room = int(fast.there.sum())
    served = fast.serve(given_choice)
    fetched: list[int] = []
    for row, (experts, weights) in enumerate(
        zip(given_choice.experts.tolist(), given_choice.weights.tolist(), strict=True)
    ):
        missing = [expert for expert in experts if expert not in slow.there]
        wanted, read = slow.serve(experts, weights)
        assert np.flatnonzero(served.may[row]).tolist() == wanted
        assert (served.missed[row], served.reads[row]) == (len(missing), len(read))
        assert served.may[row].sum() == room
        fetched += read
    assert served.fetched.tolist() == fetched
    assert (served.stay == served.may[-1]).all()
    assert (fast.there == served.stay).all()


@STEADY
@given(texts(), st.lists(st.integers(1, 70), min_size=200, max_size=200))
def test_pieces_are_the_whole(case: tuple[Choice, LayerBook, Slow], sizes: list[int]) -> None:
    whole, one = case[:2]
    other, parts, start = one.copy(), list[Served](), 0
    single, singles = one.copy(), list[Served]()
    for size in sizes:
        piece = slice(start, start + size)
        start += size
        if len(whole.experts[piece]):
            parts.append(other.serve(part(whole, piece)))
    for row in range(len(whole.experts)):
        singles.append(single.serve(part(whole, slice(row, row + 1))))
    served = one.serve(whole)
    for pieces in (parts, singles):
        for name in ("may", "fetched", "missed", "reads"):
            joined = np.concatenate([getattr(piece, name) for piece in pieces])
            assert np.array_equal(joined, getattr(served, name)), name


def part(whole: Choice, rows: slice) -> Choice:
    return Choice(0, whole.scores[rows], whole.experts[rows], whole.weights[rows])


def test_books_forget_a_pass_that_failed() -> None:
    there = np.zeros((3, EXPERTS), dtype=bool)
    there[[0, 2], :3] = True  # layer 1 has no experts
    books = Books(above=0.3, shape=(3, EXPERTS))
    assert not books.there().any()
    books.place(there, np.zeros(1))
    case = choice([[3, 4]], [[0.6, 0.4]], layer=2)
    first = books.serve(case)
    assert not books.astray
    books.abandon()
    assert books.astray
    assert (books.there() == there).all()
    again = books.serve(case)
    assert np.array_equal(first.may, again.may)
    books.commit()
    assert np.flatnonzero(books.there()[2]).tolist() == np.flatnonzero(again.stay).tolist()
    books.abandon()  # of a pass that got nowhere
    assert (books.there()[2] == again.stay).all()
    assert (books.there()[0] == there[0]).all()
    books.place(there, np.zeros(1))
    assert (books.there() == there).all()
    assert not books.astray


def test_what_is_expected_anew_says_who_leaves_and_moves_nobody() -> None:
    there = np.zeros((2, EXPERTS), dtype=bool)
    there[1, :3] = True  # layer 0 has no experts
    popular = np.zeros((2, EXPERTS))
    popular[1, :3] = [0.1, 0.2, 0.3]
    books = Books(above=0.5, shape=(2, EXPERTS))
    books.place(there, popular)
    books.serve(choice([[2, 1]] * 70, [[0.5, 0.5]] * 70, layer=1))
    books.commit()
    books.expect(popular[:, [2, 1, 0, *range(3, EXPERTS)]])
    assert (books.there() == there).all()
    served = books.serve(choice([[5, 1]], [[0.9, 0.1]], layer=1))
    assert rows(served.may) == [[0, 1, 5]]  # 2 was the hottest, and is now expected least
    anew = Books(above=0.5, shape=(2, EXPERTS))
    anew.place(there, popular[:, [2, 1, 0, *range(3, EXPERTS)]])
    many = choice([[6, 0], [7, 1]] * 70, [[0.7, 0.3]] * 140, layer=1)
    anew.serve(choice([[5, 1]], [[0.9, 0.1]], layer=1))
    assert np.array_equal(books.serve(many).may, anew.serve(many).may)


def test_a_book_that_fetches_nothing_keeps_no_copies() -> None:
    books = Books(above=1.0, shape=(1, EXPERTS))
    there = np.zeros((1, EXPERTS), dtype=bool)
    there[0, :3] = True
    books.place(there, np.zeros(1))
    served = books.serve(choice([[3, 0]], [[1.0, 0.0]]))
    assert served.may.strides[0] == 0
    assert (served.missed.tolist(), served.reads.tolist()) == ([1], [0])
    books.abandon()
    assert not books.astray


def test_ids_are_numbers() -> None:
    assert book(0, 1).serve(choice([[0, 1]], [[1, 1]])).fetched.dtype == ids().dtype
