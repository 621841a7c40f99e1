"""`retinue plan`: what would happen, without loading anything."""

from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, fail, note
from retinue.config import Config, format_size
from retinue.engine.bands import Machine, compute_format
from retinue.engine.plan import PROMPT_TOKENS, Plan, make_plan
from retinue.engine.reserve import given_of, policies_of
from retinue.errors import Refused
from retinue.memory.home import locate_headers, weights_near
from retinue.memory.machine import cores, known_speeds
from retinue.memory.rates import known_rates
from retinue.policy.preset import Preset
from retinue.policy.presets import preset
from retinue.types import Facts


def execute(options: Namespace) -> int:
    """Print the plan; returns 0, or 3 when the model does not fit."""
    from retinue.model.survey import survey

    config = config_from(options)
    chosen = preset(config.preset)
    folder = locate_headers(options.model, note)
    facts = survey(folder, config.precision)
    threads = config.threads or cores()
    rates = known_rates(threads, [compute_format(facts)])
    machine = Machine(known_speeds(weights_near(folder)), rates, threads)
    plan = make_plan(facts, config, machine)
    if plan.split is not None:
        plan.reasons.extend(_lacking(folder, facts, chosen, config))
    print(_text(plan), file=audience(options.json))
    if options.json:
        emit_json(_document(plan))
    if plan.split is None:
        fail(*plan.reasons)
        return 3
    return 0


def _lacking(folder: Path, facts: Facts, chosen: Preset, config: Config) -> list[str]:
    """What the preset still needs before it can run here, and how to get it."""
    try:
        policies_of(chosen, config, given_of(folder, facts, facts.total_experts, chosen, config))
    except Refused as error:
        return [f"`{chosen.name}` cannot run yet: {error}; {error.hint}"]
    return []


def _document(plan: Plan) -> dict[str, object]:
    split = plan.split
    placement = (
        {
            "fixed": split.fixed,
            "kv": split.kv,
            "workspace": split.workspace,
            "experts": split.experts,
        }
        if split
        else {}
    )
    return {
        "fits": split is not None,
        "budget_bytes": plan.budget,
        "smallest_budget_bytes": plan.smallest,
        "placement": placement,
        "resident_experts": split.slots if split else 0,
        "total_experts": plan.facts.total_experts,
        "context": split.context if split else None,
        "decode_tokens_per_s": asdict(plan.decode),
        "prefill_tokens_per_s": asdict(plan.prefill),
        "reasons": plan.reasons,
    }


def _text(plan: Plan) -> str:
    facts, split = plan.facts, plan.split
    stored = f" ({facts.stored} experts)" if facts.stored else ""
    lines = [
        f"{facts.name}: {facts.family}, {facts.dtype}{stored}, {facts.total_experts} experts of"
        f" {format_size(facts.expert_bytes)} in {facts.moe_layers} layers, {facts.top_k} a token",
        "",
    ]
    if split is None:
        lines.append("does not fit")
    else:
        lines += [
            f"budget      {format_size(split.budget):>10}",
            f"  fixed     {format_size(split.fixed):>10}  runtime, and weights of every token",
            f"  kv        {format_size(split.kv):>10}  for {split.kv_tokens} tokens",
            f"  workspace {format_size(split.workspace):>10}"
            f"  for prompts, {split.chunk} tokens at once",
            f"  experts   {format_size(split.experts):>10}"
            f"  {split.slots} of {facts.total_experts} resident",
            "",
            f"decode      {plan.decode.low:.2f} to {plan.decode.high:.2f} tokens/s",
            f"prefill     {plan.prefill.low:.0f} to {plan.prefill.high:.0f} tokens/s"
            f" (a prompt of {min(PROMPT_TOKENS, split.context)})",
            *[f"- {reason}" for reason in plan.reasons],
        ]
    lines.append(f"smallest budget: {format_size(plan.smallest)} (`--memory {plan.smallest}`)")
    return "\n".join(lines)
