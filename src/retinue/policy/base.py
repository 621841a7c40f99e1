"""The questions that policies answer, one small interface each, and the facts they may see.

Policies decide over arrays and hold no memory: the cache keeps the books, the model computes.
Nothing under `policy/` imports torch. A null object stands in for each question that a preset
does not ask.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from retinue.types import Demand, FloatArray, IntArray, Phase, Want

Signal = str  # one of SIGNALS
SIGNALS = ("next_scores",)


@dataclass(frozen=True, slots=True)
class Ahead:
    """A coming layer; `scores` are what its router says of this layer's input, if asked for."""

    layer: int
    scores: FloatArray | None = None  # [tokens, experts], probabilities


@dataclass(frozen=True, slots=True)
class View:
    """What policies may see, read-only. Arrays are `[layers, experts]` and live: never write."""

    step: int  # forward passes so far
    layer: int
    phase: Phase
    layers: int
    experts: int
    top_k: int
    slots: int
    resident: npt.NDArray[np.bool_]
    last_used: IntArray  # step of the last use, -1: never
    heat: FloatArray  # decayed share of routing weight, see `Evictor`
    ahead: tuple[Ahead, ...] = ()  # the coming layers with experts, the next one first


class Evictor(Protocol):
    """Who leaves when room is needed."""

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """One number per entry `(layers[i], experts[i])`; the smallest leave first."""
        ...


class Predictor(Protocol):
    """Which experts will be needed next.

    `needs` names the signals that are computed for it, `depth` how many layers ahead it looks
    in decoding (in prefill, one: there the next layer alone fills the link). `speculative` says
    that a forecast may be wrong, so that what is still queued when the layer starts and is not
    needed is dropped.
    """

    needs: frozenset[Signal]
    depth: int
    speculative: bool

    def observe(self, demand: Demand, view: View) -> None:
        """See what a layer really needed."""
        ...

    def forecast(self, view: View) -> list[Want]:
        """What the coming layers may need; asked once a layer, before it computes."""
        ...


class MissHandler(Protocol):
    """What happens to an expert that is needed and not resident."""

    exact: bool

    def fetch(self, demand: Demand, resident: npt.NDArray[np.bool_], view: View) -> IntArray:
        """The experts of `demand` to read, in the order of reading."""
        ...


class NoPredictor:
    """Forecasts nothing."""

    needs: frozenset[Signal] = frozenset()
    depth = 0
    speculative = True

    def observe(self, demand: Demand, view: View) -> None:
        """Nothing to learn."""

    def forecast(self, view: View) -> list[Want]:
        """Nothing."""
        return []


@dataclass(frozen=True, slots=True)
class Policies:
    """One answer per question: what a preset is made of."""

    evictor: Evictor
    predictor: Predictor
    miss: MissHandler

    @property
    def exact(self) -> bool:
        """Whether the output is that of the plain model."""
        return self.miss.exact
