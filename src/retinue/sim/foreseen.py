"""What will be needed, pass by pass: the future that an oracle knows.

Which requests decode together depends on what their passes repeated. So the future is recorded in a
replay of its own; every exact preset has the same passes in it, as long as nothing depends on the
clock.
"""

from retinue.memory.base import Sizes
from retinue.policy.base import Prompt, Signal, View
from retinue.policy.evict.belady import Future, future_of
from retinue.policy.evict.recency import Recency
from retinue.policy.miss.fetch import FetchAll
from retinue.policy.policies import NoPredictor, Policies
from retinue.sim.recorded import Recording
from retinue.sim.replay import Replay
from retinue.sim.stage import Setting
from retinue.types import Demand


class _Seen:
    """A watcher that keeps what every turn demands."""

    needs: frozenset[Signal] = frozenset()

    def __init__(self) -> None:
        self.demands: list[Demand] = []

    def begin(self, prompt: Prompt) -> None:
        """Nothing to note."""

    def observe(self, demand: Demand, view: View) -> None:
        """Keep it."""
        self.demands.append(demand)

    def end(self, sequence: int) -> None:
        """Nothing to note."""


def foreseen(recording: Recording, setting: Setting, sizes: Sizes) -> Future:
    """The future of `recording` in `setting`, whose requests are all there at the start."""
    assert not setting.load.arrivals
    head, seen = recording.head, _Seen()
    policies = Policies(Recency(), NoPredictor(), FetchAll(), watchers=(seen,))
    Replay(recording, policies, setting, sizes).run()
    return future_of(seen.demands, head.layers, head.experts)
