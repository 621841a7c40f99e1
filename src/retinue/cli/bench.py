"""`retinue bench`: the same work for every engine, against the machine's own limits."""

import random
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from retinue.cli.options import config_from, useless
from retinue.cli.terminal import audience, emit_json, note, table
from retinue.config import Config, format_size
from retinue.engine.bands import Machine, compute_format
from retinue.engine.bound import with_bound
from retinue.engine.llm import LLM
from retinue.engine.request import Request, new_request
from retinue.engine.watch import Watch, expected
from retinue.errors import UsageError
from retinue.memory.budget import split
from retinue.memory.home import locate
from retinue.memory.machine import Speeds, cores, measure_disk, measure_memory
from retinue.memory.rates import known_rates
from retinue.memory.read_speed import measure_reads
from retinue.model.survey import survey
from retinue.types import Facts, SamplingParams, Stats

PROMPT_TOKENS = 64


def execute(options: Namespace) -> int:
    """Measure one prefill and N decode steps; returns the exit code."""
    options = _work(options)
    needed = options.prompt_tokens + options.new_tokens + 1
    config = config_from(options, context=None if options.prompts else needed)
    folder = locate(options.model, note)
    facts = survey(folder, config.precision)
    limits = split(facts, **config.room())
    # Nothing is loaded yet, so the probe may take what the model will.
    room = min(384 << 20, limits.budget - limits.fixed)
    files = sorted(folder.glob("*.safetensors"))
    threads = config.threads or cores()
    before = Speeds(measure_disk(files), measure_memory(threads=threads, at_most_bytes=room))
    before = before.limited(config.read_bytes_per_s)
    reads = measure_reads(folder, facts.read_bytes, limit=config.read_bytes_per_s)
    rates = known_rates(threads, [compute_format(facts)], fresh=True, at_most_bytes=room)
    with LLM.from_config(folder, config) as llm:
        for text in llm.assembly.notes:
            note(f"note: {text}", "yellow")
        llm.fill()
        resolved, decode = llm.assembly.preset.name, llm.assembly.metrics.total.decode
        watch = Watch(facts, Machine(before, rates, threads), decode)
        stats, prompt_tokens = _measure(llm, options, facts, config)
        slow = watch.after()
        after = Speeds(measure_disk(files), _memory_again(llm, threads, before))
        after = after.limited(config.read_bytes_per_s)
    speeds = Speeds(
        (before.disk_bytes_per_s + after.disk_bytes_per_s) / 2,
        (before.memory_bytes_per_s + after.memory_bytes_per_s) / 2,
    )
    stats = with_bound(stats, facts, speeds)
    document = _document(options, config, stats, threads, prompt_tokens)
    document |= reads.as_dict()
    document |= {"stored": facts.stored or facts.dtype, "resolved_preset": resolved}
    band = expected(facts, Machine(speeds, rates, threads), decode)
    if band is not None:
        document |= {"expected_decode_tokens_per_s": asdict(band)}
    print(_text(document, stats, before, after), file=audience(options.json))
    if slow:
        note(slow, "yellow")
    if stats.peak_rss_bytes > stats.budget_bytes:
        note("the peak is over the budget: please report this with the model's name", "red")
    if options.json:
        emit_json(document)
    return 0


def _work(options: Namespace) -> Namespace:
    """The options with how many tokens there are. Raises UsageError for none, and for both ways."""
    if options.prompts:
        useless(options, ("prompt_tokens",), "with `--prompts`, which says what is read")
    given = options.prompt_tokens
    work = {
        "prompt_tokens": PROMPT_TOKENS if given is None else given,
        "new_tokens": options.new_tokens,
    }
    for (name, value), least in zip(work.items(), (1, 0), strict=True):
        if value < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} is out of range: `{value}`", hint=f"{least} or more")
    return Namespace(**vars(options) | work)


def _measure(llm: LLM, options: Namespace, facts: Facts, config: Config) -> tuple[Stats, int]:
    """Prefill and decode with forced ids; returns the stats and the prompt's length."""
    ids = random.Random(config.seed or 0)
    count = options.new_tokens
    if options.prompts:
        prompts = [llm.encode(text) for text in _texts(Path(options.prompts))]
    else:
        prompts = [[ids.randrange(facts.vocab_size) for _ in range(options.prompt_tokens)]]
    for prompt in prompts:
        if len(prompt) + count + 1 > llm.assembly.split.context:
            raise UsageError(
                f"{len(prompt)} tokens of prompt and {count} new ones do not fit into a context of"
                f" {llm.assembly.split.context}",
                hint=f"use `--context {len(prompt) + count + 1}`, or fewer tokens",
            )
        forced = [ids.randrange(facts.vocab_size) for _ in range(count + 1)]
        request = _run(llm, prompt, forced, config)
    return llm.stats(request), len(request.prompt)


