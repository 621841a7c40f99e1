"""The kind of work that a request is, from its prompt, where nobody said it.

eMoE (arXiv 2503.06823, section 4.1) counts keywords; beside it stands a classifier that is learnt
from the token ids of the profile's texts, which does better and is the default.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from retinue.config import CLASSIFIERS
from retinue.errors import UsageError
from retinue.policy.classify.keywords import Keywords
from retinue.policy.classify.learned import Learned
from retinue.policy.profile import Profile

Decode = Callable[[Sequence[int]], str]


class Classifier(Protocol):
    """Which task of the profile a prompt belongs to."""

    def classify(self, text: str, ids: Sequence[int]) -> str | None:
        """The task of the prompt `text`, whose tokens are `ids`; None where it is unknown.

        An unknown task is served as the most sensitive one. `text` is empty where the prompt was
        given as ids.
        """
        ...


class NoClassifier:
    """Every task is unknown."""

    def classify(self, text: str, ids: Sequence[int]) -> None:
        """Nothing."""


def classifier(name: str, profile: Profile | None, decode: Decode | None = None) -> Classifier:
    """The classifier called `name`, one of `config.CLASSIFIERS`, for the tasks of `profile`.

    decode: ids to text, which `keywords` needs; None where the model has no tokenizer. Without a
    profile, or without words in it, every task is unknown.

    Raises UsageError for an unknown name, and for `keywords` without a tokenizer.
    """
    if name not in CLASSIFIERS:
        raise UsageError(f"unknown classifier: `{name}`", hint=f"known: {', '.join(CLASSIFIERS)}")
    tasks = profile.tasks if profile is not None else {}
    words = {task: counts.words for task, counts in tasks.items() if counts.words}
    if name == "none" or not words:
        return NoClassifier()
    if name == "learned":
        return Learned(words)
    if decode is None:
        raise UsageError(
            "keywords are counted in texts, and the checkpoint has no tokenizer",
            hint="infer the task with `learned`, which reads token ids",
        )
    return Keywords(words, decode)
