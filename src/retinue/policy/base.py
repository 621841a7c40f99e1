"""The questions that policies answer, one small interface each, and the facts they may see.

Policies decide over arrays and hold no memory: the cache keeps the books, the model computes.
Nothing under `policy/` imports torch. A null object stands in for each question that a preset
does not ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from retinue.metrics import PhaseCounters
from retinue.types import Deadline, Demand, FloatArray, IntArray, Phase, Want

BoolArray = npt.NDArray[np.bool_]
Signal = str  # one of SIGNALS
SIGNALS = ("next_scores",)


@dataclass(frozen=True, slots=True)
class Ahead:
    """A coming layer; `scores` are what its router says of this layer's input, if asked for."""

    layer: int
    scores: FloatArray | None = None  # [tokens, experts], probabilities


STILL = 0.75  # of the experts of a pass; ordinary text keeps a third


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

    @property
    def kept_share(self) -> float:
        """How much of its experts each layer's last pass kept from the one before, about.

        An expert that was used in both passes shows as used in the last one only, so what the
        pass before used and the last one did not is counted. Negative if that was a larger pass.
        """
        latest = self.last_used.max(axis=1, keepdims=True)
        now = np.count_nonzero((self.last_used == latest) & (latest >= 0))
        left = np.count_nonzero((self.last_used == latest - 1) & (latest >= 1))
        return 1 - left / now if now else 0.0

    @property
    def stands_still(self) -> bool:
        """Whether most experts are those of the pass before, as in lists, tables and loops."""
        return self.kept_share > STILL


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


@dataclass(frozen=True, slots=True)
class Choice:
    """What the checkpoint's own router says of some tokens in one layer, before it is changed."""

    layer: int
    scores: FloatArray  # [tokens, experts], by which the router ranks, biases and groups included
    experts: IntArray  # [tokens, k]
    weights: FloatArray  # [tokens, k]


class Routing(Protocol):
    """Which experts serve a token, given what its router would choose.

    `exact` says that it changes nothing; such a policy is never asked.
    """

    exact: bool

    def rank(self, choice: Choice, resident: BoolArray) -> FloatArray | None:
        """Scores that take the place of the router's own when it chooses its k; None: no change.

        resident: [tokens, experts], which experts may serve each token. Only the ranking is
        replaced: the weights of the chosen stay what the family makes of its own scores.
        """
        ...


class Popularity(Protocol):
    """How much each expert is used; `profile.Profile`, or nothing known."""

    def shares(self, task: str | None) -> npt.NDArray[np.float64]:
        """Per layer the share of routing weight that fell on each expert: `[layers, experts]`.

        Of all tasks together where `task` is None or unknown.
        """
        ...


class Forecaster(Popularity, Protocol):
    """How much each expert will be used by the prompts to come, from those that came before."""

    def observe(self, task: str | None, used: FloatArray) -> None:
        """A prompt of `task` has been read; `used` [layers, experts] is its routing weight,

        summed over its tokens, as the routers themselves chose, before anything was replaced.
        """
        ...


@dataclass(frozen=True, slots=True)
class Running:
    """A request whose passes come next: its task, and its length in tokens.

    `answer_tokens` is how long its answer may become at most, 0 if that is not known. `new` says
    that it has had no pass yet.
    """

    task: str | None
    prompt_tokens: int = 0
    answer_tokens: int = 0
    new: bool = False


class Known(Popularity, Protocol):
    """What placements may know of tasks; None or an unknown task stands for all of them."""

    def sensitive(self, task: str | None) -> BoolArray:
        """In which layers it matters to the task which expert serves: `[layers]`."""
        ...

    def answer_tokens(self, task: str | None) -> float:
        """How long the task's answers are on average; 0 if that is not known."""
        ...

    def damage(self) -> npt.NDArray[np.float64]:
        """How much it hurts when another expert serves: `[layers, experts]`, about 1 on average.

        A unit of routing weight, relative to the same in other layers and on other experts.
        """
        ...


