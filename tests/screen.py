"""A process with a terminal of its own, and a person who types into it."""

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from typing import Self

from command import environment

PATIENCE_S = 120  # other tests run beside it


class Screen:
    """`python -m retinue ARGUMENTS` in a terminal, to be used in a `with`."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        import pty

        self._side, other = pty.openpty()
        # The terminal has to control the process, or ctrl-C is no signal.
        code = (
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
            "os.execv(sys.executable, [sys.executable, '-m', 'retinue', *sys.argv[1:]])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env=environment(**({"TERM": "dumb"} | variables)),
        )
        os.close(other)
        self.shown = ""

    def type(self, text: str) -> None:
        self.shown = ""
        os.write(self._side, text.encode())

    def interrupt(self) -> None:
        time.sleep(0.5)  # as a person would: the prompt is there before Python waits for keys
        self.type("\x03")

    def leave(self) -> int:
        """ctrl-D, again until it ends: one that is there before Python waits for keys is lost."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            self.type("\x04")
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
        return self.close()

    def wait_for(self, text: str) -> str:
        """Everything that was shown since the last key, up to `text`."""
        deadline = time.monotonic() + 60
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self._read()
        return self.shown

    def _read(self) -> None:
        if select.select([self._side], [], [], 0.5)[0]:
            with suppress(OSError):  # the other side is closed
                self.shown += os.read(self._side, 4096).decode(errors="replace")

    def wait_for_some(self, text: str, count: int) -> None:
        """`text`, and at least `count` characters after it."""
        self.wait_for(text)
        while len(self.shown.partition(text)[2]) < count:
            self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def close(self) -> int:
        code = self.process.wait(PATIENCE_S)
        os.close(self._side)
        return code
