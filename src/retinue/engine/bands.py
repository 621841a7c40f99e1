"""How long passes should take on this machine, as bands.

A pass reads experts that are not there and multiplies by weights; beside that it does what no
bandwidth explains: Python, norms, books. At best reading and computing overlap wholly, at worst
not at all. The shares say how far runs came from the probes, see docs/LOG.md.
"""

from dataclasses import dataclass

from retinue.memory.machine import Rates, Speeds
from retinue.types import Facts

# At worst and at best: shares of the measured speeds, and seconds of a pass in each layer.
DISK = (0.7, 1.2)
ROWS = (0.6, 1.2)
FLOPS = (0.25, 1.2)
STEP_LAYER_S = (1.2e-3, 0.03e-3)
PROMPT_LAYER_S = (6e-3, 0.1e-3)
CORE_DECODED_BYTES_PER_S = (1e9, 4e9)  # of experts in a format that no kernel takes


@dataclass(frozen=True, slots=True)
class Machine:
    """What was measured here. `rates` are by format, and may lack some."""

    speeds: Speeds
    rates: Rates
    threads: int


@dataclass(frozen=True, slots=True)
class Band:
    """A speed that is expected to lie between two bounds, in tokens a second."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Reads:
    """Bytes that are read from the disk: of a token, or of a prompt."""

    most: float
    least: float


def decode_band(facts: Facts, machine: Machine, used: float, reads: Reads) -> Band:
    """Of decoding one sequence that uses `used` experts a token."""
    rate = machine.rates[compute_format(facts)]
    weights = facts.dense_bytes_per_token + used * facts.expert_bytes
    times = []
    for end, read in enumerate((reads.most, reads.least)):
        read_s = read / (machine.speeds.disk_bytes_per_s * DISK[end])
        compute_s = weights / (rate.row_bytes_per_s * ROWS[end])
        compute_s += facts.layers * STEP_LAYER_S[end]
        compute_s += _decoding_s(facts, machine, used, end)
        times.append(read_s + compute_s if end == 0 else max(read_s, compute_s))
    return Band(1 / times[0], 1 / times[1])


def prefill_band(facts: Facts, machine: Machine, tokens: int, touched: float, reads: Reads) -> Band:
    """Of a prompt of `tokens` that uses `touched` experts of all layers together."""
    rate = machine.rates[compute_format(facts)]
    weights = facts.dense_bytes_per_token + touched * facts.expert_bytes
    times = []
    for end, read in enumerate((reads.most, reads.least)):
        read_s = read / (machine.speeds.disk_bytes_per_s * DISK[end])
        row_s = weights / (rate.row_bytes_per_s * ROWS[end])
        flops_s = facts.flops_per_token * tokens / (rate.flops_per_s * FLOPS[end])
        compute_s = max(row_s, flops_s) + facts.layers * PROMPT_LAYER_S[end]
        compute_s += _decoding_s(facts, machine, touched, end)
        times.append(read_s + compute_s if end == 0 else max(read_s, compute_s))
    return Band(tokens / times[0], tokens / times[1])


def compute_format(facts: Facts) -> str:
    """What the matrices are multiplied from: the experts' format, or the type it is decoded to."""
    return facts.stored if facts.stored in ("int8", "int4") else facts.dtype


def _decoding_s(facts: Facts, machine: Machine, experts: float, end: int) -> float:
    """Seconds to decode `experts` that are in a format without a kernel."""
    if compute_format(facts) == facts.stored:
        return 0.0
    speed = CORE_DECODED_BYTES_PER_S[end] * machine.threads
    return experts * facts.decoded_bytes / speed
