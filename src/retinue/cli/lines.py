"""What a person types: lines, blocks of several lines, and the history across sessions."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

PROMPT = "> "
CONTINUED = "... "
QUOTES = '"""'
HISTORY_LINES = 1000

Ask = Callable[[str], str]


def ask_line(prompt: str) -> str:
    """One line of input. The prompt never goes into a pipe, and has no colours: readline would
    count their bytes as columns, and wrap too early."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def ask_message(ask: Ask = ask_line) -> str | None:
    """A line, a block between triple quotes, or lines joined by backslashes; None at the end.

    ctrl-C clears what was typed; twice in a row is the end, as ctrl-D is.
    """
    for _ in range(2):
        try:
            return _message(ask)
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
    return None


def _message(ask: Ask) -> str:
    line = ask(PROMPT)
    if line.lstrip().startswith(QUOTES):
        return _block(ask, line.lstrip().removeprefix(QUOTES))
    lines = [line]
    while _goes_on(lines[-1]):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(ask(CONTINUED))
        except EOFError:
            break
    return "\n".join(lines)


def _block(ask: Ask, line: str) -> str:
    lines = []
    while not line.rstrip().endswith(QUOTES):
        lines.append(line)
        try:
            line = ask(CONTINUED)
        except EOFError:
            break
    else:
        lines.append(line.rstrip().removesuffix(QUOTES))
    return "\n".join(lines).strip("\n")


def _goes_on(line: str) -> bool:
    """Whether the line ends with a backslash that is not itself escaped."""
    return (len(line) - len(line.rstrip("\\"))) % 2 == 1


def history_file() -> Path:
    """Where the lines of earlier chats are kept, in the user's folder for such state."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "retinue" / "chat-history"


class History:
    """Line editing with the lines of earlier sessions; does nothing where nobody types.

    The file is readable by its owner alone and holds the last HISTORY_LINES lines. A place that
    cannot be written costs the history, not the chat.
    """

    def __init__(self) -> None:
        self._readline = _editing()
        self._known = 0
        if self._readline is not None:
            self._readline.set_history_length(HISTORY_LINES)
            self._readline.clear_history()
            with suppress(OSError):
                self._readline.read_history_file(history_file())
            self._known = self._readline.get_current_history_length()

    def keep(self) -> None:
        """Append what was typed since the last call."""
        if self._readline is None:
            return
        new = self._readline.get_current_history_length() - self._known
        if new > 0:
            self._known += new
            with suppress(OSError, AttributeError):  # editline cannot append
                file = history_file()
                file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
                file.chmod(0o600)
                self._readline.append_history_file(new, file)


def _editing() -> ModuleType | None:
    """The module that gives `input` its keys, where both sides are a terminal."""
    if not (sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()):
        return None
    with suppress(ImportError):
        import readline

        return readline
    return None
