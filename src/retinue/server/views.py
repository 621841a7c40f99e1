"""What the server tells of itself in JSON, from the last picture alone."""

from typing import Any

import numpy as np

from retinue.server.served import Picture, Served

Json = dict[str, Any]


def experts_view(served: Served) -> Json:
    """`/v1/experts`: what is resident in each layer, and how often that was what was asked for."""
    picture = served.picture
    facts, preset = served.assembly.facts, served.assembly.preset
    return {
        "preset": preset.name,
        "exact": preset.exact,
        "resident": int(picture.resident.sum()),
        "total": facts.total_experts,
        "phases": {"prefill": _phase(picture.prefill), "decode": _phase(picture.decode)},
        "layers": [
            {"layer": layer, "resident": np.flatnonzero(there).tolist()}
            for layer, there in enumerate(picture.resident)
        ],
    }


def state_view(served: Served) -> Json:
    """`/v1/state`: the server at a glance, small enough to be asked for each second."""
    picture, split = served.picture, served.assembly.split
    parts = {part: getattr(split, part) for part in ("fixed", "kv", "workspace", "experts")}
    return {
        "model": served.assembly.facts.name,
        "preset": served.assembly.preset.name,
        "memory": {
            "budget_bytes": split.budget,
            "resident_bytes": picture.resident_bytes,
            "peak_bytes": picture.peak_bytes,
            "parts": parts,
        },
        "tasks": _tasks(picture),
        "kv_used": picture.kv_used,
        "experts": [_bits(there) for there in picture.resident],
    }


def _tasks(picture: Picture) -> list[Json]:
    names = sorted({*picture.running, *picture.waiting}, key=str)
    return [
        {
            "task": name,
            "running": picture.running.get(name, 0),
            "waiting": picture.waiting.get(name, 0),
        }
        for name in names
    ]


def _phase(counters: dict[str, float]) -> Json:
    asked = counters["hits"] + counters["pending"] + counters["misses"]
    routed = counters["routed_weight"]
    return counters | {
        "hit_rate": counters["hits"] / asked if asked else None,
        "degraded_share": counters["degraded_weight"] / routed if routed else 0.0,
    }


def _bits(there: Any) -> str:
    """One digit an expert: 1 is resident."""
    return "".join("1" if each else "0" for each in there.tolist())
