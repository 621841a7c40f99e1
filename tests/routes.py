"""Facts for policies that look at tokens: routes, choices and views of a model made by hand."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from retinue.policy.base import BoolArray, Choice, Route, View
from retinue.policy.evict.belady import future_of
from retinue.policy.parts.kinds import KINDS
from retinue.policy.preset import Arrays, Given
from retinue.policy.profile import Profile, TaskCounts
from retinue.policy.transitions import Transitions
from retinue.types import Demand, FloatArray

LAYERS, EXPERTS, TOP_K, HIDDEN = 4, 6, 2, 3
GIVEN = Given("by-hand", LAYERS, EXPERTS, TOP_K, routed=tuple(range(LAYERS)), slots=12)


def profile() -> Profile:
    """One task of one text; expert 1 of layer 0 is followed by 2 three times, and by 4 once."""
    weight = np.tile(floats([6, 1, 2, 5, 3, 4]), (LAYERS, 1))
    pairs = {(0, 1, 2): 3, (0, 1, 4): 1, (0, 3, 4): 2, (1, 2, 5): 1}
    transitions = Transitions(1, 0.5, 0.5, 0.5, pairs)
    counts = TaskCounts(1, 9, weight.astype(np.int64), weight, transitions=transitions)
    return Profile(GIVEN.model, LAYERS, EXPERTS, TOP_K, {"a": counts})


def given() -> Given:
    """All that may be known of the model by hand."""
    future = future_of([], LAYERS, EXPERTS)
    return replace(GIVEN, profile=profile(), learned=learned(), future=future)


def floats(values: object) -> FloatArray:
    return np.array(values, dtype=np.float32)


def route(
    experts: list[list[int]],
    weights: list[list[float]],
    *,
    layer: int = 1,
    sequences: list[int] | None = None,
    hidden: list[list[float]] | None = None,
) -> Route:
    owners = np.array(sequences or [0] * len(experts), dtype=np.int64)
    state = None if hidden is None else floats(hidden)
    return Route(layer, np.array(experts, dtype=np.int64), floats(weights), owners, hidden=state)


def there(*entries: tuple[int, int]) -> BoolArray:
    """[layers, experts] with these."""
    found = np.zeros((LAYERS, EXPERTS), dtype=bool)
    for entry in entries:
        found[entry] = True
    return found


def view(**facts: object) -> View:
    """A model of four layers with six experts each; nothing was used, nothing is there."""
    base: dict[str, object] = {"step": 9, "layer": 1, "phase": "decode", "top_k": TOP_K}
    base |= {"layers": LAYERS, "experts": EXPERTS, "slots": 12, "resident": there()}
    base |= {"last_used": np.full((LAYERS, EXPERTS), -1, dtype=np.int64)}
    base |= {"heat": np.zeros((LAYERS, EXPERTS), dtype=np.float32)}
    return View(**(base | facts))  # type: ignore[arg-type]


def demand(found: Route) -> Demand:
    """What the tokens of a route need."""
    valid = found.experts < EXPERTS
    ids = np.unique(found.experts[valid])
    tokens = np.bincount(found.experts[valid], minlength=EXPERTS)[ids]
    weight = np.bincount(found.experts[valid], found.weights[valid], minlength=EXPERTS)[ids]
    return Demand(found.layer, ids, tokens, weight.astype(np.float32))


def choice(scores: list[list[float]], *, layer: int = 1, **facts: object) -> Choice:
    """A router's own choice of the top two, with its scores as weights."""
    array = floats(scores)
    order = np.argsort(-array, axis=1, kind="stable")[:, :TOP_K]
    return Choice(layer, array, order, np.take_along_axis(array, order, axis=1), **facts)  # type: ignore[arg-type]


def best(ranking: FloatArray, count: int = TOP_K) -> list[list[int]]:
    """Whom a ranking chooses, in ascending order."""
    order = np.argsort(-ranking, axis=1, kind="stable")[:, :count]
    return np.sort(order, axis=1).tolist()


def drawn_parts(layers: int, experts: int, hidden: int = HIDDEN) -> dict[str, Arrays]:
    """Arrays of every kind of learned part, of the right shape for a model of this size."""
    random = np.random.default_rng(3)
    made = {}
    for kind in KINDS.values():
        lengths = {"rows": layers, "experts": experts, "hidden": hidden, "ways": 2, "vocabulary": 8}
        made[kind.name] = {
            name: np.abs(random.standard_normal(_sizes(shape, lengths))).astype(np.float32)
            for name, shape in kind.shapes.items()
        }
    made["edgemoe"]["bits"][:] = random.choice([16, 8, 4, 2], (layers, experts))
    made["edgemoe"]["ids"] = np.minimum(made["edgemoe"]["ids"] * 2, experts - 1).round()
    made["promoe"]["stride"][:] = 1
    return made


def _sizes(shape: Sequence[str | int], lengths: dict[str, int]) -> list[int]:
    return [said if isinstance(said, int) else lengths.get(said, 5) for said in shape]


def learned() -> dict[str, Arrays]:
    """Arrays of every kind, for the model by hand."""
    random = np.random.default_rng(3)

    def drawn(*shape: int) -> FloatArray:
        return random.standard_normal(shape).astype(np.float32)

    bits = np.full((LAYERS, EXPERTS), 16.0, dtype=np.float32)
    bits[1, :3] = 4, 2, 8
    return {
        "adapmoe": {
            "sensitivity": floats([20.0, 0.05, 0.02, 0.5]),
            "tolerance": floats([0.005]),
            "accuracy": floats([0, 0.5, 0.8, 0.9]),
            "single": floats([0, 0.25, 0.5, 0.25]),
        },
        "edgemoe": {
            "importance": np.zeros((LAYERS, EXPERTS), dtype=np.float32),
            "bits": bits,
            "keys": floats([[2, 0, 1], [1, -1, 4]]),
            "ids": floats([[5, 3, 0], [2, -1, -1]]),
            "shares": floats([[0.75, 0.25, 0], [1, 0, 0]]),
            "anywhere": floats([[0.4, 0.3, 0.2, 0.1, 0, 0]] * LAYERS),
        },
        "pre-gated": {"gate": drawn(LAYERS, HIDDEN, EXPERTS), "bias": drawn(LAYERS, EXPERTS)},
        "read-me": {
            "read": drawn(HIDDEN, 5),
            "read_bias": drawn(5),
            "say": drawn(LAYERS, 5, EXPERTS),
            "say_bias": drawn(LAYERS, EXPERTS),
        },
        "expertflow": {
            "embed": drawn(9, 5),
            "decay": floats([0.5]),
            "mix": drawn(3, 5, 7),
            "mix_bias": drawn(7),
            "say": drawn(LAYERS, 7, EXPERTS),
            "say_bias": drawn(LAYERS, EXPERTS),
        },
        "fmoe": {
            "maps": np.abs(drawn(3, LAYERS, EXPERTS)),
            "embeddings": drawn(3, HIDDEN),
        },
        "moe-infinity": {"matrices": np.abs(drawn(3, LAYERS, EXPERTS))},
        "promoe": {
            "stride": floats([2]),
            "read": drawn(LAYERS, HIDDEN, 5),
            "read_bias": drawn(LAYERS, 5),
            "say": drawn(LAYERS, 5, EXPERTS),
            "say_bias": drawn(LAYERS, EXPERTS),
        },
        "hobbit": {"weights": floats([0.4, 0.3, 0.2, 0.1])},
    }
