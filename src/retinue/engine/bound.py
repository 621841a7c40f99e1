"""What the machine allows at most, and how near a run came to it."""

from dataclasses import dataclass, replace

from retinue.memory.machine import Speeds
from retinue.types import Facts, Stats


@dataclass(frozen=True, slots=True)
class TokenCost:
    """Bytes that one decode step has to move."""

    read_bytes: float  # from the disk: of experts that were used and not resident
    weight_bytes: float  # from memory: of all weights used

    def tokens_per_s(self, speeds: Speeds) -> float:
        """The bound: one over the larger of the two times."""
        disk_s = self.read_bytes / speeds.disk_bytes_per_s
        memory_s = self.weight_bytes / speeds.memory_bytes_per_s
        return 1 / max(disk_s, memory_s)


def with_bound(stats: Stats, facts: Facts, speeds: Speeds) -> Stats:
    """`stats` with the bound of its decode phase under `speeds`, and the share reached."""
    stats = replace(
        stats,
        disk_bytes_per_s=speeds.disk_bytes_per_s,
        memory_bytes_per_s=speeds.memory_bytes_per_s,
    )
    tokens = stats.decode_tokens_per_s * stats.decode_s
    if tokens < 0.5:
        return stats
    used = (stats.hits + stats.pending + stats.misses) / tokens
    cost = TokenCost(
        read_bytes=stats.used_bytes_read / tokens,
        weight_bytes=facts.dense_bytes_per_token + used * facts.expert_bytes,
    )
    bound = cost.tokens_per_s(speeds)
    return replace(
        stats, bound_tokens_per_s=bound, share_of_bound=stats.decode_tokens_per_s / bound
    )
