"""Keeps the experts of a placement in memory, and changes them with what runs and what is forecast.

It is asked before every step. When other requests run than before, their set is placed; every
`period` prompts the forecaster is asked anew (eMoE, arXiv 2503.06823, section 4.1), and earlier
where prompts are served clearly worse than it said. Where heavy misses are fetched, a set stays
until then: other requests only change who leaves first, and fetch what they need. The first set
comes from the profile and is within the budget, where the paper begins with everything loaded.
Only what a new set lacks is read. Nothing else loads or evicts while a preset restricts routers.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from retinue.config import Config
from retinue.engine.learning import Learner
from retinue.errors import UsageError
from retinue.model.experts import ExpertHost
from retinue.model.predictors import find_predictor
from retinue.model.profiles import find_profile, learnt_profile
from retinue.policy.base import BoolArray, Forecaster, Placement, Running, Stock
from retinue.policy.place.occasions import Occasions, occasions_of
from retinue.policy.place.tables import Tables
from retinue.policy.policies import Policies
from retinue.policy.predict.forecasters import LEARNED, forecaster
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.presets import preset
from retinue.policy.profile import Profile
from retinue.types import Facts, FloatArray

log = logging.getLogger("retinue")

AUTO = "auto"  # which looks for what is recommended, see `engine/reserve.py`


@dataclass(frozen=True, slots=True)
class Beforehand:
    """What a placement goes by: what was learnt of the model, and who forecasts."""

    profile: Profile | None = None
    forecaster: Forecaster | None = None


def known_beforehand(folder: Path, facts: Facts, policies: Policies, config: Config) -> Beforehand:
    """The profile and the forecaster that the policies need, before anything is loaded.

    Where requests teach, the profile holds what earlier ones taught.

    Raises Refused where there is no profile, or no predictor for a forecaster that is learnt;
    UsageError for one that is damaged, another model's, or read by nobody, for an unknown
    forecaster, and for other settings that the preset does not use.
    """
    if not policies.placement.periodic:
        for name in ("period", "forecaster"):
            if (value := getattr(config, name)) is not None:
                raise UsageError(
                    f"the preset `{config.preset}` forecasts nothing: `--{name} {value}`",
                    hint=f"leave `--{name}` out, or use `--preset emoe`",
                )
    if policies.placement.needs_profile:
        profile = find_profile(folder, facts, config.profile)
        if config.learn:
            profile = Learner(profile, learnt_profile(folder)).profile
        if not policies.placement.periodic:
            return Beforehand(profile)
        name = config.forecaster or policies.forecaster
        learned = find_predictor(folder, facts) if name in LEARNED else None
        made = forecaster(name, profile, learned)
        if isinstance(made, OwnPrefill) and config.period is not None:
            raise UsageError(
                f"`--forecaster {name}` looks at each prompt: `--period {config.period}`",
                hint="leave `--period` out",
            )
        return Beforehand(profile, made)
    reads = config.preset == AUTO or preset(config.preset).profiled
    if config.profile is not None and not reads:
        raise UsageError(
            f"the preset `{config.preset}` reads no profile: `{config.profile}`",
            hint="leave `--profile` out, or use a preset that does, such as `popular`",
        )
    return Beforehand()


def residents_of(
    host: ExpertHost, policies: Policies, known: Beforehand, there: BoolArray, config: Config
) -> "Residents":
    """The set of a preset that has one; `there` [layers, experts]: which experts the model has."""
    period = config.period or (known.profile.period if known.profile else None)
    tables = Tables((there.shape[0], there.shape[1]), known.profile, known.forecaster)
    occasions = occasions_of(policies, tables, period)
    return Residents(host, policies.placement, tables, there, occasions)


class Residents:
    """The placement of one model. `occasions` say when its set is to be chosen anew."""

    def __init__(
        self,
        host: ExpertHost,
        placement: Placement,
        tables: Tables,
        there: BoolArray,
        occasions: Occasions,
    ) -> None:
        self._host, self._placement, self._tables = host, placement, tables
        self._there, self._occasions = there, occasions
        self._settled: list[Running] | None = None  # with whom nothing is left to be done
        self._said: set[str | None] = set()
        self.bytes_read = 0  # by all changes

    @property
    def period(self) -> int | None:
        """Prompts between two forecasts; None where nothing is forecast."""
        return self._occasions.period

    @property
    def own(self) -> bool:
        """Whether each answer has a set of its own, which its prompt says."""
        return self._occasions.own

    def start(self, task: str | None) -> None:
        """Load the first set, and let it serve from now on."""
        running = [Running(task, prompt_tokens=1)]
        self._change(running, self._occasions.key(running))
        self._host.arrival.settle()
        self._host.changes.active = True
        self._host.begin, self._host.observe = self.begin, self.observe

    def begin(self, running: Sequence[Running]) -> int:
        """These requests run next: choose their set where it is another, which their pass reads.

        Returns the bytes of that.
        """
        if self._occasions.placed is not None and running == self._settled:
            return 0
        started, before = time.perf_counter(), self.bytes_read
        if (occasion := self._occasions.begin(running)) is not None:
            self._name_unknown(running)
            if occasion.places:
                self._change(running, occasion.key)
                metrics = self._host.metrics
                metrics.refreshes += 1
                metrics.refresh_bytes += self.bytes_read - before
                metrics.refresh_s += time.perf_counter() - started
            else:
                self._host.changes.books.expect(self._occasions.popularity(running))
                self._occasions.placed = occasion.key
        self._settled = list(running) if self._occasions.settled else None
        return self.bytes_read - before

    def observe(self, task: str | None, used: FloatArray) -> None:
        """A prompt of `task` was read; `used` [layers, experts] is what its own routers chose."""
        self._occasions.observe(task, used, self._host.cache.slot_of >= 0)

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within, the plain model runs and use decides what stays; afterwards `begin` loads."""
        self._host.changes.active = False
        self._occasions.placed = None
        try:
            yield
        finally:
            self._host.changes.active = True

    def _change(self, running: Sequence[Running], key: list[Running]) -> None:
        cache, placed = self._host.cache, self._host.changes.books.there()
        # Not what the cache holds: that is the plain model's after `away`, and half a set after a
        # read that failed, in which a layer may have fewer experts than a token needs.
        stock = Stock(cache.slots, cache.top_k, self._there, placed)
        wanted = self._placement.place(stock, running, self._tables)
        self.bytes_read += self._host.arrival.place(wanted, self._occasions.popularity(running))
        self._occasions.placed = key

    def _name_unknown(self, running: Sequence[Running]) -> None:
        """Say once of each task that the profile does not know it."""
        if not self._placement.by_task:
            return
        for task in {request.task for request in running} - self._said - self._tables.names:
            self._said.add(task)
            what = "no task was given" if task is None else f"the profile has no task `{task}`"
            log.warning("%s: the popularity of all tasks together decides", what)
