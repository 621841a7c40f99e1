"""What routers say before their softmax, as weights and biases that anyone can multiply with."""

import numpy as np
import torch

from retinue.errors import Unsupported
from retinue.model.load import Network
from retinue.model.routing import find_routers, router_input
from retinue.types import FloatArray


@torch.inference_mode()
def gates(network: Network, experts: int) -> list[tuple[FloatArray, FloatArray]]:
    """Of each layer with experts the weights [hidden, experts] and the bias [experts].

    A router is asked for zeros and for each unit, so that it does not matter how it keeps its
    weights; one that is not affine is taken as far as it is. Raises Unsupported where one cannot
    be asked.
    """
    found = []
    for router in find_routers(network.model, network.experts.modules):
        if router is None:
            raise Unsupported(
                "some routers of this model cannot be asked for their scores",
                hint="leave out the kinds that begin with the routers, such as `pre-gated`",
            )
        zeros = router_input(router, 1)
        bias = router(zeros)[0].float()
        units = torch.eye(zeros.shape[1], dtype=zeros.dtype)
        weights = router(units)[0].float() - bias
        lacking = experts - weights.shape[1]
        found.append(
            (
                np.pad(weights.numpy(), ((0, 0), (0, lacking))),
                np.pad(bias[0].numpy(), (0, lacking), constant_values=-1e4),
            )
        )
    return found
