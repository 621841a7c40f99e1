"""What fits where and how fast it will be, from facts and measured speeds alone. No torch."""

from dataclasses import dataclass, replace

from retinue.config import Config, format_size
from retinue.engine.bands import Band, Machine, Reads, compute_format, decode_band, prefill_band
from retinue.engine.reserve import limits_of
from retinue.errors import DoesNotFit
from retinue.memory.budget import Split, budget_bytes
from retinue.policy.preset import Preset
from retinue.policy.presets import preset
from retinue.types import Facts

# Misses at best: measured with 12, 37 and 50 % resident were 55, 22 and 19 % of the experts used,
# 0.88 ** 4.7, 0.63 ** 3.3 and 0.50 ** 2.4.
REPETITION = 5
PROMPT_TOKENS = 512  # for which the prefill speed is given


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer of `retinue plan`; `split` is None where the model does not fit."""

    facts: Facts
    budget: int
    smallest: int
    split: Split | None
    decode: Band
    prefill: Band
    reasons: list[str]


def make_plan(facts: Facts, config: Config, machine: Machine) -> Plan:
    """Divide the budget and estimate speeds."""
    none, chosen = Band(0.0, 0.0), preset(config.preset)
    fixed = chosen.fixed
    try:
        limits = limits_of(facts, chosen, config)
    except DoesNotFit as error:
        budget, smallest = budget_bytes(config.memory), _smallest(facts, config, chosen)
        return Plan(facts, budget, smallest, None, none, none, [str(error), error.hint])
    return Plan(
        facts,
        limits.budget,
        limits.smallest,
        limits,
        _decode(facts, limits, machine, fixed),
        _prefill(facts, limits, machine, fixed),
        _reasons(facts, limits, fixed),
    )


def _smallest(facts: Facts, config: Config, chosen: Preset) -> int:
    """The smallest budget, whether that or `--experts` is what is too small."""
    try:
        return limits_of(facts, chosen, replace(config, experts=None)).smallest
    except DoesNotFit as error:
        return error.smallest_bytes


def _decode(facts: Facts, limits: Split, machine: Machine, fixed: bool) -> Band:
    """Between routing that is uniform, the worst for a cache, and routing that repeats itself.

    `fixed`: what is resident never changes, so that nothing is read.
    """
    missing = 0.0 if fixed else 1 - limits.slots / facts.total_experts
    used = facts.top_k * facts.moe_layers
    most = used * facts.read_bytes * missing
    return decode_band(facts, machine, used, Reads(most, most * missing ** (REPETITION - 1)))


def _prefill(facts: Facts, limits: Split, machine: Machine, fixed: bool) -> Band:
    """A prompt of PROMPT_TOKENS, before which all is on the disk, or as much as fits in memory."""
    tokens = min(PROMPT_TOKENS, limits.context)
    touched = 1 - (1 - facts.top_k / facts.experts_per_layer) ** tokens
    touched *= facts.total_experts
    cold = 0.0 if fixed else touched
    reads = Reads(cold * facts.read_bytes, max(0.0, cold - limits.slots) * facts.read_bytes)
    return prefill_band(facts, machine, tokens, touched, reads)


def _reasons(facts: Facts, limits: Split, fixed: bool) -> list[str]:
    share = limits.slots / facts.total_experts
    reasons = []
    if facts.stored:
        decoded = "" if compute_format(facts) == facts.stored else ", decoded when they are used"
        reasons.append(f"the experts stay in {facts.stored}{decoded}")
    if limits.embedding_stays:
        rows = format_size(facts.embedding_bytes)
        reasons.append(f"the embedding's {rows} stay in their file: of each token a row is read")
    if limits.slots == facts.total_experts:
        return [*reasons, "every expert stays in memory"]
    others = "serve for the others" if fixed else "the others are read when they are needed"
    joined = " and " if fixed else "; "
    reasons.append(f"{share:.0%} of the experts stay in memory{joined}{others}")
    missing = (facts.total_experts - limits.slots) * facts.slot_bytes
    reasons.append(f"{format_size(missing)} more would hold every expert")
    if not fixed and limits.slots < 2 * facts.top_k * facts.moe_layers:
        reasons.append("fewer slots than two tokens use: decoding reads almost every expert")
    return reasons
