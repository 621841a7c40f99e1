"""One way of learning arrays by gradient descent, for all parts that need it."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from retinue.types import FloatArray, IntArray

BATCH = 256  # tokens
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Course:
    """How long and how fast is learnt. `advance` is called after each epoch, may raise to stop."""

    epochs: int
    seed: int
    rate: float
    advance: Callable[[], object] = lambda: None
    decay: float = 0.01


def fresh(shapes: dict[str, tuple[int, ...]], seed: int) -> Weights:
    """Weights before training: biases are 0, the rest keeps the size of what goes through."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        scale = 0.0 if name.endswith("bias") else shape[-2] ** -0.5
        made[name] = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    return made


def descend(
    arrays: Weights, count: int, loss: Callable[[Weights, IntArray], torch.Tensor], course: Course
) -> dict[str, FloatArray]:
    """`arrays` after AdamW with a cosine schedule on `loss(arrays, which of count)`."""
    random = np.random.default_rng(course.seed)
    optimizer = torch.optim.AdamW(
        arrays.values(), lr=course.rate, weight_decay=course.decay, betas=(0.9, 0.98)
    )
    steps = max(1, count // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, course.epochs * steps)
    for _ in range(course.epochs):
        order = random.permutation(count)
        for batch in np.array_split(order, steps):
            value = loss(arrays, batch)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        course.advance()
    return {name: array.detach().numpy() for name, array in arrays.items()}
