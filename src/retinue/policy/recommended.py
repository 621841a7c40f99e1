"""Which preset served a model best where: found by replays, kept in its profile.

An entry holds for a share of the experts in memory, a disk's speed and one machine, and for what is
near. It names an exact preset and the ring: the share of the slots for experts that only pass in a
prefill (see `policies.Policies`); None is the preset's own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHARE_NEAR = 1.25  # times, up or down
DISK_NEAR = 1.6


@dataclass(frozen=True, slots=True)
class Recommendation:
    """`margin`: how much longer the same requests took under the default, as a share."""

    share: float  # of the experts that fit
    disk_bytes_per_s: float
    preset: str
    ring: float | None
    margin: float
    machine: str

    def distance(self, share: float, disk_bytes_per_s: float) -> float | None:
        """How far this is from another place, or None if it says nothing of it."""
        shares = abs(math.log(self.share / share)) / math.log(SHARE_NEAR)
        disks = abs(math.log(self.disk_bytes_per_s / disk_bytes_per_s)) / math.log(DISK_NEAR)
        return shares + disks if max(shares, disks) <= 1 else None

    def near(self, other: "Recommendation") -> bool:
        """Whether one takes the other's place."""
        away = self.distance(other.share, other.disk_bytes_per_s)
        return self.machine == other.machine and away is not None


Recommendations = tuple[Recommendation, ...]


def best_for(
    known: Recommendations, share: float, disk_bytes_per_s: float, machine: str
) -> Recommendation | None:
    """The nearest entry for this machine that says anything of it."""
    found = [
        (away, entry)
        for entry in known
        if entry.machine == machine
        and (away := entry.distance(share, disk_bytes_per_s)) is not None
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def joined(old: Recommendations, new: Recommendations) -> Recommendations:
    """Both; where they are near each other, the new ones."""
    kept = tuple(entry for entry in old if not any(entry.near(other) for other in new))
    return kept + new


def recommendations_from(content: Any) -> Recommendations:
    """From a JSON document. Raises KeyError, TypeError or ValueError for what is none."""
    return tuple(_entry(row) for row in list(content))


def recommendations_list(known: Recommendations) -> list[dict[str, Any]]:
    """JSON-shaped."""
    return [asdict(entry) for entry in known]


def _entry(row: Mapping[str, Any]) -> Recommendation:
    ring = None if row["ring"] is None else float(row["ring"])
    share, disk = float(row["share"]), float(row["disk_bytes_per_s"])
    if not (0 < share <= 1 and 0 < disk < math.inf and (ring is None or 0 <= ring <= 1)):
        raise ValueError(f"a recommendation is out of range: {dict(row)}")
    return Recommendation(
        share, disk, str(row["preset"]), ring, float(row["margin"]), str(row["machine"])
    )
