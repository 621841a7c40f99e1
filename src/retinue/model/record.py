"""Writes down what the network does in one step of single tokens, without computing it.

The step runs once, under a mode that sees every operation of torch. Experts, keys and values,
attention, and what restricted routers chose are marked by operations of our own; products with
weights are skipped. What remains are small operations, of whose tensors only shape, place and
source matter: their values are none.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from retinue.errors import Unsupported
from retinue.model.attention import Mask
from retinue.model.grouped_linear import GroupedLinear
from retinue.model.kv import Pool, Segment, Sequence, Span, Store, window_left
from retinue.model.stored_embedding import StoredEmbedding
from retinue.types import BLOCK_TOKENS

EXPERTS, ATTEND, GROUPED, ROUTED, EMBEDDING = "experts", "attend", "grouped", "routed", "embedding"
aten = torch.ops.aten
PRODUCTS = (aten.linear.default, aten.mv.default, aten.mm.default, aten.addmm.default)
# What follows these depends on values, which a recording does not have.
_VALUES = (aten._local_scalar_dense.default, aten.nonzero.default, aten.is_nonzero.default)


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the step: a view of the memory `source`."""

    source: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # elements

    @property
    def stop_bytes(self) -> int:
        """Where its last element ends in the memory."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return (self.offset + last + 1) * self.dtype.itemsize if 0 not in self.shape else 0


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of torch, or one of the five above of `module`; tensors are Refs.

    ROUTED only looks: at what a router ranked by, the values and indices of its `topk`, its experts
    and its weights, and then at the first and the last of these and, where its policy needs it, the
    router's input, in fp32.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    module: nn.Module | None = None

    @property
    def inputs(self) -> list[Ref]:
        """The tensors that it reads, or changes in place."""
        return [leaf for leaf in tree_flatten((self.args, self.kwargs))[0] if type(leaf) is Ref]

    @property
    def changes(self) -> set[int]:
        """The sources that it changes in place."""
        schema = getattr(self.function, "_schema", None)
        if schema is None or not schema.is_mutable:
            return set()
        named = zip(schema.arguments, self.args, strict=False)
        written = [value for argument, value in named if argument.is_write]
        return {leaf.source for leaf in tree_flatten(written)[0] if type(leaf) is Ref}


@dataclass(frozen=True, slots=True)
class Recording:
    """A step: its operations, the memory that was there before it, and the logits."""

    operations: list[Operation]
    constants: dict[int, torch.Tensor]
    logits: Ref


@torch.inference_mode()
def record(model: Any, store: Store, tokens: torch.Tensor, positions: torch.Tensor) -> Recording:
    """What `model` does with `tokens [1, n]` at `positions [1, n]`, of n sequences.

    Later steps find the same two tensors changed. Raises Unsupported where a step depends on
    values, and what the family's own code raises.
    """
    recorder = _Recorder()
    marked = _Marked(store)
    stand_in = Sequence([0], BLOCK_TOKENS - 1)
    marked.begin([Segment(stand_in, [0]) for _ in range(tokens.shape[1])])
    with _marks(model, recorder, marked), recorder:
        logits = model(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=marked,
            use_cache=True,
            logits_to_keep=0,
        ).logits
    found = recorder.ref(logits)
    return Recording(_needed(recorder.operations, found), recorder.constants, found)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations, and tells by the storages of inputs and outputs whose memory it is."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.constants: dict[int, torch.Tensor] = {}
        self._sources: dict[int, int] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _VALUES:
            raise Unsupported(f"the step depends on values: `{func}`")
        if func is aten.lift_fresh.default:  # written by hand in the family's code
            self.constants[self._new(args[0])] = args[0]
            return args[0]
        if func in PRODUCTS:
            out = _without_computing(func, args)
        else:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            out = func(*args, **kwargs)
        self.note(func, args, kwargs, out)
        return out

    def note(self, func: Any, args: Any, kwargs: Any, out: Any, module: Any = None) -> None:
        """Add an operation. What it gives that is not memory of its inputs is new memory."""
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in inputs}
        args, kwargs = tree_map(self._leaf, (tuple(args), dict(kwargs)))
        outputs = [t for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor)]
        for tensor in outputs:
            if (storage := tensor.untyped_storage()._cdata) not in known:
                known.add(storage)
                self._new(tensor)
        refs = tuple(self.ref(tensor) for tensor in outputs)
        self.operations.append(Operation(func, args, kwargs, refs, module))

    def ref(self, tensor: torch.Tensor) -> Ref:
        """What stands for `tensor`; memory that nothing has made was there before."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self._sources:
            self.constants[self._new(tensor)] = tensor
        source = self._sources[storage]
        shape, strides = tuple(tensor.shape), tuple(tensor.stride())
        return Ref(source, tensor.dtype, shape, strides, int(tensor.storage_offset()))

    def _new(self, tensor: torch.Tensor) -> int:
        self._count += 1
        self._sources[tensor.untyped_storage()._cdata] = self._count
        return self._count

    def _leaf(self, value: Any) -> Any:
        return self.ref(value) if isinstance(value, torch.Tensor) else value


