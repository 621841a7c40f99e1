"""The kinds of learned part, and which arrays each is made of.

This is the contract between training, the file and the policies. Arrays are fp32 when a policy
gets them, whole numbers included. A row is a layer with experts, counted from the first one: row r
is layer `given.routed[r]`. In a shape `rows` and `experts` are those of the model, a number stands
for itself, and every other name is one length within a kind, such as `hidden`, the model's width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from retinue.types import FloatArray

Shape = tuple[str | int, ...]
Whole = tuple[int, str]  # from the first on, below a length


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: who described it, what it says, and the shape of each of its arrays by name.

    whole: those that hold whole numbers, and which.
    """

    name: str
    paper: str
    says: str
    shapes: Mapping[str, Shape]
    whole: Mapping[str, Whole] = field(default_factory=dict)


_MLP: dict[str, Shape] = {
    "read": ("rows", "hidden", "width"),
    "read_bias": ("rows", "width"),
    "say": ("rows", "width", "experts"),
    "say_bias": ("rows", "experts"),
}
KINDS = {
    kind.name: kind
    for kind in (
        # Row r: from the layer's input, as its router gets it, to the experts of row r + stride.
        # The last `stride` rows say nothing. `perceptron.py` computes it.
        Kind(
            "promoe",
            "2410.22134",
            "experts some layers ahead",
            {"stride": (1,), **_MLP},
            {"stride": (1, "rows")},
        ),
        # From token ids to the experts of every row, before the network runs. `paths.py`.
        Kind(
            "expertflow",
            "2410.17954",
            "experts of all layers from token ids",
            {
                "embed": ("vocabulary", "wide"),
                "decay": (1,),
                "mix": (3, "wide", "width"),
                "mix_bias": ("width",),
                "say": ("rows", "width", "experts"),
                "say_bias": ("rows", "experts"),
            },
        ),
        # Of each request that was kept how many tokens went to each expert, a row sums to 1.
        Kind(
            "moe-infinity", "2401.14361", "requests seen", {"matrices": ("kept", "rows", "experts")}
        ),
        # `maps`: the router's probabilities in one iteration, `embeddings`: the mean embedding of
        # the prompt that it belongs to.
        Kind(
            "fmoe",
            "2502.05370",
            "iterations seen",
            {"maps": ("kept", "rows", "experts"), "embeddings": ("kept", "hidden")},
        ),
        # Row r: scores of this row's experts from the input of the row before. Row 0 is not used.
        Kind(
            "pre-gated",
            "2308.12066",
            "each layer's choice from the one before",
            {"gate": ("rows", "hidden", "experts"), "bias": ("rows", "experts")},
        ),
        # From the input of row 0 to scores of the experts of every row. `perceptron.py`.
        Kind(
            "read-me",
            "2410.19123",
            "all layers' choice from the first one's input",
            {
                "read": ("hidden", "width"),
                "read_bias": ("width",),
                "say": ("rows", "width", "experts"),
                "say_bias": ("rows", "experts"),
            },
        ),
        # `sensitivity`: S_l of the adaptive gate; `tolerance`: its T, in the same unit; `accuracy`:
        # a_l, the recall of the next gate, 0 in row 0; `single`: r_l, how many
        # of its experts the gate leaves out of a token on average, at most 1.
        Kind(
            "adapmoe",
            "2408.10284",
            "how much each layer matters",
            {
                "sensitivity": ("rows",),
                "tolerance": (1,),
                "accuracy": ("rows",),
                "single": ("rows",),
            },
        ),
        # `importance` of each expert, and the `bits` it is read in: 16 (as it is), 8, 4 or 2.
        # `keys`: row, and the heaviest expert of the row two before and of the row before, -1
        # where there is none; `ids` and `shares`: which experts follow, the likeliest first,
        # -1 and 0 where there are no more; `anywhere`: what to say of other keys.
        Kind(
            "edgemoe",
            "2308.14352",
            "bits of each expert, and its paths",
            {
                "importance": ("rows", "experts"),
                "bits": ("rows", "experts"),
                "keys": ("paths", 3),
                "ids": ("paths", "ways"),
                "shares": ("paths", "ways"),
                "anywhere": ("rows", "experts"),
            },
            {"keys": (-1, "experts"), "ids": (-1, "experts")},
        ),
        # Weights of recency, use, use in high precision, and distance; they sum to 1.
        Kind("hobbit", "2411.01433", "what its cache goes by", {"weights": (4,)}),
    )
}


IN_COMMON = ("hidden", "vocabulary")  # lengths of the model's, which every kind has alike
WIDTHS = (2, 4, 8, 16)


def misfit(
    kind: str,
    arrays: Mapping[str, FloatArray],
    rows: int,
    experts: int,
    model: dict[str, int] | None = None,
) -> str | None:
    """Why `arrays` are not of `kind` in a model of this size; None where they are.

    model: what other kinds say of `IN_COMMON`; what this one says is added.
    """
    wanted = KINDS[kind].shapes
    if arrays.keys() != wanted.keys():
        return f"the arrays of {kind} are not {', '.join(wanted)}"
    known = model if model is not None else {}
    lengths = {"rows": rows, "experts": experts, **known}
    for name, shape in wanted.items():
        array = arrays[name]
        if array.ndim != len(shape):
            return f"the arrays of {kind} do not fit the model"
        for length, said in zip(array.shape, shape, strict=True):
            right = said if isinstance(said, int) else lengths.setdefault(said, length)
            if length != right or not length:
                return f"the arrays of {kind} do not fit the model"
        if not np.isfinite(array).all():
            return f"{kind} has numbers that are not finite"
    known.update({name: lengths[name] for name in IN_COMMON if name in lengths})
    return _out_of_range(kind, arrays, lengths)


def _out_of_range(
    kind: str, arrays: Mapping[str, FloatArray], lengths: Mapping[str, int]
) -> str | None:
    """Which whole numbers are none, or name nothing that there is."""
    for name, (least, length) in KINDS[kind].whole.items():
        values, most = arrays[name], lengths[length] - 1
        if (values != np.round(values)).any() or values.min() < least or values.max() > most:
            return f"`{name}` of {kind} is out of range: whole numbers from {least} to {most}"
    if kind == "edgemoe":
        if not np.isin(arrays["bits"], WIDTHS).all():
            return f"`bits` of edgemoe are out of range: {WIDTHS}"
        row = arrays["keys"][:, 0]
        if row.min() < 0 or row.max() >= lengths["rows"]:
            return f"`keys` of edgemoe name rows beyond {lengths['rows'] - 1}"
    return None
