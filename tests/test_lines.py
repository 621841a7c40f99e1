"""What a person types: lines, blocks, continuations, ctrl-C, and a history that costs no chat."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from command import Terminal
from retinue.cli.lines import CONTINUED, PROMPT, History, ask_line, ask_message, history_file

Line = str | type[BaseException]


def typist(*lines: Line) -> tuple[Callable[[str], str], list[str]]:
    """A person who types `lines`, and the prompts that were shown."""
    script, prompts = iter(lines), list[str]()

    def ask(prompt: str) -> str:
        prompts.append(prompt)
        line = next(script, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return ask, prompts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["Hello"], "Hello"),
        ([""], ""),
        (["  two  "], "  two  "),
        (["one\\", "two"], "one\ntwo"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (["a path C:\\\\"], "a path C:\\\\"),
        (["one\\"], "one"),
        (['"""', "one", "", "two", '"""'], "one\n\ntwo"),
        (['"""one', 'two"""'], "one\ntwo"),
        (['"""one"""'], "one"),
        (['  """', "  indented", '"""'], "  indented"),
        (['"""', "/help", '"""'], "/help"),
        (['"""', "one\\", '"""'], "one\\"),
        (['"""', "one"], "one"),
        (['"""', '"""'], ""),
        (['say """ twice'], 'say """ twice'),
        ([KeyboardInterrupt, "Hello"], "Hello"),
        (["one\\", KeyboardInterrupt, "Hello"], "Hello"),
        (['"""', "one", KeyboardInterrupt, "Hello"], "Hello"),
        ([KeyboardInterrupt, KeyboardInterrupt], None),
        ([KeyboardInterrupt, EOFError], None),
        ([EOFError], None),
    ],
)
def test_messages(lines: list[Line], message: str | None) -> None:
    ask, _ = typist(*lines)
    assert ask_message(ask) == message


def test_prompts_say_that_a_text_goes_on() -> None:
    ask, prompts = typist('"""', "one", '"""')
    ask_message(ask)
    assert prompts == [PROMPT, CONTINUED, CONTINUED]


def test_the_prompt_goes_where_a_person_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": seen.append(prompt) or "x")
    ask_line(PROMPT)
    assert capsys.readouterr() == ("", PROMPT)
    monkeypatch.setattr(sys, "stdout", Terminal())
    ask_line(PROMPT)
    assert seen == ["", PROMPT]


# --- history


class Lines:
    """readline, as far as the history needs it."""

    def __init__(self) -> None:
        self.lines, self.length = list[str](), -1

    def set_history_length(self, length: int) -> None:
        self.length = length

    def clear_history(self) -> None:
        self.lines.clear()

    def read_history_file(self, file: Path) -> None:
        self.lines += file.read_text().splitlines()

    def get_current_history_length(self) -> int:
        return len(self.lines)

    def append_history_file(self, count: int, file: Path) -> None:
        with file.open("a") as handle:
            handle.writelines(f"{line}\n" for line in self.lines[-count:])


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lines:
    found = Lines()
    monkeypatch.setattr("retinue.cli.lines._editing", lambda: found)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return found


def test_history_is_kept_across_sessions_and_shared(lines: Lines) -> None:
    first = History()
    lines.lines.append("one")
    first.keep()
    first.keep()
    history_file().write_text(history_file().read_text() + "of another chat\n")
    lines.lines.append("two")
    first.keep()
    assert history_file().read_text().split("\n") == ["one", "of another chat", "two", ""]
    assert history_file().stat().st_mode & 0o777 == 0o600
    assert lines.length == 1000
    History()
    assert lines.lines == ["one", "of another chat", "two"]


def test_history_in_a_place_that_cannot_be_written(lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder should be")
    history = History()
    lines.lines.append("one")
    history.keep()


def test_no_history_without_a_terminal() -> None:
    History().keep()
    assert not history_file().exists()
