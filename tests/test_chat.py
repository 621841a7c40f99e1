"""The chat: turns, history, commands, ctrl-C, errors; once with a real terminal."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import models
from command import ESCAPE, MEMORY
from retinue import LLM, Output, SamplingParams
from retinue.cli.chat import GREETING, chat
from retinue.cli.main import main
from retinue.errors import ReadError, UsageError
from retinue.types import BLOCK_TOKENS

PARAMS = SamplingParams(max_new_tokens=6, ignore_eos=True)
Line = str | type[BaseException]


@pytest.fixture(scope="module")
def sample() -> Iterator[LLM]:
    with models.open_llm("sample") as llm:
        yield llm


class Session:
    """A chat whose lines are given beforehand; `outputs` are the answers, whole."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llm, self.outputs, self.prompts = llm, list[Output](), list[list[int]]()
        self.interrupt_at, self.interrupt_at_once = 0, False
        self._stream = llm.stream
        self._patch = monkeypatch
        monkeypatch.setattr(llm, "stream", self._recorded)

    def talk(self, *lines: Line, params: SamplingParams = PARAMS) -> int:
        """The exit code of a chat with these lines; an exception class is raised instead."""
        script = iter(lines)

        def ask(prompt: str = "") -> str:
            line = next(script, EOFError)
            if isinstance(line, str):
                return line
            raise line

        self._patch.setattr("builtins.input", ask)
        code = chat(self.llm, params)
        assert next(script, None) is None, "the chat ended early"
        return code

    def _recorded(self, prompt: list[int], *rest: Any, **options: Any) -> Iterator[Output]:
        self.prompts.append(prompt)
        if self.interrupt_at_once:
            self.interrupt_at_once = False
            signal.raise_signal(signal.SIGINT)
            return
        for output in self._stream(prompt, *rest, **options):
            yield output
            if self.interrupt_at and len(output.token_ids) >= self.interrupt_at:
                self.interrupt_at = 0
                signal.raise_signal(signal.SIGINT)
        self.outputs.append(output)


@pytest.fixture
def session(sample: LLM, monkeypatch: pytest.MonkeyPatch) -> Session:
    return Session(sample, monkeypatch)


Captured = pytest.CaptureFixture[str]


def test_a_turn(session: Session, capsys: Captured) -> None:
    assert session.talk("Hello there!") == 0
    out, err = capsys.readouterr()
    (output,) = session.outputs
    assert out == output.text + "\n"
    assert len(output.token_ids) == 6
    assert GREETING in err
    assert "(the answer was cut" in err
    assert session.llm.tokenizer.decode(session.prompts[0]) == "A: Hello there!\nB:"
    assert ESCAPE not in out + err


def test_an_answer_that_ends_by_itself_is_not_called_cut(
    session: Session, capsys: Captured
) -> None:
    session.talk("Hello", params=models.greedy(20))
    stop = session.outputs[0].text[:5]
    session.talk("Hello", params=models.greedy(20, stop=stop))
    assert session.outputs[1].finish_reason == "stop"
    assert capsys.readouterr().err.count("(the answer was cut") == 1


def test_the_second_turn_knows_the_first_and_reuses_it(session: Session) -> None:
    question = "Hello there! I would like to know how you are today, and what you think of trees."
    session.talk(question, "How are you?")
    first, second = session.outputs
    text = session.llm.tokenizer.decode(session.prompts[1])
    assert text == f"A: {question}\nB: {first.text.strip()}\nA: How are you?\nB:"
    whole_blocks = first.prompt_tokens // BLOCK_TOKENS * BLOCK_TOKENS
    assert second.stats.reused_tokens >= whole_blocks > 0
    assert second.stats.prefill_tokens_per_s > 0


def test_clear_forgets(session: Session, capsys: Captured) -> None:
    session.talk("Hello there!", " /clear ", "Hello there!")
    assert session.prompts[0] == session.prompts[1]
    assert session.outputs[0].token_ids == session.outputs[1].token_ids
    assert "the conversation is forgotten" in capsys.readouterr().err


