"""Keys and values of one sequence: room for the whole context, taken once, touched as it fills.

transformers' models see it as a Cache. Attention gets the filled part only, so the size of the
room changes no bit of the output. A sequence can be cut back to a prefix, which is how a
conversation keeps what its next turn shares with the last.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from retinue.errors import UsageError


class SequenceCache(Cache):
    """One sequence's keys and values over all layers."""

    def __init__(self, layers: int, context: int) -> None:
        self._rooms = [_Layer(context) for _ in range(layers)]
        super().__init__(layers=list(self._rooms))
        self.context = context

    @property
    def length(self) -> int:
        """Tokens that are stored."""
        return self._rooms[0].get_seq_length()

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on."""
        for layer in self._rooms:
            layer.truncate(length)


class _Layer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    is_sliding = False

    def __init__(self, context: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._context, self._length = context, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        return states.new_empty(batch, heads, self._context, width)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        stop = self._length + key_states.shape[-2]
        if stop > self._context:
            raise UsageError(f"the sequence exceeds the context of {self._context} tokens")
        self.keys[:, :, self._length : stop] = key_states
        self.values[:, :, self._length : stop] = value_states
        self._length = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        return self._length

    def get_max_length(self) -> int:
        return self._context

    def truncate(self, length: int) -> None:
        self._length = min(self._length, length)
