"""What a family can do beyond an answer from a whole prompt, tried on its twin, never assumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from retinue.errors import Unsupported
from retinue.memory import native
from retinue.model.attention import install, uninstall
from retinue.model.expert_map import find_experts
from retinue.model.experts import IMPLEMENTATION
from retinue.model.kv import Segment, Sequence, Store
from retinue.model.restriction import Restriction
from retinue.model.restriction import probe as obeys
from retinue.model.routing import find_routers, top_k
from retinue.model.runner import shared_pass
from retinue.model.state_size import new_cache
from retinue.model.step import Steps
from retinue.model.twin import VOCABULARY, twin
from retinue.policy.base import BoolArray, Choice
from retinue.policy.route.next_resident import NextResident
from retinue.types import BLOCK_TOKENS

# Over a window, over a chunk of the linear-attention kernels, and over the border of one.
PROMPT_TOKENS, FIRST_CHUNK_TOKENS = 100, 70
UNTRIED = "it could not be tried out"
TOLERANCE = 1e-5  # of the logits' norm; float32 rounding stays below a tenth of it


@dataclass(frozen=True, slots=True)
class Abilities:
    """Which ways of running a family give the plain model's logits. JSON-shaped.

    What is false is done the safe way; `notes` say so, one sentence each.
    """

    chunked_prefill: bool = False
    batching: bool = False
    look_ahead: bool = False
    restricted_routing: bool = False
    unprepared: str = UNTRIED  # why no decoding step can be prepared, if so
    unprepared_restricted: str = UNTRIED  # the same, where a policy chooses for the routers
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "notes", tuple(self.notes))  # JSON has lists


def probe(config: PreTrainedConfig) -> Abilities:
    """Try the family of `config` on a tiny twin. Never raises for a family that has none."""
    try:
        model = twin(config)
        return abilities_of(model)
    except Exception as error:  # whatever a family's own code raises
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        note = f"the family `{config.model_type}` could not be tried out, so that the safe way"
        return Abilities(notes=(f"{note} is taken everywhere: {reason}",))


def abilities_of(model: PreTrainedModel) -> Abilities:
    """Try a real, small model."""
    chunked, look_ahead = _prefills_in_chunks(model), None not in _routers(model)
    batching, restricted = _batches(model), _obeys(model)
    notes = []
    if not chunked:
        notes.append("prompts run whole: in chunks this family's logits differ, or it refuses")
    if not batching:
        notes.append("each request has passes of its own: together this family's logits differ")
    unprepared = _why_unprepared(model) if batching else "its requests do not share passes"
    otherwise = unprepared or "its routers do not obey"
    if restricted and not unprepared:
        with _half_of_the_experts(model):
            otherwise = _why_unprepared(model)
    return Abilities(chunked, batching, look_ahead, restricted, unprepared, otherwise, tuple(notes))


def _routers(model: PreTrainedModel) -> list[Any]:
    return find_routers(model, find_experts(model))


@torch.inference_mode()
def _prefills_in_chunks(model: Any) -> bool:
    model.set_experts_implementation("eager")
    random = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, VOCABULARY, (1, PROMPT_TOKENS), generator=random)
    whole = model(input_ids=prompt, past_key_values=new_cache(model), use_cache=True).logits[0]
    first = prompt[:, :FIRST_CHUNK_TOKENS]
    out = model(input_ids=first, past_key_values=new_cache(model), use_cache=True)
    rest = prompt[:, FIRST_CHUNK_TOKENS:]
    try:
        out = model(input_ids=rest, past_key_values=out.past_key_values, use_cache=True)
    except Exception:  # whatever a family's own code raises
        return False
    wanted = whole[FIRST_CHUNK_TOKENS:]
    return bool((out.logits[0] - wanted).norm() <= TOLERANCE * wanted.norm())


@torch.inference_mode()
def _batches(model: PreTrainedModel) -> bool:
    """Whether two sequences of different lengths, decoded together, have the logits of each."""
    store = Store(model.config, 4 * PROMPT_TOKENS)
    if not store.shareable:
        return False
    blocks = store.tokens // BLOCK_TOKENS // 2
    sequences = [Sequence(list(range(at, at + blocks))) for at in (0, blocks)]
    random = torch.Generator().manual_seed(0)
    lengths = (PROMPT_TOKENS, FIRST_CHUNK_TOKENS)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in lengths]
    wanted = torch.stack([_last_logits(model, prompt) for prompt in prompts])
    install(model, store)
    try:
        pairs = list(zip(sequences, prompts, strict=True))
        starts = [Segment(sequence, prompt[:-1]) for sequence, prompt in pairs]
        for group in [starts] if store.packable else [[start] for start in starts]:
            shared_pass(model, store, group)
            store.commit()
        got = shared_pass(model, store, [Segment(s, prompt[-1:]) for s, prompt in pairs])
    except Exception:  # whatever a family's own code raises
        return False
    finally:
        store.end()
        uninstall(model)
    return bool((got - wanted).norm() <= TOLERANCE * wanted.norm())


@torch.inference_mode()
def _why_unprepared(model: Any) -> str:
    """Why decoding steps of this family cannot be prepared; empty where they can.

    They have to give what the network gives, for one sequence and for two, while both grow.
    """
    store = Store(model.config, 4 * PROMPT_TOKENS)
    if not store.packable:
        return "its layers keep running states"
    if native.library() is None:
        return str(native.why_not())
    reasons: list[str] = []
    steps = Steps(model, store, reasons.append)
    half = store.tokens // BLOCK_TOKENS // 2
    sequences = [Sequence(list(range(at, at + half))) for at in (0, half)]
    lengths = (PROMPT_TOKENS, FIRST_CHUNK_TOKENS)
    install(model, store)
    try:
        with opaque_experts(model):
            for sequence, length in zip(sequences, lengths, strict=True):
                shared_pass(model, store, [Segment(sequence, range(3, 3 + length))])
                store.commit()
            for number in range(6):
                segments = [Segment(s, [9 + number]) for s in sequences[: 1 + number % 2]]
                wanted = shared_pass(model, store, segments)
                got = steps.run(segments)
                if got is None:
                    return reasons[0]
                if not (got - wanted).norm() <= TOLERANCE * wanted.norm():
                    return "its steps then give other logits"
                store.commit()
    finally:
        store.end()
        uninstall(model)
    return ""


@contextmanager
def _half_of_the_experts(model: Any) -> Iterator[None]:
    """Let the next resident serve where a token's expert is not among half of them."""
    modules = find_experts(model)
    k = top_k(model, model.config, modules)
    random = np.random.default_rng(0)
    there = {found.layer: random.permutation(found.experts) for found in modules}

    def serve(choice: Choice) -> BoolArray:
        order = there[choice.layer]
        return np.broadcast_to(order < max(k, len(order) // 2), choice.scores.shape)

    restriction = Restriction(find_routers(model, modules), modules, NextResident(), serve)
    restriction.active = True
    try:
        yield
    finally:
        restriction.close()


@contextmanager
def opaque_experts(model: Any) -> Iterator[None]:
    """Let experts be called through one function, as retinue's are, that calls their own."""

    def run(module: Any, *args: torch.Tensor) -> torch.Tensor:
        module.config._experts_implementation = "eager"
        try:
            out: torch.Tensor = module(*args)
            return out
        finally:
            module.config._experts_implementation = IMPLEMENTATION

    modules = [found.module for found in find_experts(model)]
    for module in modules:
        module.retinue_run = partial(run, module)  # type: ignore[assignment]
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation("eager")
        for module in modules:
            del module.retinue_run


def _last_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt])
    logits: torch.Tensor = model(input_ids=ids, past_key_values=new_cache(model)).logits[0, -1]
    return logits


def _obeys(model: PreTrainedModel) -> bool:
    """Whether every router can be told which experts to choose from."""
    modules = find_experts(model)
    try:
        for router, found in zip(find_routers(model, modules), modules, strict=True):
            if router is None:
                return False
            obeys(router, found)
    except Unsupported:
        return False
    return True
