"""The kinds that `retinue train-predictor` knows, and what each needs to be recorded."""

from collections.abc import Sequence

from retinue.errors import UsageError
from retinue.policy.parts.kinds import KINDS as PARTS
from retinue.trace import TraceHead

NETWORKS = ("emoe-a", "emoe-l")
KINDS = (*NETWORKS, *PARTS)
_SIGNALS = {
    "promoe": ("hidden",),
    "fmoe": ("scores", "embedding"),
    "pre-gated": ("scores", "hidden"),
    "read-me": ("scores", "hidden"),
    "adapmoe": ("hidden",),
}
ASKING = ("fmoe", "pre-gated", "read-me", "adapmoe")  # routers, for their scores
ONWARD = ("promoe", "pre-gated")  # a layer's choice from an earlier layer's input
ONE_LAYER = "the model has one layer with experts, which no other comes before"
# These try something on the model, or need the tokens themselves: a trace has neither.
_NEED_TEXTS = ("expertflow", "pre-gated", "adapmoe", "edgemoe")


def kinds_of(text: str) -> list[str]:
    """The kinds that `--kind` names, in their order. Raises UsageError for one that is unknown."""
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in (*KINDS, "all"):
            raise UsageError(
                f"unknown kind of predictor: `{name}`", hint=f"known: {', '.join(KINDS)}, all"
            )
    return [kind for kind in KINDS if kind in named or "all" in named]


def signals_of(kinds: Sequence[str]) -> tuple[str, ...]:
    """What has to be recorded for `kinds` besides what routers choose."""
    needed = {signal for kind in kinds for signal in _SIGNALS.get(kind, ())}
    return tuple(name for name in ("scores", "hidden", "embedding") if name in needed)


def kinds_from_trace(kinds: Sequence[str], everything: bool, head: TraceHead) -> list[str]:
    """Those of `kinds` that a trace is enough for.

    Raises UsageError for others, unless they are asked for as part of `everything`.
    """
    found = []
    for kind in kinds:
        reason = _lacking(kind, head)
        if reason is None:
            found.append(kind)
        elif not everything:
            raise UsageError(f"the trace is not enough for `{kind}`: {reason[0]}", hint=reason[1])
    return found


def _lacking(kind: str, head: TraceHead) -> tuple[str, str] | None:
    """What the trace lacks, and what helps."""
    if kind in _NEED_TEXTS:
        return "it needs texts and the model", "run them with `--data` in place of `--trace`"
    if kind in ONWARD and len(head.routed) < 2:
        return ONE_LAYER, "nothing can be learnt of it"
    if kind in PARTS and head.detail == "histogram":
        return "it has no tokens", "record with `--detail tokens`"
    for signal in _SIGNALS.get(kind, ()):
        if signal not in head.signals:
            signals = ",".join(_SIGNALS[kind])
            return f"it has no `{signal}`", f"record with `retinue trace --signals {signals}`"
    return None
