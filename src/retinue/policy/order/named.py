"""The orders by the names that `--order` takes."""

from retinue.policy.order.base import Order
from retinue.policy.order.emoe import Emoe
from retinue.policy.order.estimate import Estimate
from retinue.policy.order.fcfs import Fcfs
from retinue.policy.order.shortest import Shortest


def order_named(name: str, estimate: Estimate) -> Order:
    """One of `config.ORDERS`, which decides by `estimate`."""
    orders: dict[str, Order] = {
        "fcfs": Fcfs(),
        "shortest": Shortest(estimate),
        "emoe": Emoe(estimate),
    }
    return orders[name]
