"""The command line: `retinue VERB MODEL ...`. Each verb's module is imported when it is called."""

import importlib
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Sequence

from retinue import __version__
from retinue.cli.kinds import KINDS
from retinue.cli.options import (
    ENGINE,
    MODEL_HELP,
    QUEUE,
    ROOM,
    SAMPLING,
    SERVER,
    add_config_options,
    config_from,
    new_verb,
)
from retinue.cli.terminal import fail
from retinue.config import INSENSITIVE_ABOVE
from retinue.errors import RetinueError
from retinue.memory.budget import fits_whole
from retinue.memory.home import find_here
from retinue.memory.process import prepare

# verbs that need a model loaded
LOADING = ("run", "serve", "bench", "eval", "profile", "trace", "train-predictor")


def build_parser() -> ArgumentParser:
    """All verbs with their options. Imports no model code: `--help` answers at once."""
    parser = ArgumentParser(
        prog="retinue",
        description="Runs Mixture-of-Experts language models in a fraction of their memory.",
    )
    parser.add_argument("--version", action="version", version=f"retinue {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_run(verbs)
    _add_serve(verbs)
    _add_plan(verbs)
    _add_doctor(verbs)
    _add_bench(verbs)
    _add_pack(verbs)
    _add_trace(verbs)
    _add_profile(verbs)
    _add_train_predictor(verbs)
    _add_eval(verbs)
    _add_reproduce(verbs)
    new_verb(verbs, "presets", "every preset with its source and parts", "retinue presets --json")
    new_verb(verbs, "list", "the models in the hub's cache", "retinue list --json")
    _add_rm(verbs)
    return parser


def _add_run(verbs: object) -> None:
    run = new_verb(
        verbs,
        "run",
        "one answer; without PROMPT a chat, or the prompt from a pipe",
        'retinue run sample "A: Hello there!" --memory 1GiB --max-new-tokens 40',
    )
    run.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue")
    run.add_argument(
        "--token-ids", action="store_true", help="PROMPT is token ids, separated by spaces"
    )
    run.add_argument("--logprobs", type=int, metavar="N", help="with --json: N alternatives each")
    run.add_argument("--ignore-eos", action="store_true", help="go on after an end token")
    run.add_argument("--system", metavar="TEXT", help="of the chat: the role that the model plays")
    add_config_options(run, (*ENGINE, "infer_task", *SAMPLING))


def _add_serve(verbs: object) -> None:
    serve = new_verb(
        verbs,
        "serve",
        "HTTP server in the OpenAI form",
        "retinue serve sample --memory 1GiB --port 8000",
    )
    serve.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_config_options(serve, (*ENGINE, "infer_task", *QUEUE, *SERVER, *SAMPLING))


def _add_plan(verbs: object) -> None:
    plan = new_verb(
        verbs,
        "plan",
        "from the headers alone: what fits where, expected speed, smallest budget",
        "retinue plan ./OLMoE-1B-7B --memory 4GiB",
    )
    plan.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_config_options(plan, (*ROOM, "preset", "precision", "threads"))


def _add_doctor(verbs: object) -> None:
    doctor = new_verb(
        verbs,
        "doctor",
        "the machine, what is fast on it and what is not, and why",
        "retinue doctor ./OLMoE-1B-7B",
    )
    doctor.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    doctor.add_argument(
        "--verify", action="store_true", help="read all of a pack and compare its checksums"
    )
    unused = ("task", "profile", "period", "forecaster", "fetch_above", "read_limit")
    add_config_options(doctor, tuple(name for name in ENGINE if name not in unused))


def _add_bench(verbs: object) -> None:
    bench = new_verb(
        verbs,
        "bench",
        "speed and memory against the machine's own limits",
        "retinue bench ./OLMoE-1B-7B --memory 6GiB --prompt-tokens 512 --new-tokens 32",
    )
    bench.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    bench.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="(default: 64)")
    bench.add_argument("--new-tokens", type=int, default=32, metavar="N", help="(default: 32)")
    bench.add_argument("--prompts", metavar="FILE", help="texts, one a line, instead of random ids")
    add_config_options(bench, (*ENGINE, "seed"))


def _add_pack(verbs: object) -> None:
    pack = new_verb(
        verbs,
        "pack",
        "a self-contained copy in int4 or int8: a quarter or half of the bytes; resumable",
        "retinue pack ./OLMoE-1B-7B ./OLMoE-1B-7B-int4 --precision int4",
    )
    pack.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    pack.add_argument("out", metavar="OUT", nargs="?", help="the folder to write")
    pack.add_argument(
        "--check",
        action="store_true",
        help="compare all bytes of MODEL, a pack, with its checksums",
    )
    add_config_options(pack, ("memory", "precision", "threads"))


def _add_trace(verbs: object) -> None:
    trace = new_verb(
        verbs,
        "trace",
        "run texts, record which experts every token chose",
        "retinue trace ./OLMoE-1B-7B --data tasks.jsonl --per-task 20 --out routing.trace",
    )
    _add_texts(trace)
    trace.add_argument("--out", metavar="FILE", required=True, help="where to write the trace")
    trace.add_argument("--merge", metavar="FILE", help="a trace whose requests come first")
    trace.add_argument(
        "--detail",
        choices=("tokens", "histogram"),
        default="tokens",
        help="every token's experts and weights, or their sums by expert (default: tokens)",
    )
    trace.add_argument(
        "--signals",
        metavar="NAMES",
        help="what else `simulate` needs for presets that look at more, with commas between:"
        " scores, next_scores, embedding, and hidden, which is large",
    )
    add_config_options(
        trace, ("memory", "experts", "context", "precision", "threads", "self_check")
    )


