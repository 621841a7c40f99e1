"""Every forecaster of a prompt's experts by its name."""

from collections.abc import Callable
from typing import Any

from retinue.errors import Refused, UsageError
from retinue.policy.base import Forecaster, Popularity
from retinue.policy.predict.own_prefill import OwnPrefill
from retinue.policy.predict.previous_prompt import PreviousPrompt
from retinue.policy.predict.running_mean import RunningMean
from retinue.policy.predict.task_popularity import TaskPopularity

_PLAIN: dict[str, Callable[[Popularity], Forecaster]] = {
    "popularity": TaskPopularity,
    "running-mean": RunningMean,
    "previous-prompt": PreviousPrompt,
    "own-prefill": OwnPrefill,
}
LEARNED = ("emoe-a", "emoe-l")
NAMES = (*_PLAIN, *LEARNED)


def forecaster(name: str, profile: Popularity, learned: Any | None) -> Forecaster:
    """A fresh forecaster called `name`; `learned` is what `retinue train-predictor` made, if any.

    Raises UsageError for an unknown name, Refused for a learned one without its weights.
    """
    if name in _PLAIN:
        return _PLAIN[name](profile)
    if name not in LEARNED:
        raise UsageError(f"unknown forecaster: `{name}`", hint=f"known: {', '.join(NAMES)}")
    raise Refused(
        f"the forecaster `{name}` is learned, and nothing has been learned for this model",
        hint="train it with `retinue train-predictor MODEL --data FILE`",
    )
