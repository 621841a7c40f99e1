"""The options that mean the same in every verb, made from the fields of Config."""

import sys
from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from retinue.config import Config, load_config
from retinue.errors import UsageError

MODEL_HELP = (
    "a checkpoint folder, a repository id (ORG/NAME or ORG/NAME@REVISION, downloaded),"
    " or `sample`, the small trained model that ships along"
)
ROOM = ("memory", "gpu_memory", "experts", "context", "kv_tokens", "chunk", "batch")
ENGINE = (
    *(*ROOM, "preset", "fetch_above", "task", "profile", "period", "forecaster"),
    *("precision", "threads", "read_limit", "self_check", "eager"),
)
QUEUE = ("order", "first_token_deadline", "token_deadline", "queue")
SERVER = (
    "learn",
    *("host", "port", "api_key", "served_name", "time_limit", "grace"),
    *("choices", "max_prompt", "max_body"),
)
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop")


class Parser(ArgumentParser):
    """Says of a wrong command line what to do, as every error of ours does."""

    def error(self, message: str) -> NoReturn:
        """Print usage, `message` and a hint; exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\n\nhint: `{self.prog} --help`\n")

    def refuse(self, rest: Sequence[str]) -> NoReturn:
        """The same for words that are left over, with what they may be meant for."""
        near = get_close_matches(rest[0].partition("=")[0], self._option_string_actions, n=1)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        self.error(f"unrecognized arguments: {' '.join(rest)}{guess}")


def new_verb(verbs: Any, name: str, summary: str, example: str) -> ArgumentParser:
    """A parser for one verb, with an example in its help."""
    parser: ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line")
    parser.set_defaults(parser=parser)
    return parser


def add_config_options(parser: ArgumentParser, names: tuple[str, ...]) -> None:
    """Add `--config` and the options for the fields called `names`; none has a default here."""
    parser.add_argument("--config", metavar="FILE", help="YAML with the same keys")
    for item in fields(Config):
        if item.name not in names:
            continue
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata["help"]
        if item.type in (bool, bool | None):
            parser.add_argument(flag, action=BooleanOptionalAction, default=None, help=text)
        elif item.name == "stop":
            parser.add_argument(flag, action="append", metavar=item.metadata["metavar"], help=text)
        else:
            if item.default not in (None, ()):
                text += f" (default: {item.default})"
            text = text.replace("%", "%%")
            kind = _kind(item.type)
            parser.add_argument(flag, type=kind, metavar=item.metadata["metavar"], help=text)


def _kind(annotation: object) -> Any:
    """What argparse turns the text of a field of this type into."""
    kinds: dict[object, type] = {int: int, int | None: int, float: float, float | None: float}
    return kinds.get(annotation, str)


def config_from(arguments: Namespace, **defaults: Any) -> Config:
    """The configuration that a command line asks for. `defaults` fill what nobody has set."""
    names = {item.name for item in fields(Config)}
    flags = {name: value for name, value in vars(arguments).items() if name in names}
    if flags.get("stop") is not None:
        flags["stop"] = tuple(flags["stop"])
    config = load_config(flags, arguments.config)
    unset = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return load_config({**_values(config), **unset}, environ={}) if unset else config


def useless(options: Namespace, names: Sequence[str], why: str) -> None:
    """Raise UsageError if one of `names` was given on the command line, where it does nothing."""
    for name in names:
        if getattr(options, name) is not None:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"`{flag}` is of no use {why}", hint="leave one of both out")


def _values(config: Config) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in fields(Config)}
