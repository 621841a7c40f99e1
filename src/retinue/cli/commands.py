"""The commands of the chat: each a name, a line of help and a function of session and argument."""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from retinue.cli.conversation import load, save
from retinue.cli.lines import QUOTES
from retinue.cli.session import Session
from retinue.cli.terminal import fail, note, summary
from retinue.errors import RetinueError, UsageError


@dataclass(frozen=True, slots=True)
class Command:
    """What `/help` shows of a command, and what it does."""

    argument: str
    help: str
    act: Callable[[Session, str], None]


def run(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says; errors are told and end nothing."""
    name, _, argument = line[1:].partition(" ")
    try:
        if name not in COMMANDS:
            raise _unknown(name)
        if argument.strip() and not COMMANDS[name].argument:
            raise UsageError(f"/{name} takes nothing after it: `{argument.strip()}`")
        COMMANDS[name].act(session, argument.strip())
    except RetinueError as error:
        fail(str(error), error.hint)


def _unknown(name: str) -> UsageError:
    near = get_close_matches(name.lower(), COMMANDS, n=1, cutoff=0.5)
    guess = f"did you mean /{near[0]}? " if near else ""
    return UsageError(
        f"unknown command: `/{name}`",
        hint=f"{guess}/help lists all; to send a text that begins with a slash, write two",
    )


def _help(session: Session, argument: str) -> None:
    names = {f"/{name} {command.argument}".rstrip(): command for name, command in COMMANDS.items()}
    width = max(map(len, names))
    for name, command in names.items():
        note(f"{name:<{width}}  {command.help}")
    note(f"{QUOTES} begins and ends a text of several lines; so does a backslash at a line's end")
    note("ctrl-C stops an answer or clears the line; twice, or ctrl-D, leaves")


def _leave(session: Session, argument: str) -> None:
    session.leaving = True


def _clear(session: Session, argument: str) -> None:
    session.conversation.clear()
    note("the conversation is forgotten")


def _system(session: Session, argument: str) -> None:
    conversation = session.conversation
    if argument:
        conversation.system = "" if argument == '""' else argument
    note(f"system: {conversation.system}" if conversation.system else "there is no system prompt")


def _retry(session: Session, argument: str) -> None:
    session.retry()


def _undo(session: Session, argument: str) -> None:
    question = session.conversation.undo()
    note(f"taken back: {question}" if question is not None else "nothing was asked yet")


def _save(session: Session, argument: str) -> None:
    _write(session, argument, overwrite=False)


def _save_over(session: Session, argument: str) -> None:
    _write(session, argument, overwrite=True)


def _write(session: Session, argument: str, *, overwrite: bool) -> None:
    path = _path(argument)
    save(path, session.conversation, session.settings(), overwrite=overwrite)
    note(f"{len(session.conversation.messages)} messages are in `{path}`")


def _load(session: Session, argument: str) -> None:
    conversation, settings = load(_path(argument))
    session.restore(settings)
    session.conversation = conversation
    note(f"{len(conversation.messages)} messages, and the settings, are those of `{argument}`")


def _path(argument: str) -> Path:
    name = argument.strip("'\"")
    if not name:
        raise UsageError("which file?", hint="such as `/save chat.json`")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"no such home folder: `{name}`") from error


def _stats(session: Session, argument: str) -> None:
    note(summary(session.last) if session.last else "nothing was said yet")


def _speed(session: Session, argument: str) -> None:
    session.speed = _switch(argument, session.speed)
    note(f"speed after each answer: {'on' if session.speed else 'off'}")


def _thinking(session: Session, argument: str) -> None:
    session.thinking = _switch(argument, session.thinking)
    note(f"thoughts are {'shown' if session.thinking else 'hidden'}")


def _switch(argument: str, now: bool) -> bool:
    if argument not in ("", "on", "off"):
        raise UsageError(f"neither on nor off: `{argument}`")
    return not now if argument == "" else argument == "on"


def _set(session: Session, argument: str) -> None:
    name, _, value = argument.replace("=", " ", 1).partition(" ")
    if name:
        session.set(name, value.strip())
    shown = ", ".join(f"{key} {value}" for key, value in session.settings().items())
    note(shown)


COMMANDS = {
    "help": Command("", "this list", _help),
    "system": Command("TEXT", 'give the model a role; alone: show it; "": none', _system),
    "clear": Command("", "forget what was said; the system prompt stays", _clear),
    "undo": Command("", "take back the last question and its answer", _undo),
    "retry": Command("", "answer the last question again", _retry),
    "save": Command("FILE", "write the conversation and the settings", _save),
    "save!": Command("FILE", "the same, over a file that exists", _save_over),
    "load": Command("FILE", "go on with a saved conversation", _load),
    "set": Command("NAME VALUE", "such as temperature 0.7; alone: show all settings", _set),
    "thinking": Command("on|off", "show what stands between <think> and </think>", _thinking),
    "speed": Command("on|off", "tokens a second after each answer", _speed),
    "stats": Command("", "what the last answer cost", _stats),
    "exit": Command("", "leave, as ctrl-D does", _leave),
    "quit": Command("", "the same", _leave),
}
