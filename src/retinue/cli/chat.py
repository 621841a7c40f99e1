"""A chat in the terminal: history, the model's own template, ctrl-C that stops the answer only."""

import contextlib
import signal
from typing import Any

from jinja2 import TemplateError

from retinue.cli.interrupts import cancel_on
from retinue.cli.terminal import fail, note, summary
from retinue.engine.llm import LLM
from retinue.errors import CheckpointError, RetinueError, UsageError
from retinue.types import Output, SamplingParams

HELP = "/help, /clear forgets the conversation, /stats shows the last answer's cost, /exit"

Message = dict[str, str]


def chat(llm: LLM, params: SamplingParams) -> int:
    """Talk until the end of input or `/exit`; returns the exit code."""
    if llm.tokenizer is None:
        raise UsageError(
            "the checkpoint has no tokenizer", hint="chat needs one; use --token-ids with a PROMPT"
        )
    _enable_editing()
    note(f"{HELP}; ctrl-C stops an answer")
    if llm.tokenizer.chat_template is None:
        note("note: this model has no chat template; it continues the plain text", "yellow")
    messages: list[Message] = []
    last: Output | None = None
    while (line := _ask()) is not None:
        command = line.strip()
        if command in ("/exit", "/quit"):
            break
        if command == "/clear":
            messages = []
            note("the conversation is forgotten")
        elif command == "/stats":
            note(summary(last) if last else "nothing was said yet")
        elif command.startswith("/"):
            note(HELP)
        elif command:
            last = _turn(llm, messages, line, params) or last
    return 0


def _turn(llm: LLM, messages: list[Message], line: str, params: SamplingParams) -> Output | None:
    """One question and its answer; both join `messages`, or neither."""
    asked = [*messages, {"role": "user", "content": line}]
    output: Output | None = None
    try:
        with cancel_on(llm.cancel, signal.SIGINT):
            for output in llm.stream(render(llm, asked), params, reuse=True):
                print(output.delta, end="", flush=True)
    except RetinueError as error:
        print()
        fail(str(error), error.hint)
        return None
    print()
    assert output is not None
    if output.finish_reason == "cancelled":
        note("(stopped)")
    elif output.finish_reason == "length":
        note("(the answer was cut: --max-new-tokens or --context is reached)")
    messages[:] = [*asked, {"role": "assistant", "content": output.text.strip()}]
    return output


def render(llm: LLM, messages: list[Message]) -> list[int]:
    """Token ids of a conversation under the model's own template; plain text without one."""
    tokenizer: Any = llm.tokenizer
    if tokenizer.chat_template is None:
        return llm.encode("\n".join(message["content"] for message in messages) + "\n")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise CheckpointError(f"the chat template of the checkpoint fails: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ask() -> str | None:
    """A line of input; None at its end. ctrl-C at the prompt clears the line."""
    while True:
        try:
            # Plain: readline would count the bytes of a colour as columns, and wrap too early.
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()


def _enable_editing() -> None:
    # Importing readline gives `input` line editing and history; not every Python has it.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
