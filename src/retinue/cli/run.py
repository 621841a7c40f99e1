"""`retinue run`: one answer, streamed; or a chat."""

import signal
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from retinue.cli.interrupts import cancel_on
from retinue.cli.options import config_from, useless
from retinue.cli.terminal import emit_json, fail, note, summary
from retinue.config import Config, format_size
from retinue.engine.bands import Machine
from retinue.engine.bound import with_bound
from retinue.engine.llm import LLM, Prompt
from retinue.engine.watch import Watch
from retinue.errors import UsageError
from retinue.memory.budget import split
from retinue.memory.home import locate
from retinue.memory.machine import Speeds, known_speeds, remembered_speeds
from retinue.memory.rates import remembered_rates
from retinue.model.survey import survey
from retinue.types import Output, SamplingParams


def execute(options: Namespace) -> int:
    """Answer the prompt, or chat; returns the exit code."""
    config = config_from(options)
    prompt = _prompt(options)
    params = replace(config.sampling(), logprobs=options.logprobs, ignore_eos=options.ignore_eos)
    if not options.json:
        useless(options, ("logprobs",), "without `--json`, which shows them")
    folder = locate(options.model, note)
    speeds = _speeds(folder, config) if options.json else None
    with _open(folder, config) as llm:
        if prompt is None:
            from retinue.cli.chat import chat

            return chat(llm, params, options.system or "")
        return _answer(llm, prompt, params, speeds)


def _speeds(folder: Path, config: Config) -> Speeds:
    """The machine's speeds, for the bound: the remembered ones, or measured before loading."""
    limits = split(survey(folder, config.precision), **config.room())
    speeds = known_speeds(folder, at_most_bytes=limits.budget - limits.fixed)
    return speeds.limited(config.read_bytes_per_s)


def _open(folder: Path, config: Config) -> LLM:
    llm = LLM.from_config(folder, config)
    assembly = llm.assembly
    for text in assembly.notes:
        note(f"note: {text}", "yellow")
    split = assembly.split
    note(
        f"{assembly.facts.name}: room for {split.slots} of {assembly.facts.total_experts} experts"
        f" in {format_size(split.budget)}, loaded in {assembly.load_s:.1f} s"
    )
    return llm


def _prompt(options: Namespace) -> Prompt | None:
    """The prompt from the command line or a pipe; None asks for a chat."""
    text: str | None = options.prompt
    chatting = text is None and sys.stdin is not None and sys.stdin.isatty()
    if options.system is not None and not chatting:
        raise UsageError("only a chat has a --system", hint="a PROMPT is fed as it is")
    if chatting:
        if options.json or options.token_ids:
            raise UsageError("a chat has no --json and no --token-ids", hint="give a PROMPT")
        return None
    try:
        if text is None:
            text = sys.stdin.read() if sys.stdin is not None else ""
        text.encode()  # an argument that was no text has surrogates
    except UnicodeError as error:
        raise UsageError("the prompt is not a text", hint="write it in UTF-8") from error
    if not text:
        raise UsageError("the prompt is empty", hint="give a PROMPT, or write it to stdin")
    if not options.token_ids:
        return text
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"not token ids: `{text[:40]}`", hint="such as `5 17 200`") from error


def _answer(llm: LLM, prompt: Prompt, params: SamplingParams, speeds: Speeds | None) -> int:
    """Stream the answer; with `speeds`, say nothing on stdout but the JSON at the end."""
    output: Output | None = None
    watch, told = watching(llm), llm.config.task is not None
    with cancel_on(llm.cancel, signal.SIGINT, signal.SIGTERM) as came:
        for output in llm.stream(prompt, params):
            if not told and output.task is not None:
                note(f"task: {output.task} (inferred from the prompt; `--task NAME` says another)")
            told = True
            if speeds is None:
                print(output.delta, end="", flush=True)
            if watch is not None and (slow := watch.during()):
                note(f"\n{slow}", "yellow")
    assert output is not None
    if speeds is None:
        print(flush=True)
    note(summary(output))
    if watch is not None and (slow := watch.after()):
        note(slow, "yellow")
    if speeds is not None:
        stats = with_bound(output.stats, llm.assembly.facts, speeds)
        emit_json(document(replace(output, stats=stats)))
    if came:
        fail(f"stopped by {signal.Signals(came[0]).name} after {len(output.token_ids)} tokens")
        return 1
    return 0


def watching(llm: LLM) -> Watch | None:
    """Who sees whether decoding is slow, if it is known what this machine should give."""
    assembly = llm.assembly
    speeds = remembered_speeds(assembly.folder)
    if speeds is None:
        return None
    speeds = speeds.limited(llm.config.read_bytes_per_s)
    machine = Machine(speeds, remembered_rates(assembly.threads), assembly.threads)
    return Watch(assembly.facts, machine, assembly.metrics.total.decode)


def document(output: Output) -> dict[str, Any]:
    """An answer as `--json` gives it."""
    result: dict[str, Any] = {
        "text": output.text,
        "token_ids": output.token_ids,
        "prompt_tokens": output.prompt_tokens,
        "new_tokens": len(output.token_ids),
        "finish_reason": output.finish_reason,
        "stats": output.stats.as_dict(),
    }
    if output.logprobs is not None:
        result["logprobs"] = [asdict(item) for item in output.logprobs]
    return result
