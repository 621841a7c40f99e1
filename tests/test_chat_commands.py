"""The commands of the chat, settings, thoughts that are hidden, and a context that fills up."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import models
from retinue import LLM
from retinue.cli.commands import COMMANDS, run
from retinue.cli.main import main
from retinue.cli.session import SETTINGS, Session, Thoughts
from retinue.engine.scheduler import Limits
from retinue.types import Output, SamplingParams, Stats
from test_conversation import NO_SYSTEM, PLAIN, THINKS, Characters

Captured = pytest.CaptureFixture[str]


class Parrot:
    """A model that answers what it is told to answer, a character at a time."""

    def __init__(
        self, template: str | None = PLAIN, context: int = 1000, piece: int | None = None
    ) -> None:
        self.tokenizer = Characters(template)
        limits = Limits(context, piece or 100, batch=1, whole_prompts=piece is not None)
        self.assembly = SimpleNamespace(engine=SimpleNamespace(limits=limits))
        self.answers: list[str] = []
        self.prompts: list[str] = []

    def stream(self, ids: list[int], params: SamplingParams, *, reuse: bool) -> Iterator[Output]:
        assert reuse
        self.prompts.append("".join(map(chr, ids)))
        text = self.answers.pop(0) if self.answers else "yes"
        for index, character in enumerate(text, 1):
            done = index == len(text)
            stats = Stats(decode_tokens_per_s=12.5, ttft_s=0.5) if done else Stats()
            reason: Any = "stop" if done else None
            yield Output(text[:index], [*range(index)], reason, len(ids), character, None, stats)

    def cancel(self) -> None:
        pass


@pytest.fixture(scope="module")
def sample() -> Iterator[LLM]:
    with models.open_llm("sample") as llm:
        yield llm


def new_session(model: Parrot | None = None, **settings: Any) -> Session:
    llm: Any = model or Parrot()
    assert isinstance(llm, (Parrot, LLM))
    return Session(llm, SamplingParams(**({"temperature": 0.5} | settings)))


def do(session: Session, *lines: str) -> None:
    for line in lines:
        if line.startswith("/"):
            run(session, line)
        else:
            session.say(line)


def prompts(session: Session) -> list[str]:
    model: Any = session.llm
    return list(model.prompts)


def test_help_has_a_line_for_each_command(capsys: Captured) -> None:
    do(new_session(), "/help")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(COMMANDS) + 2
    for name, command in COMMANDS.items():
        assert any(line.startswith(f"/{name} ") and command.help in line for line in lines)


@pytest.mark.parametrize(
    ("line", "guess"),
    [("/hlep", "/help"), ("/Clear", "/clear"), ("/sysem x", "/system"), ("/xyzzy", None)],
)
def test_unknown_commands(capsys: Captured, line: str, guess: str | None) -> None:
    session = new_session()
    do(session, "Hello", line)
    err = capsys.readouterr().err
    assert f"unknown command: `{line.split()[0]}`" in err
    assert ("did you mean" in err) == (guess is not None)
    assert guess is None or f"did you mean {guess}?" in err
    assert len(session.conversation.messages) == 2


def test_a_command_that_takes_nothing_refuses_more(capsys: Captured) -> None:
    session = new_session()
    do(session, "Hello", "/clear all")
    assert "/clear takes nothing" in capsys.readouterr().err
    assert len(session.conversation.messages) == 2


def test_system(capsys: Captured) -> None:
    session = new_session()
    do(session, "/system", "/system Be kind.", "Hello", "/clear", '/system ""', "Hello")
    assert prompts(session) == [
        "<system>Be kind.<user>Hello<assistant>",
        "<user>Hello<assistant>",
    ]
    err = capsys.readouterr().err
    assert err.count("there is no system prompt") == 2
    assert "system: Be kind." in err


def test_a_system_prompt_that_moves_is_said_once(capsys: Captured) -> None:
    session = new_session(Parrot(NO_SYSTEM))
    do(session, "/system Be kind.", "Hello", "And?")
    assert prompts(session)[0] == "<user>Be kind.\n\nHello<assistant>"
    assert capsys.readouterr().err.count("knows no system prompt") == 1


def test_retry_and_undo(capsys: Captured) -> None:
    session = new_session()
    do(session, "/retry", "/undo", "Hello", "And?", "/retry", "/undo", "/retry")
    assert prompts(session) == [
        "<user>Hello<assistant>",
        "<user>Hello<assistant>yes<user>And?<assistant>",
        "<user>Hello<assistant>yes<user>And?<assistant>",
        "<user>Hello<assistant>",
    ]
    err = capsys.readouterr().err
    assert err.count("nothing was asked yet") == 2
    assert "taken back: And?" in err
    assert "temperature 0" not in err
    session.set("temperature", "0")
    do(session, "/retry")
    assert "at temperature 0 the answer is the same" in capsys.readouterr().err


def test_a_retry_that_fails_keeps_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    session = new_session()
    do(session, "Hello")
    before = list(session.conversation.messages)
    session.llm.tokenizer.chat_template = "{{ raise_exception('no') }}"
    do(session, "/retry")
    assert session.conversation.messages == before


def test_save_clear_load(tmp_path: Path, capsys: Captured) -> None:
    file, session = tmp_path / "my chat.json", new_session()
    do(session, "/system Be kind.", "Hello", "/set seed 7", "/set stop END", f"/save {file}")
    said, params = list(session.conversation.messages), session.params
    do(session, "/clear", '/system ""', "/set seed off", "/set stop off", "/set top_k 3")
    assert session.params != params
    do(session, f'/load "{file}"', "And?")
    assert session.conversation.messages[:2] == said
    assert session.params == params
    assert prompts(session)[-1].startswith("<system>Be kind.<user>Hello<assistant>yes<user>And?")
    assert capsys.readouterr().err.count("error:") == 0
    do(session, f"/save {file}")
    assert "exists" in capsys.readouterr().err
    do(session, f"/save! {file}", f"/load {file}")
    assert len(session.conversation.messages) == 4


def test_a_file_with_settings_that_cannot_be(tmp_path: Path, capsys: Captured) -> None:
    file, session = tmp_path / "chat.json", new_session()
    do(session, "Hello", f"/save {file}")
    text = file.read_text()
    for wrong in ('"hot"', "-1", "true", "[1]"):
        file.write_text(text.replace('"temperature": 0.5', f'"temperature": {wrong}'))
        do(session, "/clear", "Hi", f"/load {file}")
        assert "error: temperature" in capsys.readouterr().err
        assert session.params.temperature == 0.5
        assert session.conversation.messages[0]["content"] == "Hi"


@pytest.mark.parametrize("line", ["/save", "/load", "/load nothing.json", "/save ~nobody/x"])
def test_files_that_cannot_be(capsys: Captured, line: str) -> None:
    do(new_session(), line)
    err = capsys.readouterr().err
    assert "error:" in err


def test_set(capsys: Captured) -> None:
    session = new_session()
    do(session, "/set temperature 0.7", "/set top-k=5", "/set max_new_tokens 9", "/set top_p 0.9")
    params = session.params
    assert (params.temperature, params.top_k, params.max_new_tokens) == (0.7, 5, 9)
    assert "top_p 0.9" in capsys.readouterr().err
    do(session, "/set")
    assert all(name in capsys.readouterr().err for name in [SETTINGS[0]])
    for wrong in ("temperature hot", "temperature -1", "top_k 1.5", "colour red", "temperature"):
        do(session, f"/set {wrong}")
        assert "error:" in capsys.readouterr().err, wrong
    assert session.params == params


def test_settings_are_sampling_parameters() -> None:
    assert set(SETTINGS) <= set(SamplingParams.__slots__)


def test_speed_on_request(capsys: Captured) -> None:
    session = new_session()
    do(session, "Hello")
    assert "tokens/s" not in capsys.readouterr().err
    do(session, "/speed on", "Hello")
    assert "(3 tokens, 12.5 tokens/s, first after 0.50 s)" in capsys.readouterr().err
    do(session, "/speed off", "Hello", "/speed maybe")
    err = capsys.readouterr().err
    assert "tokens/s" not in err
    assert "neither on nor off" in err


def test_exit() -> None:
    session = new_session()
    do(session, "/exit")
    assert session.leaving


# --- thoughts


@pytest.mark.parametrize(
    ("pieces", "inside", "shown"),
    [
        (["Hello"], False, "Hello"),
        (["<think>no</think>yes"], False, "yes"),
        (["<th", "ink>no", "</thi", "nk>\n\nyes"], False, "yes"),
        (list("a<think>b</think>c<think>d</think>e"), False, "ace"),
        (["no</think>", "yes"], True, "yes"),
        (["no end"], True, ""),
        (["a < b", " and <thin"], False, "a < b and <thin"),
        (["a<", "b"], False, "a<b"),
    ],
)
def test_thoughts_are_hidden(pieces: list[str], inside: bool, shown: str) -> None:
    thoughts = Thoughts(inside)
    text = "".join(thoughts.without(piece) for piece in pieces)
    assert text + thoughts.rest() == shown


def test_thoughts_of_a_template_that_opens_them(capsys: Captured) -> None:
    model = Parrot(THINKS)
    model.answers = ["hm</think>yes", "hm</think>no"]
    session = new_session(model)
    do(session, "Hello", "/thinking off", "And?")
    assert capsys.readouterr().out == "hm</think>yes\nno\n"
    # In the history they are whole, for the template to leave out.
    assert "<assistant><think>\nhm</think>yes<user>And?" in model.prompts[1]


# --- a context that fills up


def test_a_full_context_leaves_out_the_oldest_turns(capsys: Captured) -> None:
    session = new_session(Parrot(context=200), max_new_tokens=20)
    do(session, "/system Be kind.")
    for number in range(12):
        do(session, f"question {number}")
    err = capsys.readouterr().err
    assert "the context of 200 tokens is full: the oldest" in err
    # Not at every question: room is made for some at once.
    assert 2 <= err.count("is full") < 10
    for prompt in prompts(session):
        assert len(prompt) <= 180
        assert prompt.startswith("<system>Be kind.<user>question ")
    assert prompts(session)[-1].endswith("<user>question 11<assistant>")
    assert len(session.conversation.messages) == 24


def test_turns_are_left_out_where_a_prompt_must_be_one_piece(capsys: Captured) -> None:
    session = new_session(Parrot(context=1000, piece=200), max_new_tokens=20)
    for number in range(12):
        do(session, f"question {number}")
    err = capsys.readouterr().err
    assert "a prompt of this family has 200 tokens at most (`--chunk`): the oldest" in err
    assert "is full" not in err
    assert max(map(len, prompts(session))) <= 200
    assert prompts(session)[-1].endswith("<user>question 11<assistant>")


def test_a_question_that_is_too_long_costs_nothing(sample: LLM, capsys: Captured) -> None:
    session = Session(sample, SamplingParams(max_new_tokens=4))
    do(session, "Hello", "one two " * 2000)
    err = capsys.readouterr().err
    assert "error: the prompt has " in err
    assert "is full" not in err
    assert (len(session.conversation.messages), session.conversation.left_out) == (2, 0)


def test_system_is_for_a_chat_alone(capsys: Captured) -> None:
    assert main(["run", "sample", "Hello", "--system", "Be kind."]) == 2
    assert "only a chat has a --system" in capsys.readouterr().err
