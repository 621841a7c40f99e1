"""Which recorded operations are done again where a router's choice is replaced."""

from typing import Any

import pytest
import torch

from retinue.errors import Unsupported
from retinue.model import program
from retinue.model.abilities import probe
from retinue.model.again import repeated
from retinue.model.arena import Item, Routed, Torch, plan
from retinue.model.record import ROUTED, Operation, Recording, Ref, aten
from tiny import config_of

TOKENS, EXPERTS, TOP_K = 2, 8, 3


def ref(source: int, width: int = TOP_K, dtype: torch.dtype = torch.float32) -> Ref:
    return Ref(source, dtype, (TOKENS, width), (width, 1), 0)


HIDDEN, SCORES, VALUES, INDICES = ref(1), ref(2, EXPERTS), ref(3), ref(4, dtype=torch.int64)
WEIGHTS, SUMS, COPIES, BUFFER = ref(5), ref(6, 1), (ref(7, EXPERTS), ref(8)), ref(9)


def operation(function: Any, args: tuple[Any, ...], *outputs: Ref) -> Operation:
    return Operation(function, args, {}, outputs)


SCORE = operation(aten.softmax.int, (HIDDEN, -1), SCORES)
TOPK = operation(aten.topk.default, (SCORES, TOP_K), VALUES, INDICES)
SUM = operation(aten.sum.dim_IntList, (VALUES, [-1], True), SUMS)
NORMALISE = operation(aten.div_.Tensor, (VALUES, SUMS), VALUES)
CAST = operation(aten._to_copy.default, (VALUES,), WEIGHTS)
COPY = [
    operation(aten._to_copy.default, pair[:1], pair[1])
    for pair in zip((SCORES, WEIGHTS), COPIES, strict=True)
]
LOOKED = Operation(ROUTED, (SCORES, VALUES, INDICES, INDICES, WEIGHTS, *COPIES), {}, ())
LOOKUP = operation(aten.gather.default, (SCORES, -1, INDICES), VALUES)


@pytest.mark.parametrize(
    ("after", "wanted"),
    [
        ([], []),
        ([CAST], [CAST]),
        ([SUM, NORMALISE, CAST], [SUM, NORMALISE, CAST]),
        (
            [
                empty := operation(aten.zeros_like.default, (VALUES,), BUFFER),
                fill := operation(aten.add_.Tensor, (BUFFER, VALUES), BUFFER),
            ],
            [empty, fill],
        ),
    ],
    ids=["nothing", "a cast", "in place", "a buffer of its own"],
)
def test_what_follows_the_topk(after: list[Operation], wanted: list[Operation]) -> None:
    """In its order, after the values are looked up; not what was copied for the policy."""
    assert repeated([SCORE, TOPK, *after, *COPY], LOOKED) == [LOOKUP, *wanted]


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        ([SCORE, *COPY], "does not come from its topk"),
        (
            [SCORE, TOPK, operation(aten.add_.Tensor, (SCORES, 1), SCORES)],
            "changes what it chose by",
        ),
        (
            [empty, SCORE, TOPK, fill, CAST],
            "changes what it chose by",
        ),
    ],
    ids=["no topk", "scores changed", "a buffer from before"],
)
def test_what_cannot_be_done_again(before: list[Operation], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        repeated(before, LOOKED)


def test_a_family_whose_routers_would_answer_otherwise_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of("mixtral")
    assert probe(config).unprepared_restricted == ""
    monkeypatch.setattr(program, "repeated", lambda before, routed: repeated(before, routed)[:1])
    found = probe(config)
    assert found.unprepared == ""
    assert found.unprepared_restricted == "its steps then give other logits"


def test_memory_of_what_is_done_again_is_nobody_elses_until_then() -> None:
    """What a router read long ago would be written once more when its policy is asked."""
    later, out = ref(20), ref(21)
    items: list[Item] = [Torch(each) for each in (SCORE, TOPK, SUM, NORMALISE, CAST)]
    items.append(Torch(operation(aten.neg.default, (HIDDEN,), later)))
    asked = Routed(LOOKED, tuple(Torch(each) for each in (LOOKUP, SUM, NORMALISE, CAST)))
    last = Torch(operation(aten.add.Tensor, (later, WEIGHTS), out))
    recording = Recording([], {HIDDEN.source: torch.zeros(1)}, out)
    for between, shared in (([], True), ([asked], False)):
        _, places = plan([*items, *between, last], recording)
        others = {places[WEIGHTS.source], places[later.source]}
        assert (places[SUMS.source] in others) is shared
