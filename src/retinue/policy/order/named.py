"""The orders by the names that `--order` takes."""

from retinue.config import ALIKE
from retinue.errors import UsageError
from retinue.policy.order.alike import Alike
from retinue.policy.order.base import Order
from retinue.policy.order.emoe import Emoe
from retinue.policy.order.estimate import Estimate
from retinue.policy.order.fcfs import Fcfs
from retinue.policy.order.shortest import Shortest
from retinue.policy.policies import Paths


def order_named(name: str, estimate: Estimate, paths: Paths | None = None) -> Order:
    """One of `config.ORDERS`, which decides by `estimate`, or `alike`, which does by `paths`.

    Raises UsageError for `alike` without `paths`.
    """
    if name == ALIKE:
        if paths is None:
            raise UsageError(
                "the order `alike` groups by what a preset predicts for a whole prompt",
                hint="use it with `--preset expertflow`, or another order",
            )
        return Alike(estimate, paths)
    orders: dict[str, Order] = {
        "fcfs": Fcfs(),
        "shortest": Shortest(estimate),
        "emoe": Emoe(estimate),
    }
    return orders[name]
