"""What the server tells of itself in JSON, from the last picture alone."""

from dataclasses import asdict
from typing import Any

import numpy as np

from retinue.server.served import Picture, Served
from retinue.server.tally import Tally, TaskTally

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
        "period": picture.period,
        "refreshes": picture.refreshes,
        "phases": {"prefill": _phase(picture.prefill), "decode": _phase(picture.decode)},
        "degraded_by_task": [
            {"task": task, "layers": shares} for task, shares in picture.degraded.items()
        ],
        "layers": [
            {
                "layer": layer,
                "resident": np.flatnonzero(there).tolist(),
                "prefill": _phase(asdict(picture.layers[layer]["prefill"])),
                "decode": _phase(asdict(picture.layers[layer]["decode"])),
                "reads": {
                    reason: dict(zip(("experts", "bytes"), counts[layer].tolist(), strict=True))
                    for reason, counts in picture.reads.items()
                },
            }
            for layer, there in enumerate(picture.resident)
        ],
    }


def state_view(served: Served, tally: Tally) -> Json:
    """`/v1/state`: the server at a glance, small enough to be asked for each second."""
    picture, split = served.picture, served.assembly.split
    parts = {part: getattr(split, part) for part in ("fixed", "kv", "workspace", "experts")}
    return {
        "model": served.assembly.facts.name,
        "preset": served.assembly.preset.name,
        "exact": served.assembly.preset.exact,
        "at_s": picture.at,
        "memory": {
            "budget_bytes": split.budget,
            "resident_bytes": picture.resident_bytes,
            "peak_bytes": picture.peak_bytes,
            "parts": parts,
        },
        "tokens_per_s": tally.tokens_per_s,
        "running": sum(picture.running.values()),
        "waiting": sum(picture.waiting.values()),
        "tasks": _tasks(picture, tally),
        "phases": {"prefill": _phase(picture.prefill), "decode": _phase(picture.decode)},
        "kv_used": picture.kv_used,
        "experts": [_layer(picture, layer) for layer in range(len(picture.resident))],
    }


def _tasks(picture: Picture, tally: Tally) -> list[Json]:
    names = sorted({*picture.running, *picture.waiting, *tally.tasks}, key=str)
    found = []
    for name in names:
        done = tally.tasks.get(name, TaskTally())
        now = {"running": picture.running.get(name, 0), "waiting": picture.waiting.get(name, 0)}
        found.append({"task": name} | now | asdict(done) | {"degraded_share": done.degraded_share})
    return found


def _layer(picture: Picture, layer: int) -> Json:
    """One layer: a digit for each expert in `map`, see `server/activity.py`; - where is none."""
    phases = picture.layers[layer]
    return {
        "layer": layer,
        "map": picture.activity[layer],
        "prefill": _phase(asdict(phases["prefill"])),
        "decode": _phase(asdict(phases["decode"])),
    }


def _phase(counters: dict[str, float]) -> Json:
    asked = counters["hits"] + counters["pending"] + counters["misses"]
    routed = counters["routed_weight"]
    return counters | {
        "hit_rate": counters["hits"] / asked if asked else None,
        "degraded_share": counters["degraded_weight"] / routed if routed else 0.0,
    }
