"""The peer that has everything in memory: transformers itself, in a process of its own.

    python -m benchmarks.peer_transformers CHECKPOINT --experts grouped_mm

The same ids as `retinue bench` feeds, in the same order. One short pass goes before the clock
starts, so that what the libraries prepare at first use is not counted against the peer.
The last line is one JSON document.
"""

import json
import os
import random
import statistics
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
WARM_UP_TOKENS = 4


def command(folder: Path, experts: str, *, prompt_tokens: int, new_tokens: int) -> list[str]:
    """What starts this peer."""
    words = [sys.executable, "-m", "benchmarks.peer_transformers", str(folder)]
    words += ["--experts", experts]
    return [*words, "--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]


def new_parser(module: str) -> ArgumentParser:
    """The options that every peer has."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--prompt-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N", help="(default: all cores allowed)")
    return parser


def prepare(options: Namespace) -> None:
    """Threads and silence, before anything is loaded."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(options.threads or _cores())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure(model: Any, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """One prefill and `new_tokens` decode steps with forced random ids."""
    import torch

    source = random.Random(0)
    vocabulary = model.config.get_text_config().vocab_size

    def drawn(count: int) -> Any:
        return torch.tensor([[source.randrange(vocabulary) for _ in range(count)]])

    ids = drawn(prompt_tokens)
    started = time.perf_counter()
    output = model(ids, use_cache=True, logits_to_keep=1)
    prefill_s = time.perf_counter() - started
    steps_s = []
    for _ in range(new_tokens):
        ids = drawn(1)
        started = time.perf_counter()
        output = model(ids, past_key_values=output.past_key_values, use_cache=True)
        steps_s.append(time.perf_counter() - started)
    return {"prefill_s": prefill_s} | speeds(prompt_tokens, prefill_s, steps_s)


def speeds(prompt_tokens: int, prefill_s: float, steps_s: Sequence[float]) -> dict[str, float]:
    """Tokens a second, named as `retinue bench` names them."""
    return {
        "prefill_tokens_per_s": prompt_tokens / prefill_s,
        "decode_tokens_per_s": len(steps_s) / sum(steps_s),
        "decode_median_tokens_per_s": 1 / statistics.median(steps_s),
    }


def peak_rss_bytes() -> int:
    """The highest resident memory of this process so far; 0 where that cannot be known."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return 0


def main() -> None:
    """Load, measure, print."""
    parser = new_parser("peer_transformers")
    parser.add_argument("--experts", choices=IMPLEMENTATIONS, default="grouped_mm")
    options = parser.parse_args()
    prepare(options)
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        started = time.perf_counter()
        model: Any = AutoModelForCausalLM.from_pretrained(
            options.checkpoint, dtype=torch.bfloat16, experts_implementation=options.experts
        )
        model(torch.zeros(1, WARM_UP_TOKENS, dtype=torch.long), use_cache=True)
        document: dict[str, Any] = {"engine": f"transformers, {options.experts}"}
        document |= {"load_s": time.perf_counter() - started}
        document |= measure(model, options.prompt_tokens, options.new_tokens)
    print(json.dumps(document | {"peak_rss_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    main()
