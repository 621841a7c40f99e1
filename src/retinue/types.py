"""The words of the project as data: frozen, slotted, without torch.

This module knows nothing of files, models or threads; everything else may import it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Phase = Literal["prefill", "decode"]
BLOCK_TOKENS = 16  # of the key/value pool: what is shared between sequences is shared by blocks
FinishReason = Literal["stop", "length", "cancelled", "error"]


class Expert(NamedTuple):
    """The identity of one feed-forward network behind a router: decoder layer and index."""

    layer: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


@dataclass(frozen=True, slots=True)
class Want:
    """Experts of one layer that a predictor would like to have; the most wanted first."""

    layer: int
    experts: IntArray  # [n]
    scores: FloatArray  # [n], larger is more wanted


@dataclass(frozen=True, slots=True)
class Demand:
    """What one layer needs in one step: the distinct experts, with their tokens and weights."""

    layer: int
    experts: IntArray  # [n], ascending
    tokens: IntArray  # [n], how many tokens chose each
    weight: FloatArray  # [n], summed routing weight of each


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen from logits, and when to stop.

    Temperature 0 is greedy. `seed` makes a sampled answer reproducible. `stop` holds strings
    that end the answer and are not part of it. `logprobs` is the number of alternatives that
    are reported for each new token (0: only the chosen token; None: nothing).

    Before anything is chosen, logits change in this order: `repetition_penalty` divides those of
    tokens in prompt and answer where they are positive, and multiplies them elsewhere (1: off;
    CTRL, arXiv 1909.05858); `frequency_penalty` is subtracted once for each time that a token is
    in the answer, `presence_penalty` once if it is there at all (both from -2 to 2, 0: off);
    `logit_bias` adds -100 to 100 to single token ids. The last three are those of OpenAI's
    interface. Raises UsageError for a value out of range.
    """

    temperature: float = 0.0
    max_new_tokens: int = 256
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: Sequence[str] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        heat, penalty = self.temperature, self.repetition_penalty
        _check("temperature", heat, 0 <= heat < math.inf, "a number, 0 or more")
        _check("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "1 or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, up to 1")
        _check("top_k", self.top_k, self.top_k >= 0, "0 (off) or more")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        in_range = 0 < penalty < math.inf
        _check("repetition_penalty", penalty, in_range, "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, -2 <= value <= 2, "from -2 to 2")
        biases = self.logit_bias
        in_range = all(token >= 0 and -100 <= bias <= 100 for token, bias in biases.items())
        _check("logit_bias", biases, in_range, "token ids with numbers from -100 to 100")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")
        in_range = self.logprobs is None or 0 <= self.logprobs <= 100
        _check("logprobs", self.logprobs, in_range, "None, or from 0 to 100")
        in_range = self.seed is None or 0 <= self.seed < 2**63
        _check("seed", self.seed, in_range, "None, or from 0 to 2**63 - 1")


def _check(name: str, value: object, valid: bool, allowed: str) -> None:
    if not valid:
        raise UsageError(f"{name} is out of range: `{value}`", hint=f"{name} must be {allowed}")


@dataclass(frozen=True, slots=True)
class Deadline:
    """By when tokens are due, in seconds; None: whenever they come.

    `first_token_s` counts from the arrival to the first token, `between_tokens_s` from each token
    to the next one.
    """

    first_token_s: float | None = None
    between_tokens_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("first_token_s", "between_tokens_s"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 < value < math.inf, "seconds, above 0")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One new token with its log-probability and the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), the most likely first


@dataclass(frozen=True, slots=True)
class Stats:
    """What one request cost. The expert counters and `*_bytes*` are those of the decode phase."""

    load_s: float = 0.0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    decode_median_tokens_per_s: float = 0.0
    peak_rss_bytes: int = 0
    budget_bytes: int = 0
    resident_experts: int = 0
    total_experts: int = 0
    hits: int = 0
    pending: int = 0
    misses: int = 0
    hit_rate: float = 0.0
    bytes_read: int = 0
    bytes_read_per_token: float = 0.0
    read_bytes_per_s: float = 0.0
    stall_s: float = 0.0  # with the three that follow: all of `decode_s`
    expert_s: float = 0.0
    dense_s: float = 0.0
    overhead_s: float = 0.0
    degraded_share: float = 0.0
    used_bytes_read: int = 0
    prefill_bytes_read: int = 0
    prefill_stall_s: float = 0.0
    prefill_expert_s: float = 0.0
    prefill_dense_s: float = 0.0
    prefill_overhead_s: float = 0.0
    # How often what a replay takes times of was done, and what one of it took, where that varied:
    # reads that were started, layers that lacked an expert, looks ahead; and expanding the bits of
    # an expert that was read in another precision.
    reads: int = 0
    lacking: int = 0
    looks: int = 0
    prefill_reads: int = 0
    prefill_lacking: int = 0
    prefill_looks: int = 0
    late_s: float | None = None
    start_s: float | None = None
    expand_s: float | None = None
    reused_tokens: int = 0
    disk_bytes_per_s: float | None = None
    memory_bytes_per_s: float | None = None
    bound_tokens_per_s: float | None = None
    share_of_bound: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON names them; bounds that were not measured are left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Output:
    """An answer, whole or (from `stream`) so far; `delta` is the text that is new in this one.

    `task` is the kind of work that it was served as, None where that is unknown.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    delta: str = ""
    logprobs: list[TokenLogprob] | None = None
    stats: Stats = field(default_factory=Stats)
    task: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a checkpoint needs, read from its headers and configuration alone. JSON-shaped."""

    name: str
    family: str
    dtype: str
    layers: int
    moe_layers: int
    experts_per_layer: int
    total_experts: int
    top_k: int
    expert_bytes: int  # of one expert's weights as they are in memory
    slot_bytes: int  # room that one expert takes in memory, alignment included
    dense_bytes: int  # of all weights that are not routed experts, in memory
    dense_bytes_per_token: int  # of those, what one decode step reads
    kv_bytes_per_token: int
    max_context: int
    vocab_size: int
    workspace_bytes: int  # whatever the length
    workspace_bytes_per_context: int  # a token of context
    workspace_bytes_per_token: int  # of a prefill chunk
    workspace_bytes_per_pair: int  # of a prefill chunk's token and a context position
    flops_per_token: int
    state_bytes: int = 0  # of a sequence, whatever its length: recurrent and convolution states
    stored: str = ""  # the experts' format, where it is not the type that is computed in
    decoded_bytes: int = 0  # of one expert in that type, where it has to be decoded to it
    plain_bytes: int = 0  # of one expert in the files, where it is encoded when it is read
    routed: tuple[int, ...] = ()  # the layers that have routed experts
    embedding_bytes: int = 0  # of the dense ones, if the embedding may stay in its file

    def __post_init__(self) -> None:
        object.__setattr__(self, "routed", tuple(self.routed))  # JSON has lists

    @property
    def read_bytes(self) -> int:
        """Bytes of one expert's weights that a miss reads."""
        return self.plain_bytes or self.expert_bytes

    @property
    def min_slots(self) -> int:
        """The fewest slots that work: one token's experts of one layer."""
        return self.top_k
