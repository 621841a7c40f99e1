"""What experiments measure with: a model opened under any preset, the texts, the plain model's
word on them, and a ledger of what is done already.

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
from retinue.engine.evaluate import score_plain
from retinue.engine.llm import LLM
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled, Refused
from retinue.model.scoring import Scored
from retinue.policy.presets import preset
from retinue.reproduce.base import Row
from retinue.reproduce.ledger import Ledger
from retinue.reproduce.similarity import Embed, embedder
from retinue.types import Facts, SamplingParams


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured: texts of each task, answers among them, and their length in tokens."""

    shares: tuple[int, ...]  # percent of the experts that may be resident
    texts_per_task: int
    answers_per_task: int
    answer_tokens: int
    repeats: int  # of what is timed
    live_requests: int  # that arrive in real time
    quick: bool = False


FULL = Settings((20, 40, 60, 80), 7, 1, 32, 2, 64)
QUICK = Settings((20, 40), 1, 1, 12, 1, 0, quick=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt: `seconds` from the prompt to the last of `tokens` tokens."""

    text: str
    seconds: float
    tokens: int


@dataclass
class Workbench:
    """One model with its texts. `say` hears of progress, a line at a time."""

    model: str
    folder: Path
    facts: Facts
    config: Config
    texts: Sequence[TaskIds]
    settings: Settings
    ledger: Ledger
    say: Callable[[str], None]
    stop: Event = field(default_factory=Event)

    def once(self, experiment: str, key: str, measure: Callable[[], list[Row]]) -> list[Row]:
        """The rows of one cell: those of the ledger, or what `measure` gives, which is kept.

        None where the model cannot be run that way: a small share may be less than one token needs,
        a forecaster may have to be trained. The ledger keeps the reason; another run tries again.
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

        The profile is left out where the preset reads none.
        """
        config = replace(self.config, **settings)
        if not preset(config.preset).profiled:
            config = replace(config, profile=None)
        with LLM.from_config(self.folder, config) as llm:
            self.watched(llm)
            yield llm

    def watched(self, llm: LLM) -> LLM:
        """The same model, whose passes end when somebody wants to stop."""
        llm.assembly.host.stop = self.stop.is_set
        return llm

    @cached_property
    def embed(self) -> Embed | None:
        """What compares the meaning of answers, where its package is installed."""
        return embedder()

    @cached_property
    def tasks(self) -> list[str]:
        """Those of the texts, in order of appearance."""
        return list(dict.fromkeys(text.task for text in self.texts))

    @cached_property
    def asked(self) -> list[TaskIds]:
        """The texts whose prompts are answered: the first ones of each task."""
        chosen: dict[str, int] = {}
        found = []
        for text in self.texts:
            chosen[text.task] = chosen.get(text.task, 0) + 1
            if chosen[text.task] <= self.settings.answers_per_task:
                found.append(text)
        return found

    @cached_property
    def plain(self) -> list[Scored]:
        """What the plain model, with every expert at hand, says of the texts."""
        return self._plain[0]

    @cached_property
    def plain_answers(self) -> list[Answer]:
        """Its answers to `asked`."""
        return self._plain[1]

    @cached_property
    def _plain(self) -> tuple[list[Scored], list[Answer]]:
        self.say("the plain model reads the texts")
        with self.opened(preset="auto", experts="100%") as llm:
            llm.fill()
            return score_plain(llm.assembly, self.texts, lambda: None), self.answers(llm)

    def answers(self, llm: LLM) -> list[Answer]:
        """Greedy answers to the prompts of `asked`, one after the other."""
        params = SamplingParams(max_new_tokens=self.settings.answer_tokens)
        found = []
        for text in self.asked:
            self.check()
            prompt = text.ids[: -text.scored]
            (output,) = llm.generate([prompt], params, progress=False, task=text.task)
            seconds = output.stats.prefill_s + output.stats.decode_s
            found.append(Answer(output.text, seconds, len(output.token_ids)))
        self.watched(llm)  # `generate` has taken the stop away
        return found
