"""What `retinue train-predictor` made of one model: networks and parts by name, and their worth.

It knows no files; `model/predictors.py` reads and writes them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from retinue.errors import UsageError
from retinue.policy.parts.kinds import KINDS, misfit
from retinue.policy.predict.network import HEADS, INNER, OUTER, Network, shapes
from retinue.policy.predict.shares import Shares
from retinue.types import FloatArray, IntArray

FORMAT, VERSION = "retinue-predictor", 2
READ = (1, VERSION)  # the first version had no parts
LAYERWISE = {"emoe-a": False, "emoe-l": True}  # by the name of the network
AGAIN = "make it again with `retinue train-predictor`"
Worth = Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """What was learnt of one kind: `KINDS` says which arrays, fp32 each.

    worth: how well it did on texts that it had not seen, by the figure's name, mostly by row.
    """

    arrays: Mapping[str, FloatArray]
    worth: Worth


@dataclass(frozen=True, slots=True)
class Learned:
    """Networks and parts for one model; `texts` is how many the networks learnt from.

    rows: which decoder layers have experts; the networks know no others. held_out: by the name
    of a forecaster the share of routing weight that 20, 40, 60 and 80 % of the experts covered,
    of texts that the networks scored then had not seen.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    rows: IntArray
    tasks: tuple[str, ...]
    texts: int
    held_out: Mapping[str, tuple[float, ...]]
    networks: Mapping[str, Network]
    parts: Mapping[str, Part] = field(default_factory=dict)

    def task(self, name: str | None) -> int:
        """The row of the task called `name` in a network; the last one for what is unknown."""
        return self.tasks.index(name) if name in self.tasks else len(self.tasks)

    def spread(self, shares: Shares) -> Shares:
        """`shares` [layers with experts, experts] as [layers, experts]."""
        whole = np.zeros((self.layers, self.experts))
        whole[self.rows] = shares
        return whole

    def arrays(self, kinds: Iterable[str]) -> dict[str, Mapping[str, FloatArray]]:
        """What was learnt of those of `kinds` that there are, by kind."""
        return {kind: self.parts[kind].arrays for kind in kinds if kind in self.parts}

    def over(self, older: "Learned") -> "Learned":
        """This, and what `older` has besides.

        Networks that know other tasks than ours are left out: one list of tasks is for all.
        """
        if (self.model, *self._shape) != (older.model, *older._shape):
            return self
        merged = replace(self, parts={**older.parts, **self.parts})
        if not self.networks:
            return replace(older, parts=merged.parts)
        if self.tasks != older.tasks:
            return merged
        networks = {**older.networks, **self.networks}
        kept = {name: networks[name] for name in LAYERWISE if name in networks}
        return replace(merged, networks=kept, held_out={**older.held_out, **self.held_out})

    @property
    def _shape(self) -> tuple[object, ...]:
        return (self.layers, self.experts, self.top_k, tuple(self.rows.tolist()))

    def about(self) -> dict[str, Any]:
        """Everything but the arrays, JSON-shaped."""
        head = {"format": FORMAT, "version": VERSION, "model": self.model}
        head |= {"layers": self.layers, "experts": self.experts, "top_k": self.top_k}
        head |= {"rows": self.rows.tolist(), "tasks": list(self.tasks), "texts": self.texts}
        held_out = {name: list(values) for name, values in self.held_out.items()}
        worth = {
            kind: {name: list(values) for name, values in part.worth.items()}
            for kind, part in self.parts.items()
        }
        return head | {"held_out": held_out, "networks": list(self.networks), "parts": worth}


def learned_from(about: Any, arrays: Mapping[str, FloatArray]) -> Learned:
    """What `about` and the arrays, `NETWORK/NAME` or `KIND/NAME` each, say.

    Raises UsageError if damaged. Kinds that this version does not know are left out.
    """
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UsageError("not a predictor", hint="make one with `retinue train-predictor MODEL`")
    if about.get("version") not in READ:
        raise UsageError(
            f"unknown version of a predictor: `{about.get('version')}`",
            hint=f"this version of retinue reads {READ[0]} to {VERSION}; {AGAIN}",
        )
    try:
        layers, experts, top_k = (int(about[key]) for key in ("layers", "experts", "top_k"))
        learned = Learned(
            str(about["model"]),
            layers,
            experts,
            top_k,
            np.array(about["rows"], dtype=np.int64),
            tuple(str(task) for task in about["tasks"]),
            int(about["texts"]),
            _worth(about["held_out"]),
            {str(name): _network(str(name), arrays) for name in about["networks"]},
            {
                kind: Part(_own(kind, arrays), _worth(worth))
                for kind, worth in about.get("parts", {}).items()
                if kind in KINDS
            },
        )
        _check(learned)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"damaged predictor: {error!r}", hint=AGAIN) from error
    return learned


def _worth(written: Any) -> Worth:
    return {str(name): tuple(map(float, row)) for name, row in written.items()}


def _network(name: str, arrays: Mapping[str, FloatArray]) -> Network:
    return Network(_own(name, arrays), LAYERWISE[name])


def _own(name: str, arrays: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    start = f"{name}/"
    return {key.removeprefix(start): arrays[key] for key in arrays if key.startswith(start)}


def _check(learned: Learned) -> None:
    """Raise ValueError or LookupError unless every array has its shape and is finite."""
    rows = learned.rows
    if rows.ndim != 1 or not rows.size or rows.min() < 0 or rows.max() >= learned.layers:
        raise ValueError(f"rows are not layers: {rows.tolist()}")
    for name, network in learned.networks.items():
        width = network.arrays["place"].shape[-1]
        sizes = (len(rows), learned.experts, len(learned.tasks), width, network.blocks)
        wanted = shapes(*sizes)
        found = {key: array.shape for key, array in network.arrays.items()}
        if found != wanted or width % HEADS or len(found) != len(OUTER) + len(INNER) * sizes[-1]:
            raise ValueError(f"the arrays of {name} do not fit the model")
        if not all(np.isfinite(array).all() for array in network.arrays.values()):
            raise ValueError(f"{name} has weights that are not finite")
    lengths = dict[str, int]()
    for kind, part in learned.parts.items():
        wrong = misfit(kind, part.arrays, len(rows), learned.experts, lengths)
        if wrong is not None:
            raise ValueError(wrong)
