"""Scores texts as a server would run them: the prompt, then the continuation token by token.

For presets whose policies look at what is resident, at tokens or at phases: what they do in one
pass over a whole text is not what they do when they serve. Slow and right: each text is a request
of its own, which is fed the continuation whatever the model would have said.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from retinue.engine.assembly import Assembly
from retinue.engine.request import Request, new_request
from retinue.engine.tasks import TaskIds
from retinue.errors import Cancelled
from retinue.memory.placing import place
from retinue.model.scoring import Scored
from retinue.types import SamplingParams


def run_forced(assembly: Assembly, text: TaskIds) -> Request:
    """The request of `text`, done; its costs and usage are those of prompt and continuation.

    Raises Cancelled when the host's `stop` says so, NotFinite, or the error of a read.
    """
    engine, host = assembly.engine, assembly.host
    stop, forced = host.stop, text.ids[-text.scored :]
    params = SamplingParams(max_new_tokens=len(forced), ignore_eos=True, logprobs=1)
    prompt = text.ids[: -text.scored]
    request = new_request(prompt, params, None, forced=forced, task=text.task)
    engine.add(request)
    try:
        while engine.busy:
            if stop():
                engine.cancel(request)
            engine.step()
    finally:
        host.stop = stop  # each pass has its own
    if request.error is not None:
        raise request.error
    if request.cancelled.is_set():
        raise Cancelled("the request was cancelled")
    return request


def scored_of(request: Request) -> Scored:
    """How likely each forced token was, and which one the model would have chosen."""
    nll = np.array([-each.logprob for each in request.logprobs], dtype=np.float32)
    best = np.array([each.top[0][0] for each in request.logprobs], dtype=np.int64)
    return Scored(nll, best)


@contextmanager
def plain(assembly: Assembly) -> Iterator[None]:
    """Within, approximate policies change nothing; afterwards they begin with an empty memory."""
    changes, cache = assembly.host.changes, assembly.cache
    changes.active = False
    try:
        yield
    finally:
        changes.active = True
        place(cache, np.zeros_like(cache.ready))


def score_forced(
    assembly: Assembly, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> list[Scored]:
    """The plain model's scores of `texts`, token by token."""
    found = []
    with plain(assembly):
        for text in texts:
            found.append(scored_of(run_forced(assembly, text)))
            advance()
    return found