def test_stats_of_the_last_answer(session: Session, capsys: Captured) -> None:
    session.talk("/stats", "Hello", "/stats")
    before, after = capsys.readouterr().err.split("(the answer was cut")
    assert "nothing was said yet" in before
    assert "6 tokens, " in after
    assert "hit rate" in after


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit(session: Session, command: str) -> None:
    assert session.talk(command) == 0


def test_empty_lines_ask_nothing(session: Session) -> None:
    assert session.talk("", "   ") == 0
    assert session.prompts == []


def test_interrupt_at_the_prompt_asks_again(session: Session) -> None:
    assert session.talk(KeyboardInterrupt, "Hello", KeyboardInterrupt, "Hello") == 0
    assert len(session.outputs) == 2


def test_interrupt_twice_leaves(session: Session) -> None:
    assert session.talk("Hello", KeyboardInterrupt, KeyboardInterrupt) == 0


def test_interrupt_before_the_first_word_forgets_the_question(
    session: Session, capsys: Captured
) -> None:
    session.interrupt_at_once = True
    assert session.talk("Hello there!", "Hello") == 0
    assert "the question is forgotten" in capsys.readouterr().err
    assert session.llm.tokenizer.decode(session.prompts[-1]) == "A: Hello\nB:"


def test_interrupt_of_an_answer_keeps_what_was_said(session: Session, capsys: Captured) -> None:
    session.interrupt_at = 4
    question = "Hello there! How are you today, and what do you think of old trees?"
    assert session.talk(question, "And?", params=models.greedy(60)) == 0
    first, second = session.outputs
    assert first.finish_reason == "cancelled"
    assert 4 <= len(first.token_ids) < 60
    assert "(stopped)" in capsys.readouterr().err
    assert first.text.strip() in session.llm.tokenizer.decode(session.prompts[1])
    assert second.finish_reason == "length"
    assert second.stats.reused_tokens > 0


def test_an_error_in_a_turn_does_not_end_the_chat(
    session: Session, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = session.llm.assembly.engine._runner
    run = type(runner).run

    def broken(*arguments: Any) -> Any:
        monkeypatch.setattr(type(runner), "run", run)
        raise ReadError("cannot read `model`", hint="check the disk")

    monkeypatch.setattr(type(runner), "run", broken)
    assert session.talk("Hello", "Hello") == 0
    err = capsys.readouterr().err
    assert "error: cannot read `model`\n\nhint: check the disk" in err
    # The question without an answer is no part of the history.
    assert session.prompts[0] == session.prompts[1]
    assert len(session.outputs[0].token_ids) == 6


def test_a_question_longer_than_the_context(session: Session, capsys: Captured) -> None:
    assert session.talk("one two " * 2000, "Hello") == 0
    assert "error: the prompt has " in capsys.readouterr().err
    assert len(session.outputs) == 1


# --- templates


def test_without_a_template_the_text_is_continued(
    session: Session, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = session.llm.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", None)
    session.talk("Once upon", "a time")
    assert tokenizer.decode(session.prompts[0]) == "<|bos|>Once upon\n"
    first = session.outputs[0].text.strip()
    assert tokenizer.decode(session.prompts[1]) == f"<|bos|>Once upon\n{first}\na time\n"
    assert "has no chat template" in capsys.readouterr().err


@pytest.mark.parametrize("template", ["{{ raise_exception('no roles') }}", "{% if %}"])
def test_a_template_that_fails_does_not_end_the_chat(
    session: Session, capsys: Captured, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(session.llm.tokenizer, "chat_template", template)
    assert session.talk("Hello") == 0
    assert "error: the chat template" in capsys.readouterr().err


def test_a_chat_needs_a_tokenizer(olmoe: Path) -> None:
    with models.open_llm(olmoe) as llm, pytest.raises(UsageError, match="no tokenizer") as caught:
        chat(llm, PARAMS)
    assert "--token-ids" in caught.value.hint


# --- from the command line


def test_run_without_a_prompt_is_a_chat(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hello", "/exit"])
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    arguments = ["run", "sample", *MEMORY, "--max-new-tokens", "4", "--no-self-check"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert GREETING in err
    assert next(lines, None) is None
