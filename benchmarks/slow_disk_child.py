"""Task texts answered one after the other under one preset, in a process of its own.

    python -m benchmarks.slow_disk_child sample --experts 40% --read-limit 100MB --preset emoe

A text's prompt is read and its continuation is fed, whatever the model would have said, so that
the work is the same for every preset. The last line is one JSON document.
"""

import json
import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

# First: it makes the settings that the process needs before torch is imported.
from retinue import LLM, SamplingParams
from retinue.config import Config
from retinue.engine.request import Request, new_request
from retinue.engine.tasks import TaskText, read_texts
from retinue.memory.home import sample_tasks
from retinue.metrics import PhaseCounters

CONTEXT = 1024


def main() -> None:
    """Measure, print."""
    options = build_parser().parse_args()
    texts = read_texts(options.data or sample_tasks(), options.per_task)
    settings = ("experts", "read_limit", "preset", "fetch_above", "forecaster")
    config = Config(context=CONTEXT, **{name: getattr(options, name) for name in settings})
    with LLM.from_config(options.model, config) as llm:
        print(json.dumps(measure(llm, texts, options)), flush=True)


def build_parser() -> ArgumentParser:
    """The command line; settings are those of `retinue bench`."""
    parser = ArgumentParser(prog="python -m benchmarks.slow_disk_child")
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--data", type=Path, metavar="FILE")
    parser.add_argument("--per-task", type=int, default=1, metavar="N")
    parser.add_argument("--new-tokens", type=int, required=True, metavar="N")
    parser.add_argument("--experts", required=True, metavar="SHARE")
    parser.add_argument("--read-limit", required=True, metavar="SIZE")
    parser.add_argument("--preset", required=True, metavar="NAME")
    parser.add_argument("--fetch-above", type=float, metavar="W")
    parser.add_argument("--forecaster", metavar="NAME")
    return parser


def measure(llm: LLM, texts: list[TaskText], options: Namespace) -> dict[str, Any]:
    """Answer all texts; counters are of all of them together."""
    first = [llm.stats(answer(llm, text, options.new_tokens)).ttft_s for text in texts]
    total = llm.assembly.metrics.total
    prefill, decode = total.prefill, total.decode
    weight = prefill.routed_weight + decode.routed_weight
    degraded = prefill.degraded_weight + decode.degraded_weight
    return {
        "texts": len(texts),
        "decode_tokens_per_s": _speed(decode),
        "prefill_tokens_per_s": _speed(prefill),
        "ttft_s": statistics.median(first),
        "degraded_share": degraded / weight if weight else 0.0,
        "decode_degraded_share": decode.degraded_share,
        "bytes_read_per_token": decode.bytes_read / max(1, decode.tokens),
        "prefill_bytes_read_per_token": prefill.bytes_read / max(1, prefill.tokens),
        "stall_s": decode.stall_s,
        "decode_s": decode.seconds,
        "resident_experts": llm.assembly.cache.resident,
        "slots": llm.assembly.split.slots,
        "total_experts": llm.assembly.cache.total,
    }


def answer(llm: LLM, text: TaskText, new_tokens: int) -> Request:
    """Read the prompt, feed the continuation, each cut to the context."""
    forced = llm.encode(text.continuation)[: new_tokens + 1]
    prompt = llm.encode(text.prompt)[-(CONTEXT - len(forced) - 1) :]
    params = SamplingParams(max_new_tokens=len(forced), ignore_eos=True)
    request = new_request(prompt, params, None, forced=forced, task=text.task)
    for _ in llm.run(request):
        pass
    return request


def _speed(counters: PhaseCounters) -> float:
    return counters.tokens / counters.seconds if counters.seconds else 0.0


if __name__ == "__main__":
    main()
