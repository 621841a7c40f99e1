"""The command line: `retinue VERB MODEL ...`. Each verb's module is imported when it is called."""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Sequence

from retinue.cli.options import config_from
from retinue.cli.terminal import fail
from retinue.cli.verbs import build_parser
from retinue.errors import RetinueError
from retinue.memory.budget import fits_whole
from retinue.memory.home import find_here
from retinue.memory.process import prepare

# verbs that need a model loaded
LOADING = ("run", "serve", "bench", "eval", "profile", "trace", "train-predictor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    options = _parse(arguments)
    try:
        prepare(resident=_lies_in_memory(options))
        verb = importlib.import_module(f"retinue.cli.{options.verb.replace('-', '_')}")
        code = int(verb.execute(options))
        print(end="", flush=True)
        return code
    except RetinueError as error:
        fail(str(error), error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        fail("interrupted")
        return 1
    except BrokenPipeError:
        _forget_output()
        return 1
    except MemoryError:
        fail("out of memory", "use a smaller `--memory`, or close other programs")
        return 1


def _lies_in_memory(options: Namespace) -> bool:
    """Whether the verb will load a model that fits whole; asked before torch is imported."""
    if options.verb not in LOADING or options.experts is not None:
        return False
    config = config_from(options)
    folder = find_here(options.model)  # what has yet to be downloaded is not waited for
    return folder is not None and fits_whole(folder, config.memory)


def _forget_output() -> None:
    """Whoever read our output has left: let what is still buffered go nowhere, not fail at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    """Parse, and take a PROMPT that stands after options, or after these and `--`.

    argparse gives up on it by itself.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    place = {"run": "prompt", "doctor": "model"}.get(options.verb)
    if rest[:1] == ["--"]:
        words = rest = rest[1:]
    else:
        words = [word for word in rest if not word.startswith("-") or " " in word]
    if place and len(rest) == len(words) == 1 and getattr(options, place) is None:
        setattr(options, place, rest.pop())
    if rest:
        options.parser.refuse(rest)
    return options


if __name__ == "__main__":
    sys.exit(main())
