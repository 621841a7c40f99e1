"""What a preset is: a named combination of policies, and what it is made from."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from shlex import quote
from typing import Any

from retinue.errors import Refused
from retinue.policy.evict.belady import Future
from retinue.policy.policies import Policies
from retinue.policy.profile import Profile
from retinue.types import FloatArray

Arrays = Mapping[str, FloatArray]


@dataclass(frozen=True, slots=True)
class Given:
    """What is known of a model when a preset is built for it. `slots`: experts that fit.

    `learned` holds, by kind, the arrays that `retinue train-predictor --kind KIND` made. `future`
    is what will be needed, where a trace is replayed.
    """

    model: str = ""
    layers: int = 0
    experts: int = 0  # of the layer that has most
    top_k: int = 0
    routed: tuple[int, ...] = ()  # which layers have experts
    slots: int = 0
    profile: Profile | None = None
    learned: Mapping[str, Arrays] = field(default_factory=dict)
    future: Future | None = None
    place: str = "MODEL"  # what a command line calls the model

    def foreseen(self) -> Future:
        """The future. Raises Refused where nobody knows it."""
        if self.future is None:
            trace = f"retinue trace {quote(self.place)} --out FILE"
            raise Refused(
                "this preset knows what will be needed, so that only a replay can run it",
                hint=f"`{trace}`, then `retinue simulate FILE`",
            )
        return self.future

    def arrays(self, kind: str) -> Arrays:
        """What was learnt of `kind`. Raises Refused where nothing was."""
        if kind not in self.learned:
            raise Refused(
                f"this preset needs a `{kind}`, which nobody trained for `{self.model}`",
                hint=f"`retinue train-predictor {quote(self.place)} --data FILE --kind {kind}`",
            )
        return self.learned[kind]

    def known(self) -> Profile:
        """The profile. Raises Refused where there is none."""
        if self.profile is None:
            raise Refused(
                f"this preset needs a profile of `{self.model}`",
                hint=f"make it with `retinue profile {quote(self.place)} --data FILE`",
            )
        return self.profile


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of `retinue presets`.

    `fixed`: its placement says who stays; `profiled`: it cannot do without a profile. `learned` are
    the kinds of predictor that it needs, `better_with` those that it can do without. `nested` says
    that it reads other precisions from the nested store, `replayed` that it knows the future, so
    that only a replay can run it. `slower`: why its paper demands what may make it slower than
    `on-demand`; empty where none does. `alone`: what becomes of a paper's two places that compute
    where there is one; empty where it has one.
    """

    name: str
    exact: bool
    paper: str
    parts: tuple[str, ...]
    deviations: str
    build: Callable[[Given], Policies]
    fixed: bool = False
    profiled: bool = False
    learned: tuple[str, ...] = ()
    better_with: tuple[str, ...] = ()
    nested: bool = False
    replayed: bool = False
    slower: str = ""
    alone: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of learned part that it uses, needed or not."""
        return (*self.learned, *self.better_with)

    @property
    def wants(self) -> tuple[str, ...]:
        """What it cannot do without, in words."""
        learned = tuple(f"a trained {kind}" for kind in self.learned)
        nested = ("a nested store",) * self.nested
        return ("a profile",) * self.profiled + learned + nested + ("a replay",) * self.replayed

    def as_dict(self) -> dict[str, Any]:
        """The row without its factory."""
        return {key: value for key, value in asdict(self).items() if key != "build"}
