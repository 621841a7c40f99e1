"""What the network remembers of all sequences: keys and values in one pool, states in each.

Attention layers share a pool a layer: `[tokens, heads, width]`, taken once, touched as it fills.
A sequence owns blocks of it; `engine/blocks.py` says which, and several sequences may own the same
block. Layers with a running state (linear attention, convolutions) keep it in the sequence.

transformers' models see the store as a Cache. `begin` says which sequences the next forward pass
is for, `commit` makes what it wrote count. Without `commit` nothing has happened.
"""

import itertools
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    LinearAttentionLayer,
    get_layer_types_and_kwargs,
)

from retinue.types import BLOCK_TOKENS

ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
RUNNING_STATE = ("linear_attention", "conv")
BOTH = ("hybrid", "hybrid_sliding")
WITHOUT = ("dummy",)

States = tuple[torch.Tensor | None, ...]


@dataclass(slots=True)
class Sequence:
    """One sequence's memory: its blocks of the pool, the tokens in them, and running states.

    `own` is the cache that the model made for itself, in families whose layers cannot share a pool.
    `number` is its own in this process.
    """

    blocks: list[int]
    length: int = 0
    states: dict[int, States] = field(default_factory=dict)
    own: Any = None
    number: int = field(default_factory=itertools.count().__next__)
    places: torch.Tensor = field(init=False)  # of all its tokens in the pool: [room]
    first: int | None = field(init=False)  # the first place, if the others follow it

    def __post_init__(self) -> None:
        self.grow(self.blocks)

    def grow(self, blocks: list[int]) -> None:
        """Own `blocks` now, which begin with those that it owned before."""
        self.blocks = blocks
        starts = torch.tensor(self.blocks, dtype=torch.int64) * BLOCK_TOKENS
        self.places = (starts[:, None] + torch.arange(BLOCK_TOKENS)).view(-1)
        follow = all(b == self.blocks[0] + n for n, b in enumerate(self.blocks))
        self.first = self.blocks[0] * BLOCK_TOKENS if follow and self.blocks else None

    @property
    def room(self) -> int:
        """Tokens that its blocks can hold."""
        return len(self.blocks) * BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Segment:
    """The next tokens of one sequence in a forward pass."""

    sequence: Sequence
    tokens: Items[int]


@dataclass(frozen=True, slots=True)
class Span:
    """Where one segment's queries lie in the pass, and its keys in what attention is given."""

    first: int  # query
    count: int  # of queries
    past: int  # tokens before the first query
    skipped: int  # of those, how many a sliding window has left behind
    keys: slice | torch.Tensor

    @property
    def key_count(self) -> int:
        """Keys that the segment attends to: those kept of the past, and its own."""
        return self.past - self.skipped + self.count