def _run(llm: LLM, prompt: list[int], forced: list[int], config: Config) -> Request:
    """Feed `prompt`, then `forced`, whatever the model would have said."""
    params = SamplingParams(max_new_tokens=len(forced), ignore_eos=True)
    request = new_request(prompt, params, None, forced=forced, task=config.task)
    for _ in llm.run(request):
        pass
    return request


def _texts(path: Path) -> list[str]:
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read `{path}`: {error}") from error
    if not texts:
        raise UsageError(f"no prompts in `{path}`", hint="write one text a line")
    return texts


def _memory_again(llm: LLM, threads: int, before: Speeds) -> float:
    """Memory bandwidth once more, over experts that are resident: nothing new is allocated."""
    cache, tier = llm.assembly.cache, llm.assembly.tier
    slots = np.unique(cache.slot_of[cache.slot_of >= 0])
    usable = len(slots) // threads * threads
    if usable * tier.slot_bytes < threads * (64 << 20):
        return before.memory_bytes_per_s
    arrays = [tier.tensor(int(slot)).numpy().view(np.int64) for slot in slots[:usable]]
    return measure_memory(threads=threads, arrays=arrays)


def _document(
    options: Namespace, config: Config, stats: Stats, threads: int, prompt_tokens: int
) -> dict[str, Any]:
    return {
        "model": options.model,
        "preset": config.preset,
        "precision": config.precision,
        "threads": threads,
        "prompt_tokens": prompt_tokens,
        "new_tokens": options.new_tokens,
        "read_limit": config.read_limit,
        **stats.as_dict(),
    }


def _text(document: dict[str, Any], stats: Stats, before: Speeds, after: Speeds) -> str:
    rows = [
        ("load", f"{stats.load_s:.2f} s", ""),
        ("first token", f"{stats.ttft_s:.2f} s", f"{document['prompt_tokens']} tokens of prompt"),
        ("prefill", f"{stats.prefill_tokens_per_s:.1f} tokens/s", f"{stats.prefill_s:.2f} s"),
        ("decode", f"{stats.decode_tokens_per_s:.2f} tokens/s", f"{stats.decode_s:.2f} s"),
    ]
    if stats.bound_tokens_per_s and stats.share_of_bound:
        share = f"{stats.share_of_bound:.0%} of it reached"
        rows.append(("bound", f"{stats.bound_tokens_per_s:.2f} tokens/s", share))
    if band := document.get("expected_decode_tokens_per_s"):
        low_high = f"{band['low']:.2f} to {band['high']:.2f}"
        rows.append(("expected", low_high, "decode, with these reads"))
    looked_up = f"{stats.hits} hits, {stats.pending} pending, {stats.misses} misses"
    experts = f"{stats.resident_experts} of {stats.total_experts} experts resident"
    peak = f"{format_size(stats.peak_rss_bytes)} of {format_size(stats.budget_bytes)}"
    if stats.degraded_share:
        rows.append(("degraded", f"{stats.degraded_share:.1%}", "of routing weight"))
    rows += [
        ("hit rate", f"{stats.hit_rate:.1%}", looked_up),
        (
            "read",
            f"{format_size(stats.bytes_read_per_token)} a token",
            f"{stats.stall_s:.2f} s stalled",
        ),
        ("peak memory", peak, experts),
        ("disk", _two(before.disk_bytes_per_s, after.disk_bytes_per_s), "before and after"),
        ("memory", _two(before.memory_bytes_per_s, after.memory_bytes_per_s), "before and after"),
    ]
    return f"{table(('measured', '', ''), rows)}\n\n{_where(stats)}"


def _where(stats: Stats) -> str:
    """Where each phase's seconds went: the last four add up to the first."""
    header = ("phase", "seconds", "at the bound", "read stall", "experts", "dense", "overhead")
    bound = ""
    if stats.share_of_bound:
        bound = f"{stats.decode_s * stats.share_of_bound:.2f}"
    phases = {
        "prefill": (stats.prefill_s, ("prefill_stall_s", "prefill_expert_s", "prefill_dense_s")),
        "decode": (stats.decode_s, ("stall_s", "expert_s", "dense_s")),
    }
    rows = []
    for name, (whole_s, keys) in phases.items():
        parts = [getattr(stats, key) for key in keys]
        shown = [_part(part, whole_s) for part in [*parts, whole_s - sum(parts)]]
        rows.append((name, f"{whole_s:.2f}", bound if name == "decode" else "", *shown))
    return table(header, rows)


def _part(seconds: float, whole_s: float) -> str:
    return f"{seconds:.2f} ({seconds / whole_s:.0%})" if whole_s else ""


def _two(first: float, second: float) -> str:
    return f"{first / 1e9:.2f} and {second / 1e9:.2f} GB/s"
