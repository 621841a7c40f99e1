"""How long computing takes, as far as a replay needs to know it: a few numbers, from anywhere.

They come from the command line, from a document of `retinue bench`, or from what is remembered of
this machine. Every pass takes `pass_s`, every layer of it `layer_s` before its experts, and every
expert `expert_s`; further tokens of a pass add to both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from retinue.errors import UsageError
from retinue.memory.machine import Rate
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
    pass_s: float = 0.0  # a pass besides its layers
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


def times_of_bench(facts: Facts, document: Mapping[str, Any]) -> Times:
    """From a document of `retinue bench` on this model. Raises UsageError for one that is none.

    Stalls are left out: a replay has its own.
    """
    try:
        tokens = float(document["decode_tokens_per_s"]) * float(document["decode_s"])
        looked_up = sum(int(document[name]) for name in ("hits", "pending", "misses"))
        expert_s = float(document["expert_s"]) / looked_up
        rest_s = float(document["dense_s"]) + float(document["overhead_s"])
        layer_s = rest_s / tokens / facts.moe_layers
        prompt = float(document["prompt_tokens"])
        pairs = prompt * facts.moe_layers * facts.top_k
        touched = min(pairs, float(facts.total_experts))
        rows_s = float(document["prefill_expert_s"]) - touched * expert_s
        dense_s = float(document["prefill_dense_s"]) + float(document["prefill_overhead_s"])
        further_s = dense_s / facts.moe_layers - layer_s
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"not a document of `retinue bench` with some decoding: {error!r}",
            hint="write it with `retinue bench MODEL --json > FILE`",
        ) from error
    return Times(
        expert_s=expert_s,
        layer_s=layer_s,
        expert_token_s=max(0.0, rows_s / max(1.0, pairs - touched)),
        layer_token_s=max(0.0, further_s / max(1.0, prompt - 1)),
        source="a run of `retinue bench`",
    )


def latency_of_bench(document: Mapping[str, Any], facts: Facts, read_bytes: int) -> float | None:
    """What a layer's reads took beyond their bytes in a run of `retinue bench`, in seconds.

    From runs that read nothing ahead alone, such as of `on-demand`; None: it says nothing. Of a
    layer that lacks experts, the others are computed while these are read.
    """
    hits, pending, misses = (int(document[name]) for name in ("hits", "pending", "misses"))
    looked_up = hits + pending + misses
    disk = document.get("disk_bytes_per_s")
    if pending or not misses or not disk:
        return None
    layers = looked_up / facts.top_k  # of one token each
    waiting = layers * (1 - (hits / looked_up) ** facts.top_k)
    beside_s = float(document["expert_s"]) * hits / looked_up * waiting / layers
    bytes_s = misses * read_bytes / float(disk)
    return max(0.0, (float(document["stall_s"]) + beside_s - bytes_s) / waiting)


def with_given(times: Times, **given: float | None) -> Times:
    """`times` with the fields that are given."""
    changes: dict[str, Any] = {name: each for name, each in given.items() if each is not None}
    return replace(times, **changes) if changes else times


def _weight_bytes(facts: Facts) -> float:
    """Bytes of one weight, about: of the type that is computed in, or of the stored format."""
    known = {"int8": 1.125, "int4": 0.625, "float32": 4.0}
    return known.get(facts.stored or facts.dtype, 2.0)
