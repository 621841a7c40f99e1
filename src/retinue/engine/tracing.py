"""Records the routing of task texts as the plain model chooses it, a text at a time."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from retinue.engine.assembly import Assembly
from retinue.engine.tasks import TaskIds
from retinue.model.scoring import Scorer
from retinue.trace import Detail, Routed, TraceHead, routed_of


def trace_head(assembly: Assembly, detail: Detail = "tokens") -> TraceHead:
    """What a trace of this model says of all its requests."""
    facts = assembly.facts
    routed = np.flatnonzero(assembly.network.experts.there.any(axis=1)).tolist()
    shape = (facts.layers, facts.experts_per_layer, facts.top_k)
    return TraceHead(facts.name, *shape, tuple(routed), detail)


def record(
    assembly: Assembly, head: TraceHead, texts: Sequence[TaskIds], advance: Callable[[], object]
) -> Iterator[Routed]:
    """Run each text, prompt and continuation, and give its routing; then call `advance`.

    Raises Cancelled when the host's `stop` says so, NotFinite, or the error of a read.
    """
    scorer = Scorer(assembly.network, assembly.host, assembly.mover, assembly.metrics)
    with scorer.recording(next_scores=False) as routing:
        for text in texts:
            scorer.score(text.ids, 1)
            assert tuple(layer.layer for layer in routing) == head.routed
            experts = np.stack([layer.experts for layer in routing], axis=1)
            weights = np.stack([layer.weights for layer in routing], axis=1)
            yield routed_of(head, text.task, len(text.ids) - text.scored, experts, weights)
            advance()
