"""Every verb with its options. Imports no model code: `--help` answers at once."""

from argparse import ArgumentParser

from retinue import __version__
from retinue.cli.options import (
    ENGINE,
    MODEL_HELP,
    QUEUE,
    ROOM,
    SAMPLING,
    SERVER,
    Parser,
    add_config_options,
    new_verb,
)
from retinue.cli.text_verbs import add_text_verbs

SIMULATION = (
    ("--presets", str, "NAMES", "with commas between (default: all that the trace can replay)"),
    ("--model", str, "MODEL", "for what was learnt of it (default: as the trace names it)"),
    ("--experts", str, "SHARES", "room, such as 12.5%%,25%%,1GiB (default: what --memory leaves)"),
    ("--disk", str, "SPEEDS", "bytes a second, such as 300MB,1GB (default: as measured here)"),
    ("--bus", str, "SPEED", "bytes a second from memory to where is computed, if apart"),
    ("--latency", float, "SECONDS", "until the disk answers (default: --bench's, or 0.0001)"),
    ("--expert-time", float, "SECONDS", "one token in one expert"),
    ("--layer-time", float, "SECONDS", "one token in one layer besides its experts"),
    ("--pass-time", float, "SECONDS", "one pass besides its layers"),
    ("--elsewhere-time", float, "SECONDS", "one token in one expert at a second place, if any"),
    ("--expert-size", str, "SIZE", "of one expert, where the trace does not say it"),
    ("--rate", float, "R", "requests arrive by chance, R a second (default: all at once)"),
)


def build_parser() -> ArgumentParser:
    """All verbs with their options. Imports no model code: `--help` answers at once."""
    parser = Parser(
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
    add_text_verbs(verbs)
    _add_simulate(verbs)
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
    bench.add_argument("--prompt-tokens", type=int, metavar="N", help="(default: 64)")
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
    add_config_options(pack, ("memory", "gpu_memory", "precision", "threads"))


def _add_simulate(verbs: object) -> None:
    simulation = new_verb(
        verbs,
        "simulate",
        "replay a trace through presets, without the model: hits, reads, speed, and the best one",
        "retinue simulate routing.trace --experts 12.5%,25%,50% --disk 300MB,1GB --recommend",
    )
    simulation.add_argument("trace", metavar="TRACE", help="of `retinue trace`")
    for name, kind, metavar, text in SIMULATION:
        simulation.add_argument(name, type=kind, metavar=metavar, help=text)
    simulation.add_argument(
        "--bench",
        metavar="FILE",
        help="of `retinue bench --preset on-demand --json`: times of this machine",
    )
    simulation.add_argument(
        "--compared",
        metavar="DIR",
        help="of `retinue compare`: the disks, and the times of each preset, as they were there",
    )
    simulation.add_argument(
        "--recommend",
        action="store_true",
        help="try presets and divisions of the slots; with --compared, keep who is surely better"
        " than `auto` for `--preset auto`",
    )
    simulation.add_argument(
        "--allow-approximate",
        action="store_true",
        default=None,
        help="with --recommend: try these as well",
    )
    names = ("memory", "gpu_memory", "context", "chunk", "batch", "profile", "threads", "seed")
    add_config_options(simulation, names)


def _add_rm(verbs: object) -> None:
    remove = new_verb(
        verbs, "rm", "delete a model from the hub's cache", "retinue rm allenai/OLMoE-1B-7B-0924"
    )
    remove.add_argument(
        "name", metavar="NAME", help="as `retinue list` names it; `cache` is what retinue remembers"
    )
    remove.add_argument("--yes", action="store_true", help="do not ask")
