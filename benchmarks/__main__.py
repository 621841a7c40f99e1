"""One command for all benchmarks: ours and the peer in turn, medians, a table, one JSON line."""

import importlib.metadata
import json
import platform
import signal
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from benchmarks import (
    alone,
    arrivals,
    kernels,
    packed,
    quality,
    replays,
    saved,
    sharing,
    slow_disk,
    soak,
    step,
    versus,
)
from benchmarks.checkpoint import Checkpoint, NoCheckpointError, inspect
from benchmarks.child import ChildFailedError, run_child, say
from benchmarks.results import Document, Report, show
from benchmarks.setting import Setting

from retinue.config import format_size, parse_size
from retinue.errors import RetinueError
from retinue.memory.home import SAMPLE, locate
from retinue.memory.machine import available_bytes, cores

BENCHMARKS: dict[str, Callable[[Setting], Report]] = {
    "in-memory": versus.in_memory,
    "offload": versus.offload,
    "bound": alone.bound,
    "prefill": alone.prefill,
    "first-token": alone.first_token,
    "slots": alone.slots,
    "plan": alone.plan,
    "batch": sharing.batch,
    "second-turn": sharing.second_turn,
    "arrivals": arrivals.arrivals,
    "quality": quality.quality,
    "slow-disk": slow_disk.slow_disk,
    "saved": saved.saved,
    "soak": soak.soak,
    "step": step.step,
    "replays": replays.replays,
    "llamacpp-small": packed.llamacpp_small,
    "llamacpp-whole": packed.llamacpp_whole,
    "qwen3": packed.qwen3,
    "kernels": kernels.kernels,
}
SMALL_SHAPE = "olmoe-mini"
MEMORY, SMALL_MEMORY = "6GiB", "1.25GiB"
PACKAGES = ("retinue", "torch", "transformers", "accelerate", "llama_cpp_python", "gguf")


def build_parser() -> ArgumentParser:
    """The command line; its help lists every benchmark."""
    width = max(map(len, BENCHMARKS))
    lines = [f"  {name:{width}}  {run.__doc__}" for name, run in BENCHMARKS.items()]
    parser = ArgumentParser(
        prog="python -m benchmarks",
        description="Measures retinue against a peer and against the machine's own limits,"
        " every run in a process of its own, ours and the others in turn.",
        epilog="benchmarks:\n" + "\n".join(lines) + "\n\nexample:\n"
        "  python -m benchmarks ./OLMoE-1B-7B --memory 6GiB --only offload bound --json out.json",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        nargs="?",
        help="a checkpoint folder, or `sample`"
        f" (default: {SMALL_SHAPE} with random weights, 1.1 GB, removed at the end)",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="the limit, where a benchmark has none of its own"
        f" (default: {MEMORY}, {SMALL_MEMORY} without CHECKPOINT)",
    )
    parser.add_argument("--runs", type=positive, default=3, metavar="N", help="(default: 3)")
    each = "(default: each benchmark's own count)"
    parser.add_argument("--prompt-tokens", type=positive, metavar="N", help=each)
    parser.add_argument("--new-tokens", type=positive, metavar="N", help=each)
    _add_parts(parser)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help="some only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON there as well")
    return parser


def _add_parts(parser: ArgumentParser) -> None:
    """What `quality`, `slow-disk` and `saved` take beside the rest."""
    texts = "task texts of quality and slow-disk"
    parser.add_argument("--data", type=Path, metavar="FILE", help=f"{texts} (default: shipped)")
    parser.add_argument("--per-task", type=positive, metavar="N", help="so many of each task")
    parser.add_argument("--shares", type=positive, nargs="+", metavar="N", help="of experts, in %%")
    parser.add_argument("--read-limits", type=positive, nargs="+", metavar="N", help="in MB/s")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main() -> int:
    """Run the benchmarks that were asked for; returns 1 if one failed or broke its promise."""
    # As an exception, so that temporary folders, groups and children end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = build_parser().parse_args()
    with ExitStack() as stack:
        try:
            setting = _setting(options, stack)
        except (NoCheckpointError, RetinueError, ChildFailedError) as error:
            say(f"error: {error}")
            return 2
        try:
            reports, failed = _run_all(options.only or list(BENCHMARKS), setting)
        except KeyboardInterrupt:
            say("interrupted: no results")
            return 130
    rows = [row for report in reports.values() for row in report.rows]
    if rows:
        print(show(rows))
        print("a ratio above 1 is in our favour; lowest and highest are single rounds")
    for name, report in reports.items():
        for text in report.notes:
            print(f"{name}: {text}")
    document = json.dumps(_document(setting, reports), ensure_ascii=False)
    if options.json:
        options.json.write_text(document + "\n", encoding="utf-8")
    print(document, flush=True)
    return 1 if failed or any(row.ok is False for row in rows) else 0


def _setting(options: Namespace, stack: ExitStack) -> Setting:
    """The checkpoint weighed, or the small one written; `stack` removes what was written."""
    default = MEMORY if options.checkpoint else SMALL_MEMORY
    memory_bytes = parse_size(options.memory or default, whole=available_bytes())

    @cache
    def small() -> Checkpoint:
        parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="retinue-benchmark-"))
        return write_shape(SMALL_SHAPE, Path(parent))

    checkpoint = inspect(locate(options.checkpoint).resolve()) if options.checkpoint else small()
    say(
        f"{checkpoint.name}: {format_size(checkpoint.total_bytes)},"
        f" {format_size(checkpoint.expert_bytes)} of it in {checkpoint.experts} experts;"
        f" limit {format_size(memory_bytes)}"
    )
    return Setting(
        checkpoint,
        memory_bytes,
        options.runs,
        small,
        prompt_tokens=options.prompt_tokens,
        new_tokens=options.new_tokens,
        model=checkpoint.folder if options.checkpoint else SAMPLE,
        data=options.data,
        per_task=options.per_task,
        shares=options.shares,
        read_limits=options.read_limits,
    )


def write_shape(shape: str, parent: Path) -> Checkpoint:
    """Write a checkpoint of `shape` below `parent`, in a child: torch stays out of this process."""
    say(f"writing {shape} with random weights")
    folder = parent / shape
    run_child([sys.executable, "-m", "benchmarks.shapes", shape, str(folder)])
    return inspect(folder)


def _run_all(names: list[str], setting: Setting) -> tuple[dict[str, Report], bool]:
    """Every benchmark's report; one that fails does not end the others."""
    reports, failed = {}, False
    for name in dict.fromkeys(names):
        say(f"{name}: {BENCHMARKS[name].__doc__}")
        try:
            reports[name] = BENCHMARKS[name](setting)
        except ChildFailedError as error:
            failed = True
            reports[name] = Report(notes=[f"FAILED: {error}"])
    return reports, failed


def _document(setting: Setting, reports: dict[str, Report]) -> Document:
    return {
        "checkpoint": setting.checkpoint.name,
        "checkpoint_bytes": setting.checkpoint.total_bytes,
        "expert_bytes": setting.checkpoint.expert_bytes,
        "memory_bytes": setting.memory_bytes,
        "runs": setting.runs,
        "machine": {"cores": cores(), "processor": platform.machine(), "os": platform.system()},
        "versions": {name: _version(name) for name in PACKAGES},
        "benchmarks": {name: report.as_dict() for name, report in reports.items()},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
