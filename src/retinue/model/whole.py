"""A model with every weight in memory, in fp32: what gradients and other precisions are tried on.

It is slow and large, runs texts without a KV cache, and serves nobody. Experts are computed by
`apply_expert`, as in the engine, so that whatever can be served can be tried.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.link import Views
from retinue.memory.nested import GROUP, PULL
from retinue.model.experts import IMPLEMENTATION
from retinue.model.load import build, load_dense
from retinue.model.reference import read_expert
from retinue.model.work import apply_expert, in_type
from retinue.types import Facts, FloatArray, IntArray

AS_IS = 16  # bits; the checkpoint's own
AROUND = 2.3  # once more in another precision, and what a backward pass takes


def whole_bytes(facts: Facts) -> int:
    """About how many bytes the model takes here."""
    item = 4 if facts.dtype == "float32" else 2
    experts = facts.total_experts * (facts.decoded_bytes or facts.expert_bytes)
    return int(AROUND * (facts.dense_bytes + experts) * 4 / item)


def rounded(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """`weights` as `bits` bits of the nested store say them, which explains how."""
    if bits >= AS_IS:
        return weights
    flat = functional.pad(weights.reshape(-1), (0, -weights.numel() % GROUP)).view(-1, GROUP)
    largest = flat.abs().amax(1, keepdim=True).bfloat16().float()
    steps = 1 << bits
    level = ((flat / largest + 1) * (steps / 2)).nan_to_num(steps / 2).floor().clamp(0, steps - 1)
    middle = (2 * level + 1) / steps - 1
    found = (middle * (PULL if bits == 2 else 1) * largest).view(-1)
    return found[: weights.numel()].view(weights.shape)


class WholeModel:
    """The checkpoint in `folder`; `close` lets go of it."""

    def __init__(self, folder: Path) -> None:
        network = build(open_checkpoint(folder))
        network.model.set_experts_implementation(IMPLEMENTATION)
        reader = Reader()
        try:
            load_dense(network, reader)
        finally:
            reader.close()
        self._model = network.model.float()  # type: ignore[no-untyped-call]
        self._model.requires_grad_(False)
        self._modules = network.experts.modules
        layouts = network.experts.layouts
        self._layers = [
            _Layer(found.module, [_plain(read_expert(one)) for one in layouts[found.layer]])
            for found in self._modules
        ]
        for found, layer in zip(self._modules, self._layers, strict=True):
            found.module.retinue_run = layer.run  # type: ignore[assignment]

    def close(self) -> None:
        """Let go of the network. Without that the weights live until a garbage collection."""
        for found in self._modules:
            found.module.retinue_run = None  # type: ignore[assignment]
        self._layers = []

    def loss(self, texts: Sequence[Sequence[int]], bits: IntArray | None = None) -> float:
        """The mean loss of a token in nats, with experts in `bits` [rows, experts]; None: as is."""
        for row, layer in enumerate(self._layers):
            layer.set_bits(None if bits is None else bits[row])
        with torch.no_grad():
            total = sum(float(self._nll(ids)) for ids in texts)
        return total / sum(len(ids) - 1 for ids in texts)

    def squared_gradients(self, texts: Sequence[Sequence[int]]) -> FloatArray:
        """For each row the squared gradient of a text's loss by the experts' output: [rows].

        Summed over the output's numbers, and a mean over tokens.
        """
        sums, tokens = np.zeros(len(self._layers)), 0
        for ids in texts:
            for layer in self._layers:
                layer.outputs, layer.keeps = [], True
            self._nll(ids).backward()  # type: ignore[no-untyped-call]
            for row, layer in enumerate(self._layers):
                gradients = [output.grad for output in layer.outputs]
                sums[row] += sum(float(g.square().sum()) for g in gradients if g is not None)
                layer.outputs, layer.keeps = [], False
            tokens += len(ids)
        return np.asarray(sums / tokens, dtype=np.float32)

    def distances(self, texts: Sequence[Sequence[int]], bits: tuple[int, int]) -> FloatArray:
        """How far two precisions of an expert are apart in what it adds: [rows, experts].

        Squared, times its squared routing weight, summed over the tokens that chose it; a mean
        over all tokens.
        """
        with torch.no_grad():
            for layer in self._layers:
                layer.set_bits(None)
                layer.compare(bits)
            for ids in texts:
                self._nll(ids)
        tokens = sum(len(ids) for ids in texts)
        most = max(layer.count for layer in self._layers)
        found = [
            np.pad(layer.compared().numpy(), (0, most - layer.count)) for layer in self._layers
        ]
        return np.asarray(np.stack(found) / tokens, dtype=np.float32)

    def _nll(self, ids: Sequence[int]) -> torch.Tensor:
        """The summed loss of a text's tokens but the first."""
        tokens = torch.tensor([list(ids)])
        embeddings = self._model.get_input_embeddings()
        with _differentiable(embeddings):
            logits = self._model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
        return functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Within, what the module computes is where gradients end."""

    def ask(_: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.requires_grad_(torch.is_grad_enabled())

    handle = module.register_forward_hook(ask)
    try:
        yield
    finally:
        handle.remove()


class _Layer:
    """The experts of one layer; `outputs` are kept with their gradients where `keeps` says so."""

    def __init__(self, module: nn.Module, experts: list[Views]) -> None:
        self._module, self._experts = module, experts
        self._now = experts  # in the bits that are computed in
        self._other: list[tuple[Views, Views]] | None = None
        self._distance = torch.zeros(len(experts))
        self.outputs: list[torch.Tensor] = []
        self.keeps = False

    @property
    def count(self) -> int:
        """How many experts the layer has."""
        return len(self._experts)

    def set_bits(self, bits: IntArray | None) -> None:
        """From now on compute in these; nothing is compared any more."""
        self._other, self._now = None, self._experts
        if bits is not None:
            pairs = zip(self._experts, bits.tolist(), strict=False)
            self._now = [self._in_bits(one, width) for one, width in pairs]

    def compare(self, bits: tuple[int, int]) -> None:
        """From now on add up how far these two are apart."""
        first, second = (partial(self._in_bits, bits=width) for width in bits)
        self._other = [(first(one), second(one)) for one in self._experts]
        self._distance = torch.zeros(len(self._experts))

    def compared(self) -> torch.Tensor:
        """What was added up, by expert."""
        return self._distance

    def run(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The layer's output; ids beyond the experts are skipped."""
        out = torch.zeros_like(hidden)
        for expert in np.unique(index.numpy()).tolist():
            if expert >= len(self._experts):
                continue
            tokens, ranks = torch.where(index == expert)
            inputs, share = hidden[tokens], weights[tokens, ranks].float().unsqueeze(-1)
            rows = apply_expert(self._module, inputs, self._now[expert])
            out = out.index_add(0, tokens, rows * share)
            if self._other is not None:
                one, two = (apply_expert(self._module, inputs, v) for v in self._other[expert])
                self._distance[expert] += ((one - two) * share).square().sum()
        if self.keeps:
            out.retain_grad()
            self.outputs.append(out)
        return out

    def _in_bits(self, views: Views, bits: int) -> Views:
        """`views` with their matrices rounded."""
        return {name: tuple(_rounded(block, bits) for block in views[name]) for name in views}


def _rounded(block: object, bits: int) -> torch.Tensor:
    assert isinstance(block, torch.Tensor)
    return rounded(block, bits) if block.ndim > 1 else block


def _plain(views: Mapping[str, tuple[object, ...]]) -> Views:
    return {
        name: tuple(in_type(block, torch.float32) for block in blocks)  # type: ignore[arg-type]
        for name, blocks in views.items()
    }
