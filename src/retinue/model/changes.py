"""What approximate policies change in a pass: who serves, who is left out; and the books of it.

Nothing is changed while `active` is off, as in the self-check and in passes of the plain model.
Routing weight that the chosen expert did not serve counts as degraded, request by request.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from retinue.memory.cache import ExpertCache
from retinue.metrics import Metrics
from retinue.model.accounts import Accounts
from retinue.model.expert_map import ExpertsModule
from retinue.model.restriction import Rerouted, Restriction
from retinue.model.routing import Router
from retinue.model.tally import Tally
from retinue.policy.base import BoolArray, Choice, Route, View
from retinue.policy.miss.book import Books, Served
from retinue.policy.policies import Policies
from retinue.policy.thin.left_out import left_out
from retinue.types import FloatArray, IntArray, Phase


class Changes:
    """The approximate part of `policies` at work on one model's routers and experts.

    `restriction` stands between the routers and a routing that is not exact. Where that keeps to a
    fixed set, `books` say who serves and what is fetched. Raises Unsupported where the routers do
    not obey. `accounts` say what the last pass was for each of its requests.
    """

    def __init__(
        self,
        routers: Sequence[Router | None],
        modules: Sequence[ExpertsModule],
        cache: ExpertCache,
        policies: Policies,
        metrics: Metrics,
    ) -> None:
        self._cache, self._policies, self._metrics = cache, policies, metrics
        self._active = False
        self._served: dict[int, Served] = {}  # by the books, and not computed yet
        layers, experts = len(cache.slot_of), cache.experts
        self.accounts = Accounts(layers, experts)
        self.accounts.on = not (
            policies.routing.exact and policies.thinning.exact and policies.precision.exact
        )
        self.tally = Tally(metrics, self.accounts, cache.sizes.read_bytes[0])
        self.books = Books(policies.fetch_above, (layers, experts))
        self.restriction: Restriction | None = None
        if not policies.routing.exact:
            self.restriction = Restriction(routers, modules, policies.routing, self._serve)

    @property
    def active(self) -> bool:
        """Whether policies may change anything now."""
        return self._active

    @active.setter
    def active(self, active: bool) -> None:
        """Let policies change things, or not."""
        self._active = active
        if self.restriction is not None:
            self.restriction.active = active

    @property
    def reroutes(self) -> bool:
        """Whether a policy chooses for the routers now."""
        return self.restriction is not None and self.restriction.active

    @property
    def restricted(self) -> bool:
        """Whether residents serve tokens now whose experts are not there."""
        return self.reroutes and self._policies.routing.restricts

    @property
    def thins(self) -> bool:
        """Whether some of a token's experts may be left out now."""
        return self._active and not self._policies.thinning.exact

    def begin_pass(self, phase: Phase, rows: Sequence[int]) -> None:
        """A forward pass starts, with `rows[i]` tokens of its i-th request."""
        self._served.clear()
        if self.restriction is not None:
            self.restriction.phase = phase
        self.accounts.begin(rows, phase)

    def end_pass(self, *, succeeded: bool) -> None:
        """The pass has ended. One that failed leaves the books as they were before it."""
        self.tally.count()
        if succeeded:
            self.books.commit()
        else:
            self.books.abandon()

    def close(self) -> None:
        """Give the routers back."""
        if self.restriction is not None:
            self.restriction.close()

    def take(self, layer: int) -> Rerouted | None:
        """What became of the layer's last routing, once; None where its router chose."""
        return self.restriction.take(layer) if self.restriction is not None else None

    def take_served(self, layer: int) -> Served | None:
        """What the layer's book decided for its last routing, once."""
        return self._served.pop(layer, None)

    def choose(
        self, layer: int, index: torch.Tensor, weights: torch.Tensor, rerouted: Rerouted | None
    ) -> None:
        """Count what a layer's router chose: [tokens, k], unless a policy chose for it."""
        if rerouted is not None:
            self.accounts.choose(layer, rerouted.chosen, rerouted.weights)
        elif self.accounts.on:
            self.accounts.choose(layer, index.numpy(), weights.float().numpy())

    def thin(
        self, index: torch.Tensor, weights: torch.Tensor, route: Route, view: View
    ) -> tuple[torch.Tensor, torch.Tensor, FloatArray]:
        """Leave out experts: `index` and `weights` [tokens, k] anew, and what went, [tokens].

        Who is left out has an id that means none.
        """
        route = replace(route, experts=index.numpy(), weights=weights.float().numpy())
        keep, lost, gain = left_out(self._policies.thinning, route, view)
        if keep.all():
            return index, weights, lost
        stays = torch.from_numpy(keep)
        index = torch.where(stays, index, view.experts)
        if self._policies.thinning.renormalises:
            weights = (weights.float() * torch.from_numpy(gain)[:, None]).to(weights.dtype)
        return index, torch.where(stays, weights, 0), lost

    def lowered(
        self, index: torch.Tensor, weights: FloatArray, low: set[int], lost: FloatArray | None
    ) -> FloatArray:
        """`lost` [tokens] and the weight of the experts `low`, not served as the model was given.

        index, weights: [tokens, k].
        """
        served_low = np.isin(index.numpy(), list(low))
        more = np.where(served_low, weights, 0).sum(axis=1)
        return np.asarray(more if lost is None else lost + more, dtype=np.float32)

    def count(
        self, layer: int, weights: FloatArray, rerouted: Rerouted | None, lost: FloatArray | None
    ) -> None:
        """Count what a layer's router gave, `weights` [tokens, k] if nobody chose for it.

        `lost` [tokens] is the weight of experts that were left out.
        """
        degraded = np.zeros(len(weights), dtype=np.float32) if lost is None else lost
        if rerouted is not None:
            weights = rerouted.weights
            degraded = degraded + (weights * rerouted.replaced).sum(axis=1)
            self._metrics.now.rerouted += int(np.count_nonzero(rerouted.replaced))
        given = weights.sum(axis=1)
        degraded = np.minimum(degraded, given)
        self._metrics.count_weight(layer, float(given.sum()), float(degraded.sum()))
        self.accounts.serve([layer], given[None], degraded[None])

    def count_restricted(self, layer: int, rerouted: Rerouted, served: Served) -> None:
        """Count what became of a restricted layer's misses, and what its router chose."""
        self._metrics.count_choices(layer, int(served.missed.sum()), len(served.fetched))
        self._metrics.now.fetched_bytes += self._cache.read_bytes(layer, served.fetched)
        self.accounts.choose(layer, rerouted.chosen, rerouted.weights)
        self.accounts.miss(served.missed, served.reads)

    def _serve(self, choice: Choice) -> BoolArray:
        """Which experts may serve each token without a read: [tokens, experts]."""
        if self._policies.routing.restricts:
            served = self._served[choice.layer] = self.books.serve(choice)
            return served.may
        there = self._cache.ready[choice.layer, : choice.scores.shape[1]]
        return np.broadcast_to(there, choice.scores.shape)


def distinct(chosen: IntArray, experts: int) -> IntArray:
    """The distinct experts of `chosen`, in order; ids of `experts` or more mean none."""
    found = np.unique(chosen)
    return found[found < experts]
