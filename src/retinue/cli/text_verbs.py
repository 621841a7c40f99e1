"""The verbs that work on task texts, and their options."""

from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction

from retinue.cli.kinds import KINDS
from retinue.cli.options import ENGINE, MODEL_HELP, add_config_options, new_verb
from retinue.config import INSENSITIVE_ABOVE


def add_text_verbs(verbs: object) -> None:
    """Add each of them."""
    _add_trace(verbs)
    _add_profile(verbs)
    _add_train_predictor(verbs)
    _add_eval(verbs)
    _add_compare(verbs)
    _add_reproduce(verbs)


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
        " scores, next_scores, second_scores, third_scores, embedding, token_ids, and hidden, which"
        " is large",
    )
    add_config_options(
        trace, ("memory", "gpu_memory", "experts", "context", "precision", "threads", "self_check")
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
        profile,
        ("memory", "gpu_memory", "experts", "context", "precision", "threads", "self_check"),
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
        training,
        (
            "memory",
            "gpu_memory",
            "experts",
            "context",
            "precision",
            "threads",
            "self_check",
            "seed",
        ),
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


def _add_compare(verbs: object) -> None:
    comparison = new_verb(
        verbs,
        "compare",
        "presets side by side, live: a page with plots, Markdown and JSON; resumed",
        "retinue compare sample --presets exact --experts 25%,50% --runs 3 --out compared",
    )
    _add_texts(comparison)
    comparison.add_argument(
        "--presets",
        metavar="NAMES",
        help="with commas between; `exact` and `all` are groups; auto and on-demand always run"
        " (default: exact,emoe-fetch)",
    )
    comparison.add_argument(
        "--experts",
        dest="shares",
        metavar="SHARES",
        help="upper bounds for the resident experts, with commas between (default:"
        " 12.5%%,25%%,50%%; with several `--memory` what each leaves)",
    )
    comparison.add_argument(
        "--memory",
        dest="sizes",
        metavar="SIZES",
        help="upper bounds for the peak resident memory, with commas between (default: 80%%)",
    )
    comparison.add_argument(
        "--read-limits",
        metavar="SIZES",
        default="none",
        help="disks of so many bytes a second, with commas between, such as none,300MB,100MB;"
        " none is the disk as it is (default: none)",
    )
    comparison.add_argument(
        "--runs", type=int, default=5, metavar="N", help="how often each is measured (default: 5)"
    )
    comparison.add_argument(
        "--new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="decoding steps of each text, fed its continuation (default: 32)",
    )
    comparison.add_argument(
        "--out", metavar="DIR", help="for report and measurements (default: retinue-compare)"
    )
    comparison.add_argument("--fresh", action="store_true", help="measure again what is there")
    names = (
        "gpu_memory",
        "context",
        "chunk",
        "profile",
        "precision",
        "threads",
        "self_check",
        "eager",
    )
    add_config_options(comparison, names)


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
    names = ("memory", "gpu_memory", "context", "profile", "precision", "threads", "self_check")
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
