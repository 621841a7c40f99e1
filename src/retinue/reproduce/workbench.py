"""What experiments measure with: a bench, how much is asked of it, the plain model's word."""

from dataclasses import dataclass
from functools import cached_property

from retinue.engine.evaluate import score_plain
from retinue.engine.llm import LLM
from retinue.engine.tasks import TaskIds
from retinue.lab.bench import Bench
from retinue.model.scoring import Scored
from retinue.reproduce.similarity import Embed, embedder
from retinue.types import SamplingParams


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


FULL = Settings((20, 40, 60, 80), 7, 1, 32, 3, 64)  # of three repeats one may be slow
QUICK = Settings((20, 40), 1, 1, 12, 1, 0, quick=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one prompt: `seconds` from the prompt to the last of `tokens` tokens."""

    text: str
    seconds: float
    tokens: int


@dataclass(kw_only=True)
class Workbench(Bench):
    """A bench for the experiments of a paper."""

    settings: Settings

    @cached_property
    def embed(self) -> Embed | None:
        """What compares the meaning of answers, where its package is installed."""
        return embedder()

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