def _without_computing(func: Any, args: Any) -> torch.Tensor:
    """A product's output, of zeros: its values do not matter, its weights are many."""
    if func is aten.linear.default:
        shape = (*args[0].shape[:-1], args[1].shape[0])
    else:
        left, right = args[-2:]
        shape = (left.shape[0], *right.shape[1:])
    return torch.zeros(shape, dtype=args[0].dtype)


class _Marked(Store):
    """The store during a recording: nothing is written to it."""

    def __init__(self, store: Store) -> None:
        self.__dict__.update(store.__dict__)
        self._spans = {}
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.returned: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.pool(layer_idx)
        if not pool.is_initialized:
            with _disable_current_modes():
                pool.lazy_initialization(key_states, value_states)
        self.new = key_states, value_states
        with _disable_current_modes():
            self.returned = pool.all_states()
        return self.returned


@contextmanager
def _marks(model: nn.Module, recorder: _Recorder, store: _Marked) -> Iterator[None]:
    """Let experts and attention leave marks in the recording instead of computing."""
    saved: list[tuple[nn.Module, str, Any]] = []
    forwards: list[tuple[nn.Module, Callable[..., torch.Tensor]]] = []
    marks: dict[str, Callable[[nn.Module, Any], Any]] = {
        "retinue_run": lambda module, own: _experts_mark(module, recorder),
        "retinue_attend": lambda module, own: _attention_mark(recorder, store, own.name),
        "retinue_route": lambda module, own: _routed_mark(module, own, recorder),
    }
    try:
        for module in model.modules():
            if isinstance(module, GroupedLinear):
                forwards.append((module, _grouped_mark(module, recorder)))
            elif isinstance(module, StoredEmbedding):
                forwards.append((module, _embedding_mark(module, recorder)))
            for name, mark in marks.items():
                if (own := vars(module).get(name)) is not None:
                    saved.append((module, name, own))
                    setattr(module, name, mark(module, own))
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, name, own in saved:
            setattr(module, name, own)
        for module, _ in forwards:
            vars(module).pop("forward", None)


def _grouped_mark(module: GroupedLinear, recorder: _Recorder) -> Callable[..., torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        given = input.contiguous()
        with _disable_current_modes():
            out = torch.zeros((*given.shape[:-1], module.out_features), dtype=given.dtype)
        recorder.note(GROUPED, (given,), {}, out, module)
        return out

    return forward


def _embedding_mark(module: StoredEmbedding, recorder: _Recorder) -> Callable[..., torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            out = torch.zeros((*input.shape, module.embedding_dim), dtype=module.dtype)
        recorder.note(EMBEDDING, (input,), {}, out, module)
        return out

    return forward


def _experts_mark(module: nn.Module, recorder: _Recorder) -> Callable[..., torch.Tensor]:
    def run(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with _disable_current_modes():
            out = torch.zeros(hidden.shape, dtype=hidden.dtype)
        recorder.note(EXPERTS, (hidden, index, weights), {}, out, module)
        return out

    return run


def _routed_mark(module: nn.Module, own: Any, recorder: _Recorder) -> Callable[..., Any]:
    def route(*args: Any, **kwargs: Any) -> Any:
        output, *seen = own.record(*args, **kwargs)
        shown = [seen[0], seen[-1]]
        if own.needs_hidden:
            shown.append(args[0].reshape(len(seen[0]), -1))
        copies = [tensor.to(torch.float32, copy=True) for tensor in shown]
        recorder.note(ROUTED, (*seen, *copies), {}, (), module)
        return output

    return route


def _attention_mark(recorder: _Recorder, store: _Marked, name: str) -> Callable[..., Any]:
    def attend(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: Any,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        returned, new = store.returned, store.new
        if returned is None or new is None or key is not returned[0] or value is not returned[1]:
            raise Unsupported("attention takes other keys than those that are stored")
        store.returned = None
        with _disable_current_modes():
            if not _sees_all(mask, name, store.pool(layer_of(module)), store.tokens):
                raise Unsupported("attention leaves out some of the keys before it")
        shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        with _disable_current_modes():
            out = torch.zeros(shape, dtype=query.dtype)
        recorder.note(ATTEND, (query, *new), options, out, module)
        return out, None

    return attend


def _sees_all(mask: Any, name: str, pool: Pool, tokens: int) -> bool:
    """Whether `mask` lets one token attend to all that the layer's window has not left behind."""
    if not isinstance(mask, Mask):
        return mask is None
    sequence = Sequence(list(range(tokens // BLOCK_TOKENS)), tokens - 1)
    skipped = window_left(sequence, pool.window)
    own = mask.of(name, Span(0, 1, sequence.length, skipped, slice(0)))
    if own is None:
        return True
    return bool(own.all()) if own.dtype == torch.bool else not bool(own.any())


def layer_of(module: Any) -> int:
    """The number of an attention module's layer."""
    return int(module.layer_idx)


def _needed(operations: list[Operation], logits: Ref) -> list[Operation]:
    """Without the operations of which nothing is used, and without those that only look."""
    used, kept = {logits.source}, []
    for operation in reversed(operations):
        sources = {ref.source for ref in operation.inputs}
        outputs = {ref.source for ref in operation.outputs}
        view = outputs <= sources and not operation.changes
        if operation.module is not None or (not view and used & (outputs | operation.changes)):
            kept.append(operation)
            used |= sources
    return kept[::-1]
