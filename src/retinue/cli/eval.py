"""`retinue eval`: loss and agreement per task, against the plain model."""

from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from typing import Any

from retinue.cli.measure import bar, measured
from retinue.cli.options import config_from
from retinue.cli.terminal import audience, emit_json, note, table
from retinue.config import AS_IS, Config, format_size
from retinue.engine.evaluate import Evaluation, TaskScore, evaluate, passes, score_plain
from retinue.errors import UsageError
from retinue.memory.machine import resident_bytes
from retinue.model.scoring import Scored


def execute(options: Namespace) -> int:
    """Score the texts under a preset and under the plain model; returns the exit code."""
    config = config_from(options)
    plain = _plain(options, config) if options.against else None
    with measured(options, config) as (assembly, texts):
        if plain is not None and [text.ids for text in texts] != plain.ids:
            raise UsageError(
                f"`{options.against}` reads the texts as other tokens than `{options.model}`",
                hint="give the model that the pack was made of, and a `--context` for both",
            )
        with bar(len(texts) * passes(assembly, against=plain is not None)) as advance:
            result = evaluate(assembly, texts, advance, None if plain is None else plain.scores)
        document = _document(options.model, config.preset, result)
        document |= {"against": options.against} if options.against else {}
        document |= {
            "peak_rss_bytes": resident_bytes(peak=True),
            "budget_bytes": assembly.split.budget,
            "resident_experts": assembly.cache.resident,
            "total_experts": assembly.cache.total,
        }
    print(_text(document, result), file=audience(options.json))
    if document["peak_rss_bytes"] > document["budget_bytes"]:
        note("the peak is over the budget: please report this with the model's name", "red")
    if options.json:
        emit_json(document)
    return 0


@dataclass(frozen=True, slots=True)
class _Plain:
    """What another model says of the texts, and how it reads them."""

    ids: list[list[int]]
    scores: list[Scored]


def _plain(options: Namespace, config: Config) -> _Plain:
    """Score the texts under the model of `--against`, which is closed again."""
    config = replace(config, precision=AS_IS, preset=Config().preset, fetch_above=None)
    others = Namespace(**vars(options) | {"model": options.against})
    with measured(others, config) as (assembly, texts), bar(len(texts)) as advance:
        return _Plain([text.ids for text in texts], score_plain(assembly, texts, advance))


def _document(model: str, preset: str, result: Evaluation) -> dict[str, Any]:
    return {
        "model": model,
        "preset": preset,
        "tasks": {name: asdict(score) for name, score in result.tasks.items()},
        **asdict(result.total),
        "degraded_by_layer": result.cost.degraded_by_layer,
        "misses": result.misses,
        "fetched": result.fetched,
        "bytes_read": result.bytes_read,
    }


def _text(document: dict[str, Any], result: Evaluation) -> str:
    rows = [_row(name, score) for name, score in result.tasks.items()]
    rows.append(_row("all", result.total))
    scores = table(("task", "loss", "plain", "added", "agreement", "tokens"), rows)
    return (
        f"{scores}\n\n{document['resident_experts']} of {document['total_experts']} experts"
        f" resident, {result.degraded_share:.1%} of routing weight degraded;"
        f" token by token: {result.misses} misses, {result.fetched} fetched,"
        f" {format_size(result.bytes_read)} read"
    )


def _row(name: str, score: TaskScore) -> tuple[str, ...]:
    added = score.nll - score.nll_plain
    return (
        name,
        f"{score.nll:.3f}",
        f"{score.nll_plain:.3f}",
        f"{added:+.3f}",
        f"{score.agreement:.3f}",
        f"{score.tokens}",
    )
