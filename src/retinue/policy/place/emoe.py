"""Task-aware loading: the experts that the tokens to come will need most, by task and layer.

eMoE (arXiv 2503.06823, section 4.2). For the requests that run and those newly scheduled, with
task `t`, layer `l` and expert `i`:

    N[t][l][i] = (sum of W_j over the T requests of t  +  T * W_o) * s[t][l] * f[t][l][i]

W_j are the tokens of a prompt, W_o the mean answer of the task in the profile, s whether the task
is sensitive to wrong routing in the layer, f the forecast share of the layer's routing weight. In
each layer the experts with the highest sum over the tasks stay.

Deviations: a layer in which all scores are 0 keeps its set, since the paper's rule would choose at
random; where a layer has none yet, popularity over all tasks decides. An answer is expected to be
no longer than the request allows. Of equal scores, what is resident stays.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from retinue.policy.base import BoolArray, Known, Running, Stock
from retinue.policy.place.even import even_split

Scores = npt.NDArray[np.float64]  # [layers, experts]
Split = Callable[[Scores, Stock], BoolArray]


class Emoe:
    """The paper's score; `split` chooses by it which experts stay.

    `weigh` multiplies it by what wrong routing does to the layer and for the expert, as far as the
    profile knows that (`policy/place/damage.py`), which the paper does not.

    `worth`: an expert takes another one's place only if it serves so much more routing weight of
    the requests that run. A token's routing weight in a layer is 1, so that 1 asks of each read
    to save a whole token of a layer. 0 is the paper's rule.
    """

    fixed = True
    needs_profile = True
    by_task = True
    periodic = True

    def __init__(
        self, split: Split = even_split, *, weigh: bool = False, worth: float = 0.0
    ) -> None:
        self._split, self._weigh, self._worth = split, weigh, worth

    def place(self, stock: Stock, running: Sequence[Running], known: Known) -> BoolArray:
        """The set for the requests that run; without any, by popularity over all tasks."""
        scores = needs(running, known, stock.there.shape)
        nothing = np.asarray(~scores.astype(bool).any(axis=1))
        hollow = nothing.any()
        if hollow:
            scores[nothing] = known.shares(None)[nothing]
        if self._weigh:
            scores *= known.damage()
        if self._worth:
            scores += self._worth * stock.resident
        if not hollow:
            return self._split(scores, stock)
        kept: BoolArray = nothing & stock.resident.any(axis=1)
        wanted = stock.resident & kept[:, None]
        rest = replace(
            stock,
            slots=stock.slots - int(wanted.sum()),
            there=stock.there & ~kept[:, None],
        )
        return wanted | self._split(scores, rest)


def needs(running: Sequence[Running], known: Known, shape: tuple[int, ...]) -> Scores:
    """N summed over the tasks: the routing weight that their tokens will lay on each expert.

    shape: (layers, experts).
    """
    total = np.zeros(shape)
    for task in dict.fromkeys(request.task for request in running):
        own = [request for request in running if request.task == task]
        tokens = sum(request.prompt_tokens + _answer(request, known) for request in own)
        total += tokens * known.sensitive(task)[:, None] * known.shares(task)
    return total


def _answer(request: Running, known: Known) -> float:
    """How long the answer is expected to be, in tokens."""
    mean = known.answer_tokens(request.task)
    limit = request.answer_tokens
    return min(mean, limit) if mean and limit else mean or limit
