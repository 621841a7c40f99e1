"""The peak memory of one load, in a process of its own: peaks of earlier loads do not count."""

import multiprocessing
import random
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Event

from retinue.config import Config
from retinue.errors import Cancelled, RetinueError

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Load:
    """`batch` random prompts of `tokens` tokens at once, one new token each."""

    model: str
    config: Config
    tokens: int
    batch: int


def measure_peak(load: Load, stop: Event) -> int:
    """Peak resident bytes of a new process that does `load`.

    Raises Cancelled when `stop` is set, and RetinueError with what went wrong there.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        while not ours.poll(POLL_S):
            if stop.is_set():
                raise Cancelled("stopped")
        found = ours.recv()
        process.join()
    except EOFError as error:
        raise RetinueError("a process that measured memory has died") from error
    finally:
        process.terminate()
        process.join()
    if isinstance(found, str):
        raise RetinueError(found)
    return int(found)


def _work(load: Load, answer: Connection) -> None:
    # The terminal sends its interrupts to all: who started this process decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an end that cleans up
    try:
        answer.send(_peak(load))
    except RetinueError as error:
        answer.send(str(error))


def _peak(load: Load) -> int:
    from retinue.engine.llm import LLM
    from retinue.memory.machine import resident_bytes
    from retinue.memory.process import prepare
    from retinue.types import SamplingParams

    prepare()
    with LLM.from_config(load.model, load.config) as llm:
        llm.fill()
        ids = random.Random(0)
        vocabulary = llm.assembly.facts.vocab_size
        prompts = [
            [ids.randrange(vocabulary) for _ in range(load.tokens)] for _ in range(load.batch)
        ]
        llm.generate(prompts, SamplingParams(max_new_tokens=1), progress=False, reuse=False)
        return resident_bytes(peak=True)
