"""DAOP's cache: what the running sequences use most, prompts included.

DAOP (arXiv 2501.10375, section 4.1): after a prompt an expert takes another one's place where more
of its tokens chose it (1.05 times as many). Deviation: answers count as well, so that a long one
does not stay with its prompt's experts, and whoever has been used least leaves when room is needed.
"""

from retinue.policy.base import View
from retinue.policy.uses import SequenceUses
from retinue.types import FloatArray, IntArray


class UsedHere:
    """`uses` is a watcher of the same preset."""

    def __init__(self, uses: SequenceUses) -> None:
        self._uses = uses

    def priorities(self, layers: IntArray, experts: IntArray, view: View) -> FloatArray:
        """The share of tokens that used the expert; of ties the least recent first."""
        uses = self._uses
        return uses.frequent(layers, experts) + 1e-4 * uses.recent(layers, experts)
