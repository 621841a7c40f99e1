"""Every forecaster of a prompt's experts by its name."""

from collections.abc import Callable

from retinue.errors import Refused, UsageError
from retinue.policy.base import Forecaster, Popularity
from retinue.policy.predict.emoe_all import EmoeAll
from retinue.policy.predict.emoe_layerwise import EmoeLayerwise
from retinue.policy.predict.learned import Learned
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
_LEARNED: dict[str, Callable[[Popularity, Learned], Forecaster]] = {
    "emoe-a": EmoeAll,
    "emoe-l": EmoeLayerwise,
}
LEARNED = tuple(_LEARNED)
NAMES = (*_PLAIN, *LEARNED)


def forecaster(name: str, profile: Popularity, learned: Learned | None) -> Forecaster:
    """A fresh forecaster called `name`; `learned` is what `retinue train-predictor` made, if any.

    Raises UsageError for an unknown name, Refused for a learned one without its network.
    """
    if name in _PLAIN:
        return _PLAIN[name](profile)
    if name not in _LEARNED:
        raise UsageError(f"unknown forecaster: `{name}`", hint=f"known: {', '.join(NAMES)}")
    if learned is None or name not in learned.networks:
        raise Refused(
            f"the forecaster `{name}` has to be trained, which nobody did for this model",
            hint=f"`retinue train-predictor MODEL --data FILE --kind {name}`",
        )
    return _LEARNED[name](profile, learned)
