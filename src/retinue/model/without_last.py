"""What each layer's last experts are worth, tried on a model that is too large for gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from retinue.model.expert_map import ExpertsModule
from retinue.model.scoring import Scorer
from retinue.types import FloatArray


def without_last(
    scorer: Scorer, modules: Sequence[ExpertsModule], texts: Sequence[Sequence[int]]
) -> FloatArray:
    """The loss that each layer adds without every token's last expert, over that one's share.

    Divided by the mean square of the share, in nats a token: [rows]. The other experts get its
    weight. One pass over the texts for each layer, and one more.
    """
    plain = _loss(scorer, texts)
    found = []
    for module in modules:
        shares: list[float] = []
        with _leaving_out(module, shares):
            added = _loss(scorer, texts) - plain
        found.append(added / max(float(np.mean(np.square(shares))), 1e-12))
    return np.array(found, dtype=np.float32)


def _loss(scorer: Scorer, texts: Sequence[Sequence[int]]) -> float:
    losses = [scorer.score(list(ids), len(ids) - 1).nll for ids in texts]
    return float(np.concatenate(losses).mean())


@contextmanager
def _leaving_out(found: ExpertsModule, shares: list[float]) -> Iterator[None]:
    """Within, the module runs without each token's last expert; what its part was is added."""
    run = found.module.retinue_run

    def fewer(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        last = weights.argmin(dim=-1, keepdim=True)
        part = weights.gather(-1, last) / weights.sum(dim=-1, keepdim=True).clamp_min(1e-12)
        shares.extend(part.float().reshape(-1).tolist())
        rest = weights.scatter(-1, last, 0) / (1 - part).clamp_min(1e-6)
        none = torch.full_like(last, found.experts, dtype=index.dtype)
        output: torch.Tensor = run(hidden, index.scatter(-1, last, none), rest)  # type: ignore[operator]
        return output

    found.module.retinue_run = fewer  # type: ignore[assignment]
    try:
        yield
    finally:
        found.module.retinue_run = run
