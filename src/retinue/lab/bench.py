"""What measurements share: a model opened under any preset, its texts, a ledger of what is done.

Models are opened one after the other, never two at once. A stop is noticed between two texts and
in the middle of a pass; what was finished before stays in the ledger.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from retinue.config import Config
from retinue.engine.llm import LLM
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled, Refused
from retinue.lab.base import Row
from retinue.lab.ledger import Ledger
from retinue.policy.presets import preset
from retinue.types import Facts


@dataclass(kw_only=True)
class Bench:
    """One model with its texts. `say` hears of progress, a line at a time."""

    model: str
    folder: Path
    facts: Facts
    config: Config
    texts: Sequence[TaskIds]
    ledger: Ledger
    say: Callable[[str], None]
    stop: Event = field(default_factory=Event)
    _open: LLM | None = None

    def interrupt(self) -> None:
        """Stop as soon as the running layer allows. From any thread or a signal."""
        self.stop.set()
        if self._open is not None:
            self._open.cancel()

    def once(self, experiment: str, key: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows of one cell: those of the ledger, or what `measure` gives, which is kept.

        None where the model cannot be run that way: a small share may be less than one token needs,
        a predictor may have to be trained. The ledger keeps the reason; another run tries again.
        """
        entry = self.ledger.entry(experiment)
        if key not in entry.cells:
            self.check()
            started = time.perf_counter()
            try:
                entry.cells[key] = measure()
                entry.left_out.pop(key, None)
                self.say(f"{experiment}: {key} ({time.perf_counter() - started:.1f} s)")
            except Refused as error:
                entry.left_out[key] = str(error)
                self.say(f"{experiment}: {key} is left out: {error}")
            self.ledger.keep(experiment)
        return entry.cells.get(key, [])

    def check(self) -> None:
        """Raise Cancelled once somebody wants to stop."""
        if self.stop.is_set():
            raise Cancelled("stopped")

    @contextmanager
    def opened(self, **settings: Any) -> Iterator[LLM]:
        """The model under the bench's configuration with some `settings` of `Config` changed.

        The profile is left out where the preset reads none. One at a time: another one would take
        memory, and the time of what is measured.
        """
        assert self._open is None, "a model is open already"
        config = replace(self.config, **settings)
        if not preset(config.preset).profiled:
            config = replace(config, profile=None)
        with LLM.from_config(self.folder, config) as llm:
            self._open = self.watched(llm)
            try:
                yield llm
            finally:
                self._open = None

    def watched(self, llm: LLM) -> LLM:
        """The same model, whose passes end when somebody wants to stop."""
        llm.assembly.host.stop = self.stop.is_set
        return llm

    @cached_property
    def tasks(self) -> list[str]:
        """Those of the texts, in order of appearance."""
        return list(dict.fromkeys(text.task for text in self.texts))
