"""What a preset is made of: one answer per question, and null objects for what is not asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from retinue.policy.base import (
    BoolArray,
    Checking,
    Choice,
    Evictor,
    Known,
    MissHandler,
    Placement,
    Precision,
    Predictor,
    Route,
    Routing,
    Running,
    Signal,
    Stock,
    Thinning,
    View,
    Watcher,
)
from retinue.types import Demand, IntArray, Want

# Which experts a prompt of these token ids is likely to use: a bit for each that there may be.
Paths = Callable[[IntArray], BoolArray]


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


class OwnRouting:
    """Lets every router choose for itself."""

    exact = True
    restricts = False
    needs: frozenset[Signal] = frozenset()

    def rank(self, choice: Choice, resident: BoolArray) -> None:
        """No change."""


class KeepAll:
    """Leaves out none of a token's experts."""

    exact = True
    renormalises = False
    needs: frozenset[Signal] = frozenset()

    def keep(self, route: Route, view: View) -> BoolArray:
        """All of them."""
        return np.ones(route.experts.shape, dtype=bool)


class AsIs:
    """Reads every expert as the checkpoint has it."""

    names: tuple[str, ...] = ("as-is",)
    exact = True
    needs: frozenset[Signal] = frozenset()

    def pick(self, demand: Demand, view: View) -> IntArray:
        """The only one."""
        return np.zeros(len(demand.experts), dtype=np.int64)

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        """The only one."""
        return np.zeros(len(want.experts), dtype=np.int64)


class NoPlacement:
    """Lets use decide what stays."""

    fixed = False
    needs_profile = False
    by_task = False
    periodic = False

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """Nothing is loaded beforehand."""
        return np.zeros_like(stock.there)


OF_ROUTES: frozenset[Signal] = frozenset({"scores", "hidden", "token_ids"})  # what a route carries


@dataclass(frozen=True, slots=True)
class Policies:
    """One answer per question: what a preset is made of.

    `fetch_above` is for a routing that replaces missing experts: one whose share of its token's
    routing weight is above it is fetched instead. 1: none, 0: all, which is exact. `ring` is the
    share of the slots that experts may take which only pass in a prefill (see `memory/cache.py`).
    1: all, so that the evictor alone decides; None: as many as one layer has experts, or a quarter.
    `gated`: the predictor is not asked while looking ahead does not pay (see `memory/payback.py`).
    """

    evictor: Evictor
    predictor: Predictor
    miss: MissHandler
    routing: Routing = field(default_factory=OwnRouting)
    placement: Placement = field(default_factory=NoPlacement)
    forecaster: str = "popularity"  # whom a periodic placement asks, by its name
    impatient: bool = False  # whether it is asked before the period ends if that may pay
    fetch_above: float = 1.0
    thinning: Thinning = field(default_factory=KeepAll)
    precision: Precision = field(default_factory=AsIs)
    watchers: tuple[Watcher, ...] = ()
    order: str | None = None  # by name, who goes first unless the user says; None: the default
    ring: float | None = None
    gated: bool = False
    paths: Paths | None = None  # what the order `alike` groups by

    @property
    def exact(self) -> bool:
        """Whether the output is that of the plain model."""
        served = self.routing.exact or (self.routing.restricts and self.fetch_above == 0)
        return self.miss.exact and served and self.thinning.exact and self.precision.exact

    @property
    def needs(self) -> frozenset[Signal]:
        """The signals that any of the parts declares."""
        needs = self.predictor.needs | self.routing.needs | self.thinning.needs
        return needs.union(self.precision.needs, *(watcher.needs for watcher in self.watchers))

    @property
    def asks_ahead(self) -> int:
        """How many coming layers' routers the predictor asks."""
        return self.predictor.depth if "next_scores" in self.predictor.needs else 0

    @property
    def checking(self) -> Checking | None:
        """The predictor, if it compares what it was told with what routers say in their turn."""
        return self.predictor if isinstance(self.predictor, Checking) else None

    @property
    def sees_tokens(self) -> bool:
        """Whether anybody looks at what runs token by token."""
        exact = self.thinning.exact and self.precision.exact and self.miss.exact
        return bool(self.watchers or self.needs & OF_ROUTES) or not exact
