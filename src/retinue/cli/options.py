"""The options that mean the same in every verb, made from the fields of Config."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace, RawDescriptionHelpFormatter
from dataclasses import fields
from typing import Any

from retinue.config import Config, load_config

MODEL_HELP = (
    "a checkpoint folder, a repository id (ORG/NAME or ORG/NAME@REVISION, downloaded),"
    " or `sample`, the small trained model that ships along"
)
ROOM = ("memory", "experts", "context", "kv_tokens", "chunk", "batch")
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


def _values(config: Config) -> dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in fields(Config)}