def _add_profile(verbs: object) -> None:
    profile = new_verb(
        verbs,
        "profile",
        "per task: which experts it uses, where wrong routing hurts, how long its answers are; what"
        " a pass costs here; remembered for the presets that ask",
        "retinue profile ./OLMoE-1B-7B --data tasks.jsonl --per-task 20",
    )
    _add_texts(profile)
    profile.add_argument("--out", metavar="FILE", help="write there, not to the cache folder")
    profile.add_argument("--merge", metavar="FILE", help="a profile whose counts are added")
    profile.add_argument(
        "--sensitivity",
        type=_number_or_off,
        default=2,
        metavar="N",
        help="texts of each task that run with random routing, up to 22 times each (14 with eight"
        " layers), or `off`"
        " (default: 2)",
    )
    profile.add_argument(
        "--insensitive-above",
        type=float,
        default=INSENSITIVE_ABOVE,
        metavar="SHARE",
        help="layers count as insensitive while this share of next tokens stays the same under"
        f" random routing (default: {INSENSITIVE_ABOVE})",
    )
    profile.add_argument(
        "--answers",
        type=_number_or_off,
        default=2,
        metavar="N",
        help="texts of each task that are answered to see how long answers are, or `off`; where"
        " the model does not end most of them the texts' own continuations count (default: 2)",
    )
    profile.add_argument(
        "--costs",
        action=BooleanOptionalAction,
        default=True,
        help="measure what a pass, a token and the read of an expert cost here",
    )
    add_config_options(
        profile, ("memory", "experts", "context", "precision", "threads", "self_check")
    )


def _number_or_off(text: str) -> int:
    if text != "off" and not text.isdecimal():
        raise ArgumentTypeError(f"`{text}` is neither a number nor `off`")
    return 0 if text == "off" else int(text)


def _add_train_predictor(verbs: object) -> None:
    training = new_verb(
        verbs,
        "train-predictor",
        "learn what presets need to know of a model; judged on texts that are held out",
        "retinue train-predictor sample --kind promoe,fmoe",
    )
    _add_texts(training)
    training.add_argument(
        "--trace", metavar="FILE", help="of `retinue trace`, in place of running texts"
    )
    training.add_argument(
        "--kind",
        metavar="KINDS",
        default="all",
        help=f"what to learn, with commas between, or `all` (default: all): {', '.join(KINDS)};"
        " what else the predictor's file has stays",
    )
    training.add_argument(
        "--epochs", type=int, metavar="N", help="how often each text is learnt, for every kind"
    )
    training.add_argument("--out", metavar="FILE", help="write there, not to the cache folder")
    add_config_options(
        training, ("memory", "experts", "context", "precision", "threads", "self_check", "seed")
    )


def _add_eval(verbs: object) -> None:
    evaluation = new_verb(
        verbs,
        "eval",
        "loss and agreement per task, against the plain model",
        "retinue eval sample --preset popular-by-task --experts 40% --per-task 4",
    )
    _add_texts(evaluation)
    evaluation.add_argument(
        "--against", metavar="MODEL", help="the plain model of a pack, to compare with"
    )
    # One text after the other, each with its own task.
    unused = ("task", "batch", "kv_tokens")
    add_config_options(evaluation, tuple(name for name in ENGINE if name not in unused))


def _add_reproduce(verbs: object) -> None:
    reproduction = new_verb(
        verbs,
        "reproduce",
        "a paper's evaluation on this model: a page with plots, and JSON; resumed",
        "retinue reproduce emoe sample --out emoe-report --quick",
    )
    reproduction.add_argument("name", metavar="NAME", help="the paper: emoe (2503.06823)")
    _add_texts(reproduction)
    reproduction.add_argument(
        "--out", metavar="DIR", help="for the report and what was measured (default: retinue-NAME)"
    )
    reproduction.add_argument("--only", metavar="NAMES", help="experiments, with commas between")
    reproduction.add_argument("--quick", action="store_true", help="fewer texts, shares, repeats")
    reproduction.add_argument("--fresh", action="store_true", help="measure again what is there")
    names = ("memory", "context", "profile", "precision", "threads", "self_check")
    add_config_options(reproduction, names)


def _add_texts(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="JSON lines with `task`, `prompt` and `continuation`; default: the texts that ship"
        " with the sample",
    )
    parser.add_argument("--per-task", type=int, metavar="N", help="only N texts of each task")


def _add_rm(verbs: object) -> None:
    remove = new_verb(
        verbs, "rm", "delete a model from the hub's cache", "retinue rm allenai/OLMoE-1B-7B-0924"
    )
    remove.add_argument(
        "name", metavar="NAME", help="as `retinue list` names it; `cache` is what retinue remembers"
    )
    remove.add_argument("--yes", action="store_true", help="do not ask")


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
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
