"""Signals end the answer, not the program in the middle of a layer."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cancel_on(cancel: Callable[[], None], *signals: signal.Signals) -> Iterator[list[int]]:
    """While the block runs, the first of `signals` calls `cancel`, a second one raises.

    Yields the list of signals that came. Does nothing outside the main thread.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        cancel()

    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
