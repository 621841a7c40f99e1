"""What a replay says of a preset, JSON-shaped; and how far it is from the oracle."""

from typing import Any

import numpy as np

from retinue.sim.replay import Outcome

Row = dict[str, Any]


def row_of(outcome: Outcome) -> Row:
    """Counters of decoding, as `retinue bench` names them, and times of both phases."""
    decode, prefill = outcome.decode, outcome.prefill
    looked_up = decode.hits + decode.pending + decode.misses
    tokens = max(1, decode.tokens)
    first = outcome.first_token_s
    return {
        "hit_rate": decode.hit_rate,
        "pending_rate": decode.pending / looked_up if looked_up else 0.0,
        "miss_rate": decode.misses / looked_up if looked_up else 0.0,
        "stall_s": decode.stall_s,
        "bytes_read_per_token": decode.bytes_read / tokens,
        "degraded_share": decode.degraded_share,
        "hits": decode.hits,
        "pending": decode.pending,
        "misses": decode.misses,
        "bytes_read": decode.bytes_read,
        "decode_tokens": decode.tokens,
        "decode_s": decode.seconds,
        "decode_tokens_per_s": _rate(decode.tokens, decode.seconds),
        "expert_s": decode.expert_s,
        "prefill_s": prefill.seconds,
        "prefill_tokens_per_s": _rate(prefill.tokens, prefill.seconds),
        "prefill_stall_s": prefill.stall_s,
        "prefill_bytes_read": prefill.bytes_read,
        "first_token_s": float(np.mean(first)) if first else 0.0,
        "first_token_p95_s": float(np.quantile(first, 0.95)) if first else 0.0,
        "seconds": outcome.seconds,
    }


def beside(rows: dict[str, Row], oracle: Row) -> None:
    """Add to each row how far it is from `oracle`: in hits, and in bytes read for a token.

    Whoever reads ahead may hit more than an oracle that does not, and still reads as much or more.
    """
    for row in rows.values():
        row["hit_rate_below_belady"] = oracle["hit_rate"] - row["hit_rate"]
        least = oracle["bytes_read_per_token"]
        row["reads_over_belady"] = row["bytes_read_per_token"] / least if least else None


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
