"""The way of a pass's tokens so far: what they used in the last two layers with experts."""

from dataclasses import replace

from retinue.policy.base import Prompt, Route, Signal, View
from retinue.types import Demand


class Trail:
    """A watcher; `routes` are those of the layer that runs and of the one before, in this order.

    After the first layer there is but one.
    """

    needs: frozenset[Signal] = frozenset()

    def __init__(self) -> None:
        self.routes: list[Route] = []

    def begin(self, prompt: Prompt) -> None:
        """Nothing to note."""

    def end(self, sequence: int) -> None:
        """Nothing to note."""

    def observe(self, demand: Demand, view: View) -> None:
        """A layer runs."""
        route = view.route
        if route is None:
            return
        if self.routes and self.routes[0].layer >= route.layer:  # the next pass has begun
            self.routes = []
        # A copy: the engine writes the next layer's choice where it had this one's.
        kept = replace(route, experts=route.experts.copy(), weights=route.weights.copy())
        self.routes = [kept, *self.routes[:1]]