@dataclass(frozen=True, slots=True)
class Stock:
    """What a placement disposes of; arrays are `[layers, experts]`, never write."""

    slots: int
    top_k: int  # as many experts must stay in each layer, or all that it has
    there: BoolArray  # which experts the model has
    resident: BoolArray  # which of them are placed now; none at the start


class Placement(Protocol):
    """Which experts stay in memory. `fixed` says that they leave only when it says so.

    `by_task` says that the answer depends on what runs, `periodic` that it is asked anew every
    so many prompts, with what a forecaster then says in place of the profile.
    """

    fixed: bool
    needs_profile: bool
    by_task: bool
    periodic: bool

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """`[layers, experts]`: at most `stock.slots` experts, for the requests that run next."""
        ...


class Job(Protocol):
    """What an order may see of a request. Times are seconds on the engine's clock."""

    @property
    def task(self) -> str | None: ...
    @property
    def arrived(self) -> float: ...
    @property
    def deadline(self) -> Deadline | None: ...
    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        ...

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest answer that was asked for."""
        ...

    @property
    def last_token_at(self) -> float:
        """When its last token came; its arrival before the first one."""
        ...


@dataclass(frozen=True, slots=True)
class Queues:
    """What waits and what runs, `now`. Read-only.

    `seats` requests run at once, `together` of them decode in one pass; a prefill pass takes
    `chunk` tokens, and cuts prompts unless they are `whole`.
    """

    now: float
    waiting: Sequence[Job]  # in the order of arrival
    running: Sequence[Job]  # in the order of admission
    seats: int
    together: int
    chunk: int
    whole: bool = False


class Order(Protocol):
    """Who goes first. The scheduler asks, and keeps to the room that there is.

    An order holds no requests: what waits and what runs is shown to it each time.
    """

    def refuse(self, job: Job, queues: Queues) -> float | None:
        """None: `job` may join those that wait. Else it would come too late: seconds until

        another try may be worth it.
        """
        ...

    def first(self, queues: Queues) -> int | None:
        """The place in `queues.waiting` of who shall run next; None: nobody yet.

        Asked while a seat is free and somebody waits. If nothing runs, it has to name one.
        """
        ...

    def rank(self, jobs: Sequence[Job], phase: Phase) -> list[int]:
        """Places in `jobs`, which are all in `phase`, in the order in which a pass takes them."""
        ...

    def chunk(self, queues: Queues, after: Phase) -> int:
        """How many tokens of prompts the next pass may take; 0: decode first.

        Asked where there is work of both kinds; `after` is what the last pass was for.
        """
        ...

    def passed(self, phase: Phase, cost: PhaseCounters) -> None:
        """See what a pass has cost."""
        ...

    def loaded(self, bytes_read: int, seconds: float) -> None:
        """See what changing the resident experts before a pass has cost."""
        ...

    def ended(self, job: Job) -> None:
        """See a request that was answered to its end."""
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


class OwnRouting:
    """Lets every router choose for itself."""

    exact = True

    def rank(self, choice: Choice, resident: BoolArray) -> None:
        """No change."""


class NoPlacement:
    """Lets use decide what stays."""

    fixed = False
    needs_profile = False
    by_task = False
    periodic = False

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """Nothing is loaded beforehand."""
        return np.zeros_like(stock.there)


@dataclass(frozen=True, slots=True)
class Policies:
    """One answer per question: what a preset is made of.

    `fetch_above` is for a routing that replaces missing experts: one whose share of its token's
    routing weight is above it is fetched instead. 1: none, 0: all, which is exact.
    """

    evictor: Evictor
    predictor: Predictor
    miss: MissHandler
    routing: Routing = field(default_factory=OwnRouting)
    placement: Placement = field(default_factory=NoPlacement)
    forecaster: str = "popularity"  # whom a periodic placement asks, by its name
    impatient: bool = False  # whether it is asked before the period ends if that may pay
    fetch_above: float = 1.0

    @property
    def exact(self) -> bool:
        """Whether the output is that of the plain model."""
        return self.miss.exact and (self.routing.exact or self.fetch_above == 0)
