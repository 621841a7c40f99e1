"""The questions that policies answer, one small interface each, and the facts they may see.

Policies decide over arrays and hold no memory: the cache keeps the books, the model computes.
Nothing under `policy/` imports torch. A null object stands in for each question that a preset
does not ask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from retinue.types import Demand, FloatArray, IntArray, Phase, Want

BoolArray = npt.NDArray[np.bool_]
Signal = str  # one of SIGNALS
SIGNALS = ("next_scores", "scores", "hidden", "embedding", "token_ids")


@dataclass(frozen=True, slots=True)
class Ahead:
    """A coming layer; `scores` are what its router says of this layer's input, if asked for."""

    layer: int
    scores: FloatArray | None = None  # [tokens, experts], probabilities


@dataclass(frozen=True, slots=True)
class Route:
    """What the routers chose for the tokens of a pass in one layer, before anything is changed.

    `sequences` says whose each token is, by the number that `Prompt` gives. The last three are
    there for who declares that it needs them. Arrays are the engine's own: copy what you keep.
    """

    layer: int
    experts: IntArray  # [tokens, k]; ids of the number of experts or more mean none
    weights: FloatArray  # [tokens, k]
    sequences: IntArray  # [tokens]
    scores: FloatArray | None = None  # [tokens, experts], probabilities; signal "scores"
    hidden: FloatArray | None = None  # [tokens, hidden], the layer's input; signal "hidden"
    token_ids: IntArray | None = None  # [tokens]; signal "token_ids"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request whose first pass comes next. `embedding` [hidden] is the mean of its tokens'."""

    sequence: int  # its number, which no other request of this process has
    task: str | None
    token_ids: IntArray  # [tokens]; empty where they are not known, as in a replay
    embedding: FloatArray | None = None  # signal "embedding"


@dataclass(frozen=True, slots=True)
class Costs:
    """What a layer's work costs here, in seconds, as far as it was measured.

    `elsewhere_s` is for one token in a second place that computes, such as a CPU beside a GPU;
    None where there is but one.
    """

    read_s: float  # of one expert, alone
    expert_s: float  # to compute one token in one resident expert
    layer_s: float  # of a layer's pass besides its experts
    elsewhere_s: float | None = None


STILL = 0.75  # of the experts of a pass; ordinary text keeps a third


@dataclass(slots=True)
class View:
    """What policies may see, read-only. Arrays are `[layers, experts]` and live: never write.

    It is not frozen because it is made anew for every layer, which would take thrice as long.
    """

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
    route: Route | None = None  # of the layer that runs; None where nothing needs its tokens
    precision: IntArray | None = None  # in which each expert is there, see `Precision`
    costs: Costs | None = None
    kept: float | None = None  # `kept_share`, from who counts along
    busy: float = 1.0  # the share of decoding's time in which the link reads, lately

    @property
    def kept_share(self) -> float:
        """How much of its experts each layer's last pass kept from the one before, about.

        An expert that was used in both passes shows as used in the last one only, so what the
        pass before used and the last one did not is counted. Negative if that was a larger pass.
        """
        if self.kept is not None:
            return self.kept
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


@runtime_checkable
class Checking(Predictor, Protocol):
    """A predictor that compares what routers said of coming layers with what they say in turn."""

    def checks(self, layer: int, view: View) -> bool:
        """Whether to ask the router of `layer`, which runs, for what it says of its input.

        Asked behind the forecast. That is a product, so not always.
        """
        ...

    def check(self, layer: int, scores: FloatArray) -> None:
        """See its answer, where it could be asked: [tokens, experts], probabilities."""
        ...


class Watcher(Protocol):
    """Sees what runs, for policies that learn while they serve; they share one.

    `observe` is asked once a layer, before the evictor, the predictor and the others.
    """

    needs: frozenset[Signal]

    def begin(self, prompt: Prompt) -> None:
        """A request has its first pass next."""
        ...

    def observe(self, demand: Demand, view: View) -> None:
        """See what a layer needs; `view.route` has it token by token."""
        ...

    def end(self, sequence: int) -> None:
        """A request has ended, whatever way."""
        ...


class Thinning(Protocol):
    """Which of a token's experts are left out, as if the router had not chosen them.

    It is asked after the routing, before anything is read. `exact` says that it leaves out none;
    such a policy is never asked. `renormalises`: what is left gets the weight of what is left out.
    """

    exact: bool
    renormalises: bool
    needs: frozenset[Signal]

    def keep(self, route: Route, view: View) -> BoolArray:
        """`[tokens, k]`: which of the chosen experts run, at least one of each token."""
        ...


class Precision(Protocol):
    """In which precision an expert is read. `names[0]` is the checkpoint's own, `as-is`.

    The others are those of the nested store, `int8`, `int4`, `int2`, the better ones first. An
    expert that is there in a worse one than `pick` says is a miss. `exact`: only the own one.
    """

    names: tuple[str, ...]
    exact: bool
    needs: frozenset[Signal]

    def pick(self, demand: Demand, view: View) -> IntArray:
        """For each expert of the demand the index of the worst precision that will do: `[n]`."""
        ...

    def pick_ahead(self, want: Want, view: View) -> IntArray:
        """The same for experts that are read ahead: `[n]`."""
        ...


class MissHandler(Protocol):
    """What happens to an expert that is needed and not resident."""

    exact: bool

    def fetch(self, demand: Demand, resident: npt.NDArray[np.bool_], view: View) -> IntArray:
        """The experts of `demand` to read, in the order of reading."""
        ...

    def elsewhere(self, demand: Demand, resident: BoolArray, view: View) -> IntArray:
        """The experts of `demand` that are not resident and are computed where they lie instead.

        None where `view.costs.elsewhere_s` names no second place that computes. `fetch` is then
        asked as if they were resident.
        """
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """What the checkpoint's own router says of some tokens in one layer, before it is changed."""

    layer: int
    scores: FloatArray  # [tokens, experts], by which the router ranks, biases and groups included
    experts: IntArray  # [tokens, k]
    weights: FloatArray  # [tokens, k]
    hidden: FloatArray | None = None  # [tokens, hidden], the router's input; signal "hidden"
    phase: Phase = "decode"


class Routing(Protocol):
    """Which experts serve a token, given what its router would choose.

    `exact` says that it changes nothing; such a policy is never asked. `restricts`: it keeps to
    a fixed set of residents, whose books decide who may serve; otherwise it is shown who is
    resident, and what it chooses beyond that is read like any miss.
    """

    exact: bool
    restricts: bool
    needs: frozenset[Signal]

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
