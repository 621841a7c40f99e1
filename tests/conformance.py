"""Runs one family's tiny twin through save, retinue's own loader and its experts, beside the
plain model.

`outcome(name)` is computed once a process: the tests and the page of families share it.
"""

import functools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import models
import tiny
from retinue.memory.cache import ExpertCache
from retinue.memory.checkpoint import open_checkpoint
from retinue.memory.files import Reader
from retinue.memory.link import DiskLink, sizes_of
from retinue.memory.mover import Mover
from retinue.memory.tier import Tier
from retinue.metrics import Metrics
from retinue.model.abilities import Abilities, abilities_of
from retinue.model.experts import IMPLEMENTATION, ExpertHost
from retinue.model.load import Network, build, load_dense
from retinue.model.routing import find_routers
from retinue.model.state_size import new_cache
from retinue.model.survey import facts_of
from retinue.model.twin import twin
from retinue.policy.preset import Given
from retinue.policy.presets import preset
from retinue.types import Facts

PROMPT_TOKENS, NEW_TOKENS = 70, 12  # longer than a window, and than a chunk of linear attention
TOLERANCE = 1e-4  # of the logits' norm


@dataclass(frozen=True, slots=True)
class Answer:
    """Greedy tokens, the logits that chose them, and the bytes that the sequence took."""

    tokens: list[int]
    logits: torch.Tensor  # [new tokens, vocabulary]
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was found out about one configuration; `failure` is empty where all is well."""

    name: str
    failure: str
    abilities: Abilities
    kind: str = ""


@functools.cache
def outcome(name: str) -> Outcome:
    """Compare retinue with the plain model; never raises."""
    folder = Path(tempfile.mkdtemp())
    try:
        return _compare(name, folder)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        return Outcome(name, reason, Abilities())
    finally:
        shutil.rmtree(folder)


def _compare(name: str, folder: Path) -> Outcome:
    model = twin(tiny.config_of(name))
    model.save_pretrained(folder)
    model.set_experts_implementation("eager")
    abilities, kind = abilities_of(model), type(model).__name__
    prompt = models.prompt_of(PROMPT_TOKENS, seed=1, vocabulary=tiny.VOCABULARY)
    plain = _greedy(model, prompt)
    with opened(folder) as (network, facts, host):
        ours = _greedy(network.model, prompt, host)
    prompts = [models.prompt_of(n, seed=n, vocabulary=tiny.VOCABULARY) for n in (9, 40)]
    alone = [plain.tokens, *(_greedy(model, other).tokens for other in prompts)]
    length = PROMPT_TOKENS + NEW_TOKENS
    failures = {
        "tokens differ": ours.tokens != plain.tokens,
        "tokens differ in a batch": _together(folder, [prompt, *prompts]) != alone,
        "logits differ": not _close(ours.logits, plain.logits),
        "the experts do not matter": _close(_without_experts(model, prompt), plain.logits[:1]),
        "more KV than the facts say": ours.state_bytes
        > facts.kv_bytes_per_token * length + facts.state_bytes,
    }
    return Outcome(name, ", ".join(f for f, yes in failures.items() if yes), abilities, kind)


def _together(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of the whole engine, for all prompts at once, with half of the experts."""
    settings = {"context": PROMPT_TOKENS + NEW_TOKENS, "kv_tokens": 512}
    memory = models.short_of_room(folder, 0.5, **settings)
    with models.open_llm(folder, memory=memory, self_check=False, **settings) as llm:
        outputs = llm.generate(prompts, models.greedy(NEW_TOKENS), progress=False)
    return [output.token_ids for output in outputs]


@contextmanager
def opened(folder: Path, share: float = 0.5) -> Iterator[tuple[Network, Facts, ExpertHost]]:
    """The network in `folder` with a share of its experts in memory, as an engine opens it."""
    network = build(open_checkpoint(folder))
    network.model.set_experts_implementation(IMPLEMENTATION)
    reader, metrics, policies = Reader(), Metrics(), preset("auto").build(Given())
    facts = facts_of(network)
    load_dense(network, reader, embedding_stays=True)
    tier = Tier(max(facts.min_slots, int(share * facts.total_experts)), facts.slot_bytes)
    mover = Mover(reader)
    layouts, modules = network.experts.layouts, network.experts.modules
    link = DiskLink(layouts, tier, mover)
    cache = ExpertCache(sizes_of(layouts), tier, link, policies.evictor, network.top_k)
    routers = find_routers(network.model, modules)
    host = ExpertHost(modules, routers, cache, link.views, policies, metrics)
    try:
        yield network, facts, host
        cache.check()
    finally:
        host.close()
        mover.close()
        reader.close()
        tier.release()


@torch.inference_mode()
def _greedy(model: Any, prompt: list[int], host: ExpertHost | None = None) -> Answer:
    cache, tokens, new, rows = new_cache(model), prompt, [], []
    for step in range(NEW_TOKENS):
        if host is not None:
            phase = "decode" if step else "prefill"
            host.metrics.phase = phase
            host.cache.begin_step(phase)
        out = model(input_ids=torch.tensor([tokens]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(out.logits[0, -1].float())
        tokens = [int(rows[-1].argmax())]
        new += tokens
    return Answer(new, torch.stack(rows), _state_bytes(cache))


def _state_bytes(cache: Any) -> int:
    def count(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.nbytes
        values = value.values() if isinstance(value, dict) else value
        return sum(map(count, values)) if isinstance(value, (dict, list, tuple)) else 0

    return sum(count(vars(layer)) for layer in cache.layers)


@torch.inference_mode()
def _without_experts(model: PreTrainedModel, prompt: list[int]) -> torch.Tensor:
    """The plain model's logits after the prompt with routed experts that give nothing."""
    model.set_experts_implementation("retinue-nothing")
    out: Any = model(input_ids=torch.tensor([prompt]), past_key_values=new_cache(model))
    return out.logits[0, -1:].float()


def _close(ours: torch.Tensor, plain: torch.Tensor) -> bool:
    return bool((ours - plain).norm() <= TOLERANCE * plain.norm())