class Store(Cache):
    """The memory of all sequences of one model. `tokens` bounds those of all of them together."""

    def __init__(self, config: PreTrainedConfig, tokens: int, *, shareable: bool = True) -> None:
        kinds, options = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        known = all(kind in ATTENTION + RUNNING_STATE + BOTH + WITHOUT for kind in kinds)
        self.shareable = shareable and known
        self.packable = self.shareable and all(kind in ATTENTION + WITHOUT for kind in kinds)
        self._tokens = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        self.segments: tuple[Segment, ...] = ()
        self._writes = torch.empty(0, dtype=torch.int64)
        self._spans: dict[tuple[int | None, bool], tuple[Span, ...]] = {}
        layers = [self._layer(*item) for item in zip(kinds, options, strict=True)]
        super().__init__(layers=layers if self.shareable else [DummyLayer()])  # type: ignore[no-untyped-call]

    def _layer(self, kind: str, options: dict[str, Any]) -> Any:
        window, states = options.get("sliding_window"), options.get("number_of_states", 1)
        if kind in RUNNING_STATE:
            return LinearAttentionLayer(number_of_states=states)
        if kind in BOTH:
            return _Both(self, window, states)
        return Pool(self, window) if kind in ATTENTION else DummyLayer()  # type: ignore[no-untyped-call]

    @property
    def tokens(self) -> int:
        """Tokens that the pool holds."""
        return self._tokens

    # --- one forward pass

    def begin(self, segments: Items[Segment]) -> None:
        """The next pass appends to these sequences, each with room for its tokens."""
        for segment in segments:
            after = segment.sequence.length + len(segment.tokens)
            assert after <= segment.sequence.room, (after, segment.sequence.room)
        self.segments = tuple(segments)
        self._spans.clear()
        self._writes = torch.cat([_places(s.sequence, s.tokens) for s in segments])
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionLayer):
                _stack(layer, [s.sequence.states.get(index) for s in segments])

    def commit(self) -> None:
        """The pass succeeded: its tokens belong to the sequences now."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionLayer):
                for row, segment in enumerate(self.segments):
                    segment.sequence.states[index] = _row(layer, row)
        for segment in self.segments:
            segment.sequence.length += len(segment.tokens)
        self.end()

    def end(self) -> None:
        """The pass is over."""
        self.segments = ()

    def pool(self, layer: int) -> "Pool":
        """The keys and values of `layer`, which has attention."""
        pool = self.layers[layer]
        assert isinstance(pool, Pool), layer
        return pool

    def spans(self, layer: int) -> tuple[Span, ...]:
        """Per segment where its queries and keys are, for attention in `layer`."""
        pool = self.pool(layer)
        key = pool.window, pool.in_place
        if key not in self._spans:
            self._spans[key] = tuple(self._plan(*key))
        return self._spans[key]

    def _plan(self, window: int | None, in_place: bool) -> list[Span]:
        spans: list[Span] = []
        query = key = 0
        for segment in self.segments:
            sequence, count = segment.sequence, len(segment.tokens)
            skipped, stop = window_left(sequence, window), sequence.length + count
            keys: slice | torch.Tensor = slice(key, key + stop - skipped)
            if in_place:
                keys = sequence.places[skipped:stop]
                if sequence.first is not None:
                    keys = slice(sequence.first + skipped, sequence.first + stop)
            spans.append(Span(query, count, sequence.length, skipped, keys))
            query, key = query + count, key + stop - skipped
        return spans

    def write(self, pool: torch.Tensor, states: torch.Tensor) -> None:
        """Put `states`, [1, heads, tokens, width] or [tokens, heads, 1, width], in their places."""
        pool.index_copy_(0, self._writes, states.transpose(1, 2).reshape(-1, *pool.shape[1:]))

    def reads(self, window: int | None) -> torch.Tensor:
        """The places of all tokens that the pass attends to, one sequence after the other."""
        parts = []
        for segment in self.segments:
            sequence = segment.sequence
            stop = sequence.length + len(segment.tokens)
            parts.append(sequence.places[window_left(sequence, window) : stop])
        return torch.cat(parts)

    # --- what transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before the pass, of the longest of its sequences."""
        return max((s.sequence.length for s in self.segments), default=0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys and offset of a mask for all; the masks that count are made by sequence."""
        return self.get_seq_length() + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        """By layer, whether it attends through a window."""
        return [getattr(layer, "window", None) is not None for layer in self.layers]


class Pool(CacheLayerMixin):
    """One attention layer's keys and values.

    A family may attend to just what `update` returns, or make keys of it first: where they are
    stored compressed. So `update` returns copies of what the running sequences hold, until it has
    been seen that attention takes them as they are. From then on it returns the pool itself.
    """

    is_sliding = False

    def __init__(self, store: "Store", window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store, self.window = store, window
        self.in_place = False
        self._returned: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the room for all tokens, now that heads and widths are known."""
        self.keys, self.values = self._room(key_states), self._room(value_states)
        self.is_initialized = True

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_empty(self._store.tokens, states.shape[1], states.shape[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, heads, tokens, width]; return what attention in this pass may need."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self.keys, self.values
        assert keys is not None
        assert values is not None
        self._store.write(keys, key_states)
        self._store.write(values, value_states)
        if self.in_place:
            return self.all_states()
        reads = self._store.reads(self.window)
        self._returned = _as_states(keys.index_select(0, reads)), _as_states(values[reads])
        return self._returned

    def all_states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of all places: [1, heads, places, width]."""
        assert self.keys is not None
        assert self.values is not None
        return _as_states(self.keys), _as_states(self.values)

    def see(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Learn what attention was called with in this layer."""
        if self._returned is not None:
            self.in_place = keys is self._returned[0] and values is self._returned[1]
            self._returned = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the store's."""
        return self._store.get_mask_sizes(query_length, 0)

    def get_seq_length(self) -> int:
        """As the store's."""
        return self._store.get_seq_length()

    def get_max_length(self) -> int:
        """-1: no bound that transformers should know."""
        return -1


class _Both(LinearAttentionLayer, Pool):  # type: ignore[override]
    """A layer with attention and a running state side by side."""

    def __init__(self, store: Store, window: int | None, number_of_states: int) -> None:
        Pool.__init__(self, store, window)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)  # type: ignore[no-untyped-call]

    def lazy_initialization(  # type: ignore[override]
        self, *args: torch.Tensor, **kwargs: Any
    ) -> None:
        # Keys and values come by position, states by name: so do transformers' own such layers.
        if args:
            Pool.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)


def _as_states(pool: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, width] as attention wants it: [1, heads, tokens, width]."""
    return pool.unsqueeze(0).transpose(1, 2)


def window_left(sequence: Sequence, window: int | None) -> int:
    """Past tokens that a sliding window has left behind for the next query."""
    return 0 if window is None else max(0, sequence.length - window + 1)


def _places(sequence: Sequence, tokens: Items[int]) -> torch.Tensor:
    return sequence.places[sequence.length : sequence.length + len(tokens)]


def _stack(layer: LinearAttentionLayer, rows: Items[States | None]) -> None:
    """Give `layer` the states of the coming pass, one row a sequence: copies, never the originals.

    Sequences of a pass are all new, or all have states.
    """
    LinearAttentionLayer.__init__(layer, number_of_states=layer.number_of_states)
    present = [row for row in rows if row is not None]
    if not present:
        return
    assert len(present) == len(rows), "new sequences and old ones in one pass"
    for index in range(layer.number_of_states):
        conv = [row[2 * index] for row in present]
        recurrent = [row[2 * index + 1] for row in present]
        if conv[0] is not None:
            layer.conv_states[index] = torch.cat([t for t in conv if t is not None])
            layer.conv_kernel_size[index] = conv[0].shape[-1]
            layer.is_conv_states_initialized[index] = True
        if recurrent[0] is not None:
            layer.recurrent_states[index] = torch.cat([t for t in recurrent if t is not None])
            layer.is_recurrent_states_initialized[index] = True
        layer.has_previous_state[index] = True


def _row(layer: LinearAttentionLayer, row: int) -> States:
    """One sequence's states after a pass, conv and recurrent in turn."""
    return tuple(
        None if tensor is None else tensor[row : row + 1].clone()
        for index in range(layer.number_of_states)
        for tensor in (layer.conv_states[index], layer.recurrent_states[index])
    )
