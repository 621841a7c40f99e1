"""What a layer's turn costs beside reads and computing: attendance, cache and policies, a token.

`python -m benchmarks.books` prints microseconds a token and layer where every expert is there and
where about half of them are missing: processor time, of the fastest of a few rounds.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable

import numpy as np

from retinue.memory.attendance import Attendance, demand_of
from retinue.memory.base import Sizes
from retinue.memory.cache import ExpertCache
from retinue.memory.instant import InstantLink, NumberedSlots
from retinue.metrics import Metrics
from retinue.policy.preset import Given
from retinue.policy.presets import preset
from retinue.types import Demand, FloatArray

SHAPES = {"small": (8, 32, 4), "olmoe": (16, 64, 8), "qwen3": (48, 128, 8)}
ROUNDS, PASSES = 5, 40


class Bench:
    """A preset over numbers: `layers` of `experts`, of which half have a slot."""

    def __init__(self, name: str, layers: int, experts: int, k: int) -> None:
        read = np.full((1, layers, experts), 1 << 20)
        sizes, slots = Sizes(read, read), layers * experts // 2
        given = Given("", layers, experts, k, tuple(range(layers)), slots)
        policies = preset(name).build(given)
        link = InstantLink(sizes)
        cache = ExpertCache(sizes, NumberedSlots(slots), link, policies.evictor, k)
        self.metrics = Metrics()
        self._attendance = Attendance(cache, policies, range(layers), self.metrics)
        random = np.random.default_rng(0)
        self._layers, ones = layers, np.ones(k, np.float32)
        self._any = [
            [demand_of(n, random.permutation(experts)[:k], ones, experts) for n in range(layers)]
            for _ in range(PASSES)
        ]
        few = [demand_of(layer, np.arange(k), ones, experts) for layer in range(layers)]
        self._same = [few] * PASSES
        self._scores = random.random((layers, 1, experts), np.float32)
        self.missing_share = 0.0  # in the last round

    def misses(self) -> float:
        """Microseconds with random experts."""
        return self._run(self._any)

    def hits(self) -> float:
        """Microseconds with the same experts again and again."""
        return self._run(self._same)

    def _run(self, passes: list[list[Demand]]) -> float:
        attendance, counters = self._attendance, self.metrics.begin("decode")

        def scores_of(layer: int) -> FloatArray:
            return self._scores[layer]

        started = time.thread_time()
        for demands in passes:
            attendance.begin_pass("decode")
            for demand in demands:
                with attendance.attend(demand, 1, None, scores_of) as turn:
                    while turn.left:
                        if ready := turn.ready():
                            attendance.cache.use(demand.layer, ready)
                            turn.computed(ready)
                        else:
                            turn.wait()
        spent = time.thread_time() - started
        self.missing_share = counters.misses / (counters.hits + counters.misses)
        return 1e6 * spent / (len(passes) * self._layers)


def best(measure: Callable[[], float]) -> float:
    """The least of some rounds, after one that warms up."""
    return min([measure() for _ in range(ROUNDS + 1)][1:])


def main() -> None:
    """Print one JSON line a preset and shape."""
    parser = ArgumentParser(prog="python -m benchmarks.books", description=__doc__)
    parser.add_argument("presets", nargs="*", default=["on-demand", "auto"])
    for name in parser.parse_args().presets:
        for shape, (layers, experts, k) in SHAPES.items():
            bench = Bench(name, layers, experts, k)
            missing_us = best(bench.misses)
            line = {"preset": name, "shape": shape, "missing_us": round(missing_us, 1)}
            line |= {"missing_share": round(bench.missing_share, 2)}
            print(json.dumps(line | {"hits_us": round(best(bench.hits), 1)}))


if __name__ == "__main__":
    main()
