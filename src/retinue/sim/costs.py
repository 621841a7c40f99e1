"""How long computing takes, as far as a replay needs to know it: a few numbers, from anywhere.

They come from the command line, from a document of `retinue bench`, or from what is remembered of
this machine. Every pass takes `pass_s`, every layer of it `layer_s` before its experts, and every
expert `expert_s`; further tokens of a pass add to both. What else costs is counted: each layer that
lacks an expert, each read that is started, each look ahead; and each
expert whose bits are expanded, which keeps its reader busy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import Any

from retinue.errors import UsageError
from retinue.memory.machine import Rate
from retinue.memory.read_speed import ReadSpeed
from retinue.policy.base import Costs
from retinue.policy.measured import MachineCosts
from retinue.sim.link import Roads
from retinue.types import Facts

# What no bandwidth explains, a layer: Python, norms, books. Between the ends of `engine/bands.py`.
LAYER_OVERHEAD_S = 0.2e-3
FLOPS_SHARE = 0.5  # of the measured rate that a prompt's experts reach, which are small


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of computing. `elsewhere_s` is one token in one expert at a second place, or None.

    `source` says where they are from.
    """

    expert_s: float  # one expert for one token
    layer_s: float  # a layer besides its experts, for one token
    expert_token_s: float = 0.0  # each further token of an expert
    layer_token_s: float = 0.0  # each further token of a layer
    held_s: float = 0.0  # of `layer_s`, the interpreter's own, in which readers get no turn
    pass_s: float = 0.0  # a pass besides its layers
    late_s: float = 0.0  # the experts of a layer that lacks some, beyond what they take otherwise
    start_s: float = 0.0  # the engine's own time for each read that it starts
    ahead_s: float = 0.0  # looking ahead from one layer
    expand_s: float = 0.0  # a reader's, for an expert of another precision, once it is read
    elsewhere_s: float | None = None
    source: str = "given"

    def experts(self, tokens: int) -> float:
        """One expert for `tokens` tokens."""
        return self.expert_s + (tokens - 1) * self.expert_token_s

    def layer(self, tokens: int) -> float:
        """A layer of a pass over `tokens` tokens, besides its experts."""
        return self.layer_s + (tokens - 1) * self.layer_token_s

    def shown(self, roads: Roads, size: int) -> Costs:
        """What policies may see of them; `size` is what reading one expert moves."""
        return Costs(roads.read_s(size), self.expert_s, self.layer_s, self.elsewhere_s)


def times_of_rates(facts: Facts, rate: Rate) -> Times:
    """From how fast this machine multiplies by weights of the model's format."""
    row, flops = rate.row_bytes_per_s, rate.flops_per_s * FLOPS_SHARE
    dense_flops = 2 * facts.dense_bytes_per_token / _weight_bytes(facts)
    expert_flops = 2 * facts.expert_bytes / _weight_bytes(facts)
    return Times(
        expert_s=facts.expert_bytes / row,
        layer_s=facts.dense_bytes_per_token / row / facts.layers + LAYER_OVERHEAD_S,
        expert_token_s=expert_flops / flops,
        layer_token_s=dense_flops / flops / facts.layers,
        source="how fast this machine multiplies",
    )


def times_of_profile(facts: Facts, costs: MachineCosts, rate: Rate | None) -> Times:
    """From what a pass cost here when the profile was made, all experts resident.

    A pass of one token is `base_s + token_s`: what its experts' bytes do not explain is divided
    over the layers.
    """
    pairs = facts.moe_layers * facts.top_k
    whole = costs.base_s + costs.token_s
    expert_s = 0.5 * whole / pairs
    if rate is not None:
        expert_s = min(expert_s, facts.expert_bytes / rate.row_bytes_per_s)
    token_s = costs.token_s / 2
    return Times(
        expert_s=expert_s,
        layer_s=(whole - pairs * expert_s) / facts.moe_layers,
        expert_token_s=token_s / pairs,
        layer_token_s=token_s / facts.moe_layers,
        source="what the profile measured here",
    )


