"""A small network a layer that reads its input and says what a later layer will choose.

ProMoE (arXiv 2410.22134): a network of two linear layers for each layer of the model, about two
million weights, predicts from the hidden state of layer l the experts of layer l + stride. A longer
stride leaves more time for reading and is right less often, about five points a layer. Deviations:
what the paper does with the link, reading in chunks, dropping what the router did not choose and
computing in the order of arrival, is the mover's and the host's here, for every preset; the first
layers, which no stride reaches, are not foreseen.
"""

from collections.abc import Sequence

from retinue.policy.base import Signal, View
from retinue.policy.parts.perceptron import ahead as said_ahead
from retinue.policy.predict.likely import chances, likely
from retinue.policy.preset import Arrays
from retinue.types import Demand, Want


class Promoe:
    """Forecasts the layer that lies `stride` ahead, and keeps to what it said of the nearer ones.

    arrays: of the kind `promoe`, see `parts/kinds.py`. routed: the layers that its rows are.
    """

    needs: frozenset[Signal] = frozenset({"hidden"})
    speculative = True

    def __init__(self, arrays: Arrays, routed: Sequence[int]) -> None:
        self._arrays = arrays
        self.depth = int(arrays["stride"][0])
        # By layer: its row, and the layer that it foresees.
        targets = zip(routed, routed[self.depth :], strict=False)
        self._target = {layer: (row, target) for row, (layer, target) in enumerate(targets)}
        self._said: dict[int, tuple[int, Want]] = {}  # by target, and in which step

    def observe(self, demand: Demand, view: View) -> None:
        """It learns nothing while it serves."""

    def forecast(self, view: View) -> list[Want]:
        """The likely experts of the coming layers, as far as they were foreseen in this pass."""
        route = view.route
        if view.layer in self._target and route is not None and route.hidden is not None:
            row, target = self._target[view.layer]
            found = chances(said_ahead(self._arrays, row, route.hidden))
            self._said[target] = view.step, likely(target, found, view.top_k)
        said = (self._said.get(ahead.layer) for ahead in view.ahead)
        return [found[1] for found in said if found is not None and found[0] == view.step]
