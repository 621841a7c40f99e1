"""The chat with a real terminal: keys, signals, history, pipes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command import MEMORY, environment
from screen import Screen

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo terminal")

OPTIONS = ("run", "sample", "--no-self-check", *MEMORY)
LONG = (*OPTIONS, "--ignore-eos", "--max-new-tokens", "1500")
SHORT = (*OPTIONS, "--max-new-tokens", "4")
UP = "\x1b[A"


def test_a_chat_in_a_terminal(tmp_path: Path) -> None:
    file = tmp_path / "chat.json"
    with Screen(*LONG, XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("> ")
        screen.interrupt()
        screen.wait_for("> ")
        screen.type("Hello there!\n")
        screen.wait_for_some("there!\r\n", 20)
        screen.interrupt()
        assert "Traceback" not in screen.wait_for("(stopped)")
        screen.wait_for("\n> ")
        screen.type("/stats\n")
        screen.wait_for("hit rate")
        screen.type(f"/save {file}\n")
        screen.wait_for("2 messages are in")
        screen.wait_for("\n> ")
        assert screen.leave() == 0
    assert "Hello there!" in file.read_text()
    history = tmp_path / "retinue" / "chat-history"
    assert history.read_text().splitlines() == ["Hello there!", "/stats", f"/save {file}"]
    assert history.stat().st_mode & 0o777 == 0o600


def test_the_history_of_an_earlier_chat_and_a_block(tmp_path: Path) -> None:
    history = tmp_path / "retinue" / "chat-history"
    history.parent.mkdir()
    history.write_text("/system You are a pirate.\n")
    with Screen(*SHORT, TERM="xterm", XDG_STATE_HOME=str(tmp_path)) as screen:
        screen.wait_for("> ")
        screen.type(UP)
        screen.wait_for("pirate.")
        screen.type("\n")
        screen.wait_for("system: You are a pirate.")
        screen.wait_for("\n> ")
        screen.type('"""one\n')
        screen.wait_for("... ")
        screen.type('two"""\n')
        screen.wait_for("(the answer was cut")
        screen.wait_for("\n> ")
        screen.type("/undo\n")
        screen.wait_for("taken back: one\r\ntwo")
        screen.interrupt()
        screen.interrupt()
        assert screen.close() == 0


def test_what_is_said_into_a_pipe_is_the_answers_alone(tmp_path: Path) -> None:
    """Questions come from a terminal, answers go to a file."""
    main_side, other = os.openpty()
    answers = tmp_path / "answers"
    with (
        answers.open("wb") as out,
        subprocess.Popen(
            [sys.executable, "-m", "retinue", *SHORT],
            stdin=other,
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment(XDG_STATE_HOME=str(tmp_path)),
        ) as process,
    ):
        os.write(main_side, b"Hello there!\n/help\n/exit\n")
        _, err = process.communicate(timeout=120)
    os.close(main_side)
    os.close(other)
    assert process.returncode == 0
    text = answers.read_text()
    assert text.strip()
    assert "> " not in text
    assert "/help" not in text
    assert b"> " in err
    assert b"take back" in err