def times_of_bench(facts: Facts, document: Mapping[str, Any], plain: Times | None = None) -> Times:
    """From a document of `retinue bench` on this model. Raises UsageError for one that is none.

    `plain` are those of a preset that does not look ahead: they say what waits take, and what the
    document's preset took beyond is its looking ahead. Stalls are left out: a replay has its own.
    """
    try:
        decode, prompt = _Phase.of(document), _Phase.of(document, "prefill_")
        tokens = float(document["decode_tokens_per_s"]) * float(document["decode_s"])
        looked_up = sum(int(document[name]) for name in ("hits", "pending", "misses"))
        prompt_tokens = float(document["prompt_tokens"])
        late_s = decode.each(document, "late_s", decode.lacking, decode.expert_s)
        start_s = decode.each(document, "start_s", decode.reads, decode.rest_s)
        if plain is not None:
            late_s = min(plain.late_s, decode.expert_s / max(1.0, decode.lacking))
        layers = tokens * facts.moe_layers
        expert_s = max(0.0, decode.expert_s - decode.lacking * late_s) / looked_up
        layer_s, ahead_s = max(0.0, decode.rest_s - decode.reads * start_s) / layers, 0.0
        held_s = max(0.0, layer_s - float(document["dense_s"]) / layers)
        if plain is not None and decode.looks:
            ahead_s = max(0.0, layer_s - plain.layer_s) * layers / decode.looks
            layer_s, held_s = min(layer_s, plain.layer_s), min(held_s, plain.held_s)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"not a document of `retinue bench` with some decoding: {error!r}",
            hint="write it with `retinue bench MODEL --json > FILE`",
        ) from error
    pairs = prompt_tokens * facts.moe_layers * facts.top_k
    touched = min(pairs, float(facts.total_experts))
    rows_s = prompt.expert_s - touched * expert_s - prompt.lacking * late_s
    own_s = prompt.rest_s - prompt.reads * start_s - prompt.looks * ahead_s
    further_s = own_s / facts.moe_layers - layer_s
    return Times(
        expert_s=expert_s,
        layer_s=layer_s,
        expert_token_s=max(0.0, rows_s / max(1.0, pairs - touched)),
        layer_token_s=max(0.0, further_s / max(1.0, prompt_tokens - 1)),
        held_s=held_s,
        late_s=late_s,
        start_s=start_s,
        ahead_s=ahead_s,
        expand_s=float(document.get("expand_s") or 0.0),
        source="a run of `retinue bench`",
    )


@dataclass(frozen=True, slots=True)
class _Phase:
    """What one phase of a run took, and how often: see `metrics.PhaseCounters`."""

    expert_s: float
    rest_s: float
    reads: float
    lacking: float
    looks: float

    @classmethod
    def of(cls, document: Mapping[str, Any], prefix: str = "") -> "_Phase":
        """From the keys that begin with `prefix`. An old document has no counts."""
        rest_s = float(document[f"{prefix}dense_s"]) + float(document[f"{prefix}overhead_s"])
        counts = (float(document.get(f"{prefix}{key}", 0)) for key in ("reads", "lacking", "looks"))
        return cls(float(document[f"{prefix}expert_s"]), rest_s, *counts)

    def each(self, document: Mapping[str, Any], key: str, count: float, whole_s: float) -> float:
        """What the document says of one of `count`, as far as it can be true of `whole_s`."""
        found = document.get(key)
        if found is None or not count:
            return 0.0
        return min(max(0.0, float(found)), whole_s / count)


def averaged(times: Sequence[Times]) -> Times:
    """The mean of each, of runs in different places. `elsewhere_s` is that of the first."""
    names = (item.name for item in fields(Times) if item.type is float)
    means = {name: fmean(getattr(each, name) for each in times) for name in names}
    return with_given(times[0], **means)


def read_speed_of(document: Mapping[str, Any]) -> ReadSpeed | None:
    """What a document of `retinue bench` says of reads; None: it is an old one."""
    found = document.get("read_latency_s"), document.get("reads_bytes_per_s")
    return None if None in found else ReadSpeed(*map(float, found))  # type: ignore[arg-type]


def with_given(times: Times, **given: float | None) -> Times:
    """`times` with the fields that are given."""
    changes: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
    return replace(times, **changes) if changes else times


def _weight_bytes(facts: Facts) -> float:
    """Bytes of one weight, about: of the type that is computed in, or of the stored format."""
    known = {"int8": 1.125, "int4": 0.625, "float32": 4.0}
    return known.get(facts.stored or facts.dtype, 2.0)
