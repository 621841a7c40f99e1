"""Losses of whole texts, whatever a family's class knows to leave out."""

from pathlib import Path
from typing import Any

import models
from retinue.model.scoring import Scorer


def test_a_model_that_gives_all_logits_scores_the_same_tokens(olmoe: Path) -> None:
    with models.open_llm(olmoe) as llm:
        parts = llm.assembly
        scorer = Scorer(parts.network, parts.host, parts.mover, parts.metrics)
        wanted = scorer.score(models.prompt_of(12), 4)
        model = scorer._model

        def all_logits(*, logits_to_keep: int, **arguments: Any) -> Any:
            return model(**arguments)

        scorer._model = all_logits
        found = scorer.score(models.prompt_of(12), 4)
        scorer._model = model
    assert len(found.nll) == 4
    assert found.best.tolist() == wanted.best.tolist()
    assert abs(found.nll - wanted.nll).max() < 1e-5
