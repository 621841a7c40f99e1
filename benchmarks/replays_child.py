"""A live run on two disks, and what a replay predicts for the second from the first: JSON lines.

The texts' routing is recorded first, with every expert in memory. Times of computing come from the
run on the first disk, and how fast the second one reads from reading alone; the replay knows
nothing of the second run.
"""

import json
import tempfile
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from retinue.config import Config
from retinue.engine.forced import run_forced
from retinue.engine.llm import LLM
from retinue.engine.reserve import given_of
from retinue.engine.tasks import TaskIds, as_ids, read_texts
from retinue.engine.tracing import record, trace_head
from retinue.memory.home import locate, sample_tasks
from retinue.memory.read_speed import measure_reads
from retinue.metrics import Costs
from retinue.policy.presets import preset
from retinue.sim.candidates import sizes_of
from retinue.sim.costs import times_of_bench
from retinue.sim.link import Roads
from retinue.sim.recorded import Recording
from retinue.sim.replay import Outcome, Replay
from retinue.sim.stage import Setting
from retinue.trace import Trace, TraceWriter, append

PLAIN = "on-demand"


def measure(options: Namespace) -> dict[str, Any]:
    """Both runs and the replay on the second disk."""
    config = Config(experts=options.experts, memory=options.memory, self_check=False, context=1024)
    with tempfile.TemporaryDirectory() as made:
        recording = _recorded(options, replace(config, experts=None), Path(made) / "routing.trace")
    first, second = (f"{limit}MB" for limit in options.read_limits)
    known, slots = _live(options, replace(config, preset=options.preset, read_limit=first))
    plain = known
    if options.preset != PLAIN:  # what looking ahead takes is what it takes beyond that
        plain, _ = _live(options, replace(config, preset=PLAIN, read_limit=first))
    measured, _ = _live(options, replace(config, preset=options.preset, read_limit=second))
    outcome = _replay(options, recording, (known, plain), slots)
    live, mine = measured.decode, outcome.decode
    return {
        "measured_tokens_per_s": live.tokens / live.seconds,
        "predicted_tokens_per_s": mine.tokens / mine.seconds,
        "measured": [live.hits, live.pending, live.misses],
        "predicted": [mine.hits, mine.pending, mine.misses],
    }


def _texts(llm: LLM, count: int) -> list[TaskIds]:
    tokenizer = llm.assembly.tokenizer

    def encode(text: str, first: bool) -> list[int]:
        return list(tokenizer(text, add_special_tokens=first)["input_ids"])

    texts = read_texts(sample_tasks(), 1)[:count]
    return as_ids(texts, encode, llm.assembly.facts.vocab_size)


def _recorded(options: Namespace, config: Config, file: Path) -> Recording:
    with LLM.from_config(locate(options.model), config) as llm:
        head = trace_head(llm.assembly, signals=("next_scores",))
        with TraceWriter(file, head) as writer:
            texts = _texts(llm, options.texts)
            append(writer, record(llm.assembly, head, texts, lambda: None))
    return Recording(Trace(file), ["next_scores"])


def _live(options: Namespace, config: Config) -> tuple[Costs, int]:
    with LLM.from_config(locate(options.model), config) as llm:
        for text in _texts(llm, options.texts):
            run_forced(llm.assembly, text)
        return llm.assembly.metrics.total, llm.assembly.cache.slots


def _replay(
    options: Namespace, recording: Recording, known: tuple[Costs, Costs], slots: int
) -> Outcome:
    head, row = recording.head, preset(options.preset)
    assert head.facts is not None
    folder, second = locate(options.model), 1e6 * options.read_limits[1]
    speed = measure_reads(folder, head.read_bytes, limit=second)
    roads = Roads(speed.bytes_per_s, speed.latency_s, in_turn=True)
    times = plain = times_of_bench(head.facts, _document(known[1]))
    if options.preset != PLAIN:
        times = times_of_bench(head.facts, _document(known[0]), plain)
    setting = Setting(slots, roads, times)
    given = given_of(folder, head.facts, slots, row, Config())
    sizes = sizes_of(head, ("as-is",), head.read_bytes)
    return Replay(recording, row.build(given), setting, sizes).run()


def _document(known: Costs) -> dict[str, float | None]:
    """What `retinue bench` would say of these runs."""
    decode, prompts, passes = known.decode, known.prefill, max(1, known.prefill.passes)
    return {
        "decode_tokens_per_s": decode.tokens / decode.seconds,
        "decode_s": decode.seconds,
        **{name: getattr(decode, name) for name in ("hits", "pending", "misses", "stall_s")},
        **{name: getattr(decode, name) for name in ("expert_s", "dense_s", "overhead_s")},
        **decode.counts,
        "late_s": decode.computing.slope,
        "start_s": decode.starting.slope,
        "prompt_tokens": prompts.tokens / passes,
        "prefill_expert_s": prompts.expert_s / passes,
        "prefill_dense_s": prompts.dense_s / passes,
        "prefill_overhead_s": prompts.overhead_s / passes,
        **{f"prefill_{name}": count / passes for name, count in prompts.counts.items()},
    }


def main() -> None:
    """Measure one preset."""
    parser = ArgumentParser(prog="python -m benchmarks.replays_child", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--preset", required=True)
    parser.add_argument("--experts", default="25%")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--read-limits", type=int, nargs=2, required=True, metavar="MB")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
