"""Traces made by hand and by chance, without a model; and places to replay them in."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retinue.policy.base import Signal
from retinue.policy.policies import AsIs, Policies
from retinue.policy.preset import Given
from retinue.policy.presets import preset
from retinue.sim.candidates import sizes_of
from retinue.sim.costs import Times
from retinue.sim.foreseen import foreseen
from retinue.sim.link import Roads
from retinue.sim.passes import Load
from retinue.sim.recorded import Recording
from retinue.sim.replay import Outcome, Replay
from retinue.sim.stage import Setting
from retinue.trace import Routed, Trace, TraceHead, TraceWriter, routed_of
from retinue.types import Facts

LAYERS, EXPERTS, TOP_K, READ_BYTES = 3, 8, 2, 1000
FACTS = Facts(
    name="by-chance",
    family="olmoe",
    dtype="bfloat16",
    layers=LAYERS,
    moe_layers=LAYERS,
    experts_per_layer=EXPERTS,
    total_experts=LAYERS * EXPERTS,
    top_k=TOP_K,
    expert_bytes=READ_BYTES,
    slot_bytes=READ_BYTES,
    dense_bytes=10_000,
    dense_bytes_per_token=10_000,
    kv_bytes_per_token=64,
    max_context=4096,
    vocab_size=100,
    workspace_bytes=1000,
    workspace_bytes_per_context=1,
    workspace_bytes_per_token=1,
    workspace_bytes_per_pair=1,
    flops_per_token=50_000,
)
HEAD = TraceHead(
    "by-chance", LAYERS, EXPERTS, TOP_K, tuple(range(LAYERS)), facts=FACTS, read_bytes=READ_BYTES
)


def chance(seed: int, tokens: int, *, prompt: int = 1, task: str | None = "a") -> Routed:
    """A request whose tokens like some experts better, and those of the token before most."""
    random = np.random.default_rng(seed)
    liking = random.normal(size=(LAYERS, EXPERTS))
    logits = liking + np.cumsum(random.normal(size=(tokens, LAYERS, EXPERTS)), axis=0) / 2
    scores = np.exp(logits - logits.max(axis=2, keepdims=True)).astype(np.float32)
    scores /= scores.sum(axis=2, keepdims=True)
    experts = np.argsort(-scores, axis=2, kind="stable")[:, :, :TOP_K]
    weights = np.take_along_axis(scores, experts, axis=2)
    weights /= weights.sum(axis=2, keepdims=True)
    request = routed_of(HEAD, task, prompt, experts, weights)
    ahead = 0.8 * scores[:, 1:] + 0.2 * random.permutation(scores[:, 1:], axis=0)
    signals = {"scores": scores, "next_scores": ahead.astype(np.float32)}
    return Routed(task, prompt, tokens - prompt, request.sums, experts, weights, signals)


def trace_of(
    file: Path, requests: Sequence[Routed], signals: tuple[Signal, ...] = (), **head: object
) -> Trace:
    """A trace of `requests` in `file`."""
    with TraceWriter(file, TraceHead(**_fields(signals) | head)) as writer:  # type: ignore[arg-type]
        for request in requests:
            writer.add(request)
    return Trace(file)


def _fields(signals: tuple[Signal, ...]) -> dict[str, object]:
    known = {name: getattr(HEAD, name) for name in HEAD.__slots__}
    return known | {"signals": signals}


def setting(slots: int = 8, *, disk: float = 1e6, **fields: object) -> Setting:
    """Room for some experts on a disk; one expert takes a millisecond to read, a tenth to run."""
    times = fields.pop("times", Times(1e-4, 2e-4, 1e-5, 1e-5))
    assert isinstance(times, Times)
    load = fields.pop("load", Load())
    assert isinstance(load, Load)
    assert not fields, fields
    return Setting(slots, Roads(disk), times, load)


def replayed(recording: Recording, name: str, place: Setting) -> Outcome:
    """What preset `name` makes of it."""
    row, sizes = preset(name), sizes_of(recording.head, AsIs.names, READ_BYTES)
    future = foreseen(recording, place, sizes) if row.replayed else None
    return replay(recording, row.build(Given(slots=place.slots, future=future)), place)


def replay(recording: Recording, policies: Policies, place: Setting) -> Outcome:
    """What `policies` make of it."""
    sizes = sizes_of(recording.head, policies.precision.names, READ_BYTES)
    return Replay(recording, policies, place, sizes).run()
