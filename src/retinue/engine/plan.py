"""What fits where and how fast it will be, from facts and measured speeds alone. No torch."""

from dataclasses import dataclass

from retinue.config import Config, format_size
from retinue.engine.bound import TokenCost
from retinue.errors import DoesNotFit
from retinue.memory.budget import Split, budget_bytes, split
from retinue.memory.machine import Speeds
from retinue.policy.presets import preset
from retinue.types import Facts

# A decode step reaches this share of its bound, at worst and at best; a core does this many
# floating-point operations a second in the matrix products of prefill. See docs/LOG.md.
EFFICIENCY = (0.55, 1.05)
CORE_FLOPS = (0.05e12, 0.7e12)
CORE_DECODED_BYTES_PER_S = (1e9, 4e9)  # of experts that are stored in a format of their own
# Misses at best: measured with 37 % resident were 23 % of the experts used, 0.63 ** 3.2.
REPETITION = 4
PROMPT_TOKENS = 512  # for which the prefill speed is given


@dataclass(frozen=True, slots=True)
class Band:
    """A speed that is expected to lie between two bounds, in tokens a second."""

    low: float
    high: float


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


def make_plan(facts: Facts, config: Config, speeds: Speeds, threads: int) -> Plan:
    """Divide the budget and estimate speeds."""
    none, fixed = Band(0.0, 0.0), preset(config.preset).build().placement.fixed
    try:
        limits = split(facts, **config.room(), each_layer=fixed)
    except DoesNotFit as error:
        budget, smallest = budget_bytes(config.memory), _smallest(facts, config, fixed)
        return Plan(facts, budget, smallest, None, none, none, [str(error), error.hint])
    return Plan(
        facts,
        limits.budget,
        limits.smallest,
        limits,
        _decode(facts, limits, speeds, threads, fixed),
        _prefill(facts, limits, speeds, threads, fixed),
        _reasons(facts, limits, fixed),
    )


def _smallest(facts: Facts, config: Config, fixed: bool) -> int:
    """The smallest budget, whether that or `--experts` is what is too small."""
    try:
        room = config.room() | {"experts": None}
        return split(facts, **room, each_layer=fixed).smallest
    except DoesNotFit as error:
        return error.smallest_bytes


def _decode(facts: Facts, limits: Split, speeds: Speeds, threads: int, fixed: bool) -> Band:
    """Between routing that is uniform, the worst for a cache, and routing that repeats itself.

    `fixed`: what is resident never changes, so that nothing is read.
    """
    share = 1.0 if fixed else limits.slots / facts.total_experts
    used = facts.top_k * facts.moe_layers
    rates = []
    misses = (1 - share, (1 - share) ** REPETITION)
    for miss_rate, efficiency, decoded in zip(
        misses, EFFICIENCY, CORE_DECODED_BYTES_PER_S, strict=True
    ):
        cost = TokenCost(
            read_bytes=used * miss_rate * facts.read_bytes,
            weight_bytes=facts.dense_bytes_per_token + used * facts.expert_bytes,
        )
        decode_s = used * facts.decoded_bytes / (decoded * threads)
        rates.append(1 / (1 / (cost.tokens_per_s(speeds) * efficiency) + decode_s))
    return Band(*rates)


def _prefill(facts: Facts, limits: Split, speeds: Speeds, threads: int, fixed: bool) -> Band:
    """A prompt of PROMPT_TOKENS: reading the experts it touches against computing it."""
    tokens = min(PROMPT_TOKENS, limits.context)
    touched = 1 - (1 - facts.top_k / facts.experts_per_layer) ** tokens
    cold = 0.0 if fixed else touched * facts.total_experts
    warm = max(0.0, cold - limits.slots)
    read_s = [count * facts.read_bytes / speeds.disk_bytes_per_s for count in (cold, warm)]
    compute_s = [facts.flops_per_token * tokens / (flops * threads) for flops in CORE_FLOPS]
    return Band(tokens / (read_s[0] + compute_s[0]), tokens / max(read_s[1], compute_s[1]))


def _reasons(facts: Facts, limits: Split, fixed: bool) -> list[str]:
    share = limits.slots / facts.total_experts
    reasons = []
    if facts.stored:
        reasons.append(f"the experts stay in {facts.stored}, and are decoded when they are used")
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
