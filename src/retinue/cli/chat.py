"""A chat in the terminal: the loop over what a person types."""

from retinue.cli.commands import run
from retinue.cli.lines import History, ask_message
from retinue.cli.session import Session
from retinue.cli.terminal import note
from retinue.engine.llm import LLM
from retinue.errors import UsageError
from retinue.types import SamplingParams

GREETING = "/help lists the commands; ctrl-C stops an answer, ctrl-D leaves"


def chat(llm: LLM, params: SamplingParams, system: str = "") -> int:
    """Talk until the end of input or `/exit`; returns the exit code."""
    if llm.tokenizer is None:
        raise UsageError(
            "the checkpoint has no tokenizer", hint="chat needs one; use --token-ids with a PROMPT"
        )
    note(GREETING)
    if llm.tokenizer.chat_template is None:
        note("note: this model has no chat template; it continues the plain text", "yellow")
    session, history = Session(llm, params), History()
    session.conversation.system = system
    while not session.leaving and (text := ask_message()) is not None:
        history.keep()
        command = text.strip()
        if command.startswith("/") and not command.startswith("//"):
            run(session, command)
        elif command:
            session.say(command.removeprefix("/") if command.startswith("//") else text)
    return 0
