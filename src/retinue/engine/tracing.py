"""Records the routing of task texts as the plain model chooses it, a text at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from retinue.engine.assembly import Assembly
from retinue.engine.tasks import TaskIds
from retinue.errors import Unsupported
from retinue.model.scoring import LayerRouting, Scorer
from retinue.trace import Detail, Routed, TraceHead, routed_of
from retinue.types import FloatArray

BY_LAYER = ("scores", "next_scores", "hidden")


def trace_head(
    assembly: Assembly,
    detail: Detail = "tokens",
    signals: tuple[str, ...] = (),
    precision: str = "as-is",
) -> TraceHead:
    """What a trace of this model says of all its requests.

    Raises Unsupported where routers cannot be asked for `signals`.
    """
    facts = assembly.facts
    if {"scores", "next_scores"} & set(signals) and not assembly.host.sees_ahead:
        raise Unsupported(
            "some routers of this model cannot be asked for their scores",
            hint="record without `scores` and `next_scores`",
        )
    routed = np.flatnonzero(assembly.network.experts.there.any(axis=1)).tolist()
    shape = (facts.layers, facts.experts_per_layer, facts.top_k)
    width = int(assembly.network.model.config.get_text_config().hidden_size)
    read_bytes = int(assembly.cache.sizes.read_bytes[0].max())
    head = TraceHead(facts.name, *shape, tuple(routed), detail, signals, width, precision, facts)
    return replace(head, read_bytes=read_bytes)


def record(
    assembly: Assembly, head: TraceHead, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> Iterator[Routed]:
    """Run each text, prompt and continuation, and give its routing; then call `advance`.

    Raises Cancelled when the host's `stop` says so, NotFinite, or the error of a read.
    """
    scorer = Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)
    with scorer.recording(head.signals) as routing:
        for text in texts:
            scorer.score(text.ids, 1)
            assert tuple(layer.layer for layer in routing) == head.routed
            experts = np.stack([layer.experts for layer in routing], axis=1)
            weights = np.stack([layer.weights for layer in routing], axis=1)
            prompt = len(text.ids) - text.scored
            request = routed_of(head, text.task, prompt, experts, weights)
            by_layer = [name for name in head.signals if name in BY_LAYER]
            signals: dict[str, npt.NDArray[Any]]
            signals = {name: _stacked(routing, name) for name in by_layer}
            if "token_ids" in head.signals:
                signals["token_ids"] = np.array(text.ids)
            if "embedding" in head.signals:
                signals["embedding"] = scorer.embedding(text.ids[:prompt])
            yield replace(request, signals=signals)
            advance()


def _stacked(routing: Sequence[LayerRouting], signal: str) -> FloatArray:
    """One signal of all layers that have it: [tokens, layers, ...]."""
    of_layer = {
        "scores": [layer.scores for layer in routing],
        "next_scores": [layer.next_scores for layer in routing[:-1]],
        "hidden": [layer.hidden for layer in routing],
    }
    found = [values for values in of_layer[signal] if values is not None]
    assert len(found) == len(of_layer[signal]), signal
    return np.stack(found, axis=1)
