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
from retinue.trace import AHEAD, Detail, Routed, TraceHead, routed_of
from retinue.types import FloatArray

BY_LAYER = ("scores", *AHEAD, "hidden")
ASKED = {"scores", *AHEAD}  # of routers, which may not be there to ask


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
    if ASKED & set(signals) and not assembly.host.sees_ahead:
        raise Unsupported(
            "some routers of this model cannot be asked for their scores",
            hint="record without `scores` and those of layers ahead",
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
            signals = {name: _stacked(routing, name, head) for name in by_layer}
            if "token_ids" in head.signals:
                signals["token_ids"] = np.array(text.ids)
            if "embedding" in head.signals:
                signals["embedding"] = scorer.embedding(text.ids[:prompt])
            yield replace(request, signals=signals)
            advance()


def _stacked(routing: Sequence[LayerRouting], signal: str, head: TraceHead) -> FloatArray:
    """One signal of all layers that have it: [tokens, layers, ...]."""
    shape = head.shape(signal, len(routing[0].experts))
    if signal in AHEAD:
        found = [layer.ahead[signal] for layer in routing if signal in layer.ahead]
    else:
        every = [layer.scores if signal == "scores" else layer.hidden for layer in routing]
        found = [values for values in every if values is not None]
    assert len(found) == shape[1], signal
    return np.stack(found, axis=1) if found else np.zeros(shape, np.float32)
