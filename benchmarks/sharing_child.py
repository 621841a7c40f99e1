"""Our side through the offline interface, in a process of its own: requests, or two turns.

    python -m benchmarks.sharing_child batch CHECKPOINT --memory 4GiB --batch 8

Prompts are seeded random ids, the same for every run; answers are real ones, greedy, and end tokens
are ignored. The last line is one JSON document. Both sides of a comparison get the same room for
keys and values, so that they have the same number of experts in memory.
"""

import json
import random
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

# First: it makes the settings that the process needs before torch is imported.
from retinue import LLM, Output, SamplingParams
from retinue.model.survey import survey
from retinue.types import BLOCK_TOKENS

SHORTEST = 4  # the shortest prompt has one in so many of the longest one's tokens


def main() -> None:
    """Measure, print."""
    options = build_parser().parse_args()
    print(json.dumps(options.measure(options)), flush=True)


def build_parser() -> ArgumentParser:
    """The command line: `batch` or `turns`."""
    parser = ArgumentParser(prog="python -m benchmarks.sharing_child")
    works = parser.add_subparsers(required=True, metavar="WORK")
    batch = works.add_parser("batch", help="several requests of different lengths")
    batch.set_defaults(measure=measure_batch)
    batch.add_argument("--batch", type=int, required=True, metavar="N", help="so many at once")
    batch.add_argument("--requests", type=int, default=8, metavar="N")
    turns = works.add_parser("turns", help="two turns of a conversation")
    turns.set_defaults(measure=measure_turns)
    turns.add_argument("--added-tokens", type=int, default=32, metavar="N", help="by the second")
    turns.add_argument("--afresh", action="store_true", help="the second turn reuses nothing")
    for work in (batch, turns):
        work.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
        work.add_argument("--memory", required=True, metavar="SIZE")
        work.add_argument("--prompt-tokens", type=int, required=True, metavar="N")
        work.add_argument("--new-tokens", type=int, required=True, metavar="N")
    return parser


def measure_batch(options: Namespace) -> dict[str, Any]:
    """Answer all requests, `--batch` of them at once."""
    facts = survey(options.checkpoint)
    counts = lengths(options.requests, options.prompt_tokens)
    source = random.Random(0)
    prompts = [[source.randrange(facts.vocab_size) for _ in range(count)] for count in counts]
    params = SamplingParams(max_new_tokens=options.new_tokens, ignore_eos=True)
    room = sum(_whole_blocks(count + options.new_tokens) for count in counts)
    with LLM(
        options.checkpoint,
        memory=options.memory,
        context=min(facts.max_context, room),
        kv_tokens=room,
        batch=options.batch,
    ) as llm:
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, reuse=False, progress=False)
        answers_s = time.perf_counter() - started
        decode = llm.assembly.metrics.total.decode
    return {
        "batch": options.batch,
        "prompt_tokens": counts,
        "new_tokens": options.new_tokens,
        "answers_s": answers_s,
        "decode_tokens": decode.tokens,
        "decode_s": decode.seconds,
        "decode_passes": decode.passes,
        "decode_tokens_per_s": decode.tokens / decode.seconds if decode.seconds else 0.0,
        "hit_rate": decode.hit_rate,
        "bytes_read": decode.bytes_read,
        "stall_s": decode.stall_s,
        **_room(outputs[-1]),
        "token_ids": [output.token_ids for output in outputs],
    }


def lengths(requests: int, longest: int) -> list[int]:
    """So many lengths, from a quarter of `longest` up to it in even steps."""
    shortest = max(1, longest // SHORTEST)
    steps = max(1, requests - 1)
    return [longest - (longest - shortest) * step // steps for step in range(requests)][::-1]


def _whole_blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS


def _room(output: Output) -> dict[str, Any]:
    names = ("load_s", "peak_rss_bytes", "budget_bytes", "resident_experts", "total_experts")
    return {name: getattr(output.stats, name) for name in names}


def measure_turns(options: Namespace) -> dict[str, Any]:
    """Two turns of one conversation, each up to its first token; the first one is answered."""
    vocabulary = survey(options.checkpoint).vocab_size
    source = random.Random(0)
    said, added = (
        [source.randrange(vocabulary) for _ in range(count)]
        for count in (options.prompt_tokens, options.added_tokens)
    )
    context = len(said) + options.new_tokens + len(added) + 1
    with LLM(options.checkpoint, memory=options.memory, context=context) as llm:
        first = _turn(llm, said, options.new_tokens, reuse=True)
        said += [*first.token_ids, *added]
        second = _turn(llm, said, 1, reuse=not options.afresh)
    return {
        "first_prompt_tokens": first.prompt_tokens,
        "new_tokens": options.new_tokens,
        "second_prompt_tokens": second.prompt_tokens,
        "reused_tokens": second.stats.reused_tokens,
        "first_turn_s": first.stats.ttft_s,
        "second_turn_s": second.stats.ttft_s,
        "first_bytes_read": first.stats.prefill_bytes_read,
        "second_bytes_read": second.stats.prefill_bytes_read,
        **_room(second),
    }


def _turn(llm: LLM, prompt: list[int], new_tokens: int, *, reuse: bool) -> Output:
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    (output,) = llm.generate(prompt, params, reuse=reuse, progress=False)
    return output


if __name__ == "__main__":
    main()
