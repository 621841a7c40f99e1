"""Wrong labels on purpose: what inferred or given tasks cost when some of them are wrong."""

import random
from collections.abc import Sequence


def mislabelled(
    tasks: Sequence[str | None], share: float, known: Sequence[str], seed: int
) -> list[str | None]:
    """`tasks` with a `share` of them, drawn by `seed`, replaced by another one of `known`.

    eMoE (arXiv 2503.06823, section 5) measures 20 %. Exactly `share` of them is wrong, rounded,
    so that two runs differ in nothing else. `known` holds two names at least.
    """
    draw = random.Random(seed)
    wrong = set(draw.sample(range(len(tasks)), round(share * len(tasks))))
    return [
        draw.choice([name for name in known if name != task]) if number in wrong else task
        for number, task in enumerate(tasks)
    ]
