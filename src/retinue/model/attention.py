"""Attention for many sequences in one forward pass, without code for any family.

Every family of transformers calls its attention through one interface. The function registered
here splits queries, keys and values by sequence and calls for each one what the family would have
called for it alone, with the mask that it would have had. So a sequence's attention is the same,
bit for bit, whatever runs beside it.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retinue.metrics import Clock
from retinue.model.kv import Span, Store

IMPLEMENTATION = "retinue"

Result = tuple[torch.Tensor, torch.Tensor | None]


def install(model: PreTrainedModel, store: Store, clock: Clock | None = None) -> None:
    """Let `model` attend by sequence, over what `store` holds; `clock` counts the time."""
    clock = clock or Clock()
    name: str = model.config._attn_implementation
    assert name != IMPLEMENTATION
    model.set_attn_implementation(IMPLEMENTATION)
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.retinue_attend = _Attention(store, name, clock)  # type: ignore[assignment]


def uninstall(model: PreTrainedModel) -> None:
    """Undo `install`: the model attends as it came, and the store is let go of."""
    for module in model.modules():
        if (attend := vars(module).get("retinue_attend")) is not None:
            name = attend.name
            del module.retinue_attend
    model.set_attn_implementation(name)


class Mask:
    """A mask that is made when attention knows for which sequence."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._made: dict[tuple[int, int, int], torch.Tensor | None] = {}

    def plain(self, name: str) -> torch.Tensor | None:
        """The mask of a forward pass that is none of the engine's."""
        mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[name](**self._arguments)
        return mask

    def of(self, name: str, span: Span) -> torch.Tensor | None:
        """The mask for one sequence: as if it were alone."""
        key = (span.count, span.past, span.skipped)
        if key not in self._made:
            sizes = {
                "batch_size": 1,
                "q_length": span.count,
                "kv_length": span.key_count,
                "q_offset": span.past,
                "kv_offset": span.skipped,
            }
            self._made[key] = ALL_MASK_ATTENTION_FUNCTIONS[name](**(self._arguments | sizes))
        return self._made[key]


class _Attention:
    """What an attention module carries: the store, and the name of its own attention."""

    def __init__(self, store: Store, name: str, clock: Clock) -> None:
        self._store, self.name, self._clock = store, name, clock

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **options: Any,
    ) -> Result:
        started = time.perf_counter()
        result = self._attend(module, query, key, value, mask, options)
        self._clock.seconds += time.perf_counter() - started
        return result

    def _attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        options: dict[str, Any],
    ) -> Result:
        inner = self._inner(module)
        store = self._store
        if not store.segments:
            whole = mask.plain(self.name) if isinstance(mask, Mask) else mask
            return inner(module, query, key, value, whole, **options)
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        packed = query.shape[0] == 1
        outputs = []
        for row, span in enumerate(store.spans(layer)):
            stop = span.first + span.count
            queries = query[:, :, span.first : stop] if packed else query[row : row + 1]
            own = mask.of(self.name, span) if isinstance(mask, Mask) else mask
            keys, values = _part(key, span.keys), _part(value, span.keys)
            outputs.append(inner(module, queries, keys, values, own, **options)[0])
        store.pool(layer).see(key, value)
        return torch.cat(outputs, dim=1 if packed else 0), None

    def _inner(self, module: nn.Module) -> Callable[..., Result]:
        """The family's own eager attention, or the shared function of that name."""
        if self.name in ALL_ATTENTION_FUNCTIONS:
            return ALL_ATTENTION_FUNCTIONS[self.name]  # type: ignore[no-any-return]
        home = sys.modules[type(module).__module__]
        return home.eager_attention_forward  # type: ignore[no-any-return]


def _part(states: torch.Tensor, places: slice | torch.Tensor) -> torch.Tensor:
    return states[:, :, places] if isinstance(places, slice) else states.index_select(2, places)


def _attend(module: nn.Module, *states: Any, **options: Any) -> Result:
    return module.retinue_attend(module, *states, **options)  # type: ignore[operator, no-any-return]


def _mask(**arguments: Any) -> Mask:
    return Mask(arguments)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)
