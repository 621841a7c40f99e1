"""Tiny random checkpoints of every family served, in every form that is read in place.

`make` writes one with transformers' own `save_pretrained`; `rewrite` changes the tensors of one
that is there: fused experts, other types, other shapes, a header of odd length.
"""

import json
import shutil
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from retinue import LLM
from retinue.config import DEFAULT_BATCH, Config
from retinue.engine.request import Request, new_request
from retinue.memory.budget import split
from retinue.metrics import PhaseCounters
from retinue.model.kv import Segment
from retinue.model.survey import survey
from retinue.policy.parts.kinds import KINDS
from retinue.policy.preset import Given
from retinue.types import Phase, SamplingParams

# transformers' own bars and load reports would hide ours.
logging.disable_progress_bar()
logging.set_verbosity_error()

Tensors = dict[str, torch.Tensor]

VOCABULARY, EXPERTS, TOP_K, LAYERS, CONTEXT = 128, 8, 2, 4, 256
MEMORY = "2GiB"

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": CONTEXT,
    # Wide weights: routers that decide, and logits without ties.
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, {"intermediate_size": 48, "num_experts": EXPERTS}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "intermediate_size": 96,
            "moe_intermediate_size": 48,
            "num_experts": EXPERTS,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": (MixtralConfig, {"intermediate_size": 48, "num_local_experts": EXPERTS}),
    "deepseek_v3": (
        DeepseekV3Config,
        {
            "intermediate_size": 200,
            "moe_intermediate_size": 48,
            "n_routed_experts": EXPERTS,
            "n_group": 2,
            "topk_group": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "v_head_dim": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        {"intermediate_size": 96, "num_local_experts": EXPERTS, "head_dim": 16},
    ),
}
# Layers 0 and 2 of four have no experts.
HOLES = {"mlp_only_layers": [0, 2]}


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass: its segments, where each began, and the logits after each."""

    phase: Phase
    segments: list[Segment]
    starts: list[int]
    logits: torch.Tensor  # [segments, vocabulary]


def make(
    folder: Path,
    family: str = "olmoe",
    dtype: torch.dtype = torch.float32,
    *,
    shard_size: str = "1GB",
    **fields: Any,
) -> Path:
    """A checkpoint with one tensor per expert and matrix. Same arguments, same weights."""
    kind, own = FAMILIES[family]
    return save(folder, kind(**(_COMMON | own | fields)), dtype, shard_size)


def make_dense(folder: Path) -> Path:
    """A checkpoint of a family without experts."""
    fields = {name: value for name, value in _COMMON.items() if name != "num_experts_per_tok"}
    return save(folder, LlamaConfig(**fields, intermediate_size=96), torch.float32, "1GB")


def save(folder: Path, config: Any, dtype: torch.dtype, shard_size: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # Embeddings that outweigh the rest, so that greedy answers do not settle on one token.
    if not config.tie_word_embeddings:
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of the checkpoint."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def rewrite(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of the checkpoint in one file, its tensors changed."""
    copy(source, target)
    tensors = change(read_tensors(source))
    for file in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        file.unlink()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))


def edit_config(folder: Path, **fields: Any) -> Path:
    """Change `config.json`."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def fuse(source: Path, target: Path) -> Path:
    """One tensor for all experts of a layer: the keys are the model's own parameter names."""
    copy(source, target)
    state = stock(source).state_dict()
    for file in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        file.unlink()
    tensors = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def pad_header(folder: Path, remainder: int) -> Path:
    """Let the data of the one weight file start at `remainder` modulo 8."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((remainder - len(header)) % 8)
    file.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return folder


def is_expert(name: str) -> bool:
    return ".experts." in name


def expert_keys(folder: Path, layer: int, expert: int) -> list[str]:
    """The tensors of one expert in a checkpoint with one tensor per expert."""
    return [
        name
        for name in read_tensors(folder)
        if f"layers.{layer}." in name and f".experts.{expert}." in name
    ]


def stock(folder: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The plain model of transformers, with its plain experts."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, experts_implementation="eager"
    ).eval()


@torch.inference_mode()
def stock_greedy(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of the plain model, end tokens ignored."""
    cache, tokens, new = DynamicCache(config=model.config), prompt, []
    for _ in range(count):
        logits = model(input_ids=torch.tensor([tokens]), past_key_values=cache).logits[0, -1]
        new.append(int(logits.argmax()))
        tokens = new[-1:]
    return new


def open_llm(model: str | Path, **settings: Any) -> LLM:
    """A model in a budget that holds all of it, unless `experts` says less."""
    return LLM(model, **({"memory": MEMORY, "threads": 1} | settings))


def short_of_room(model: str | Path, share: float, **settings: Any) -> int:
    """A budget with room for so many of the experts, and not for the embedding's rows as well."""
    config = Config(**({"memory": MEMORY, "batch": DEFAULT_BATCH} | settings))
    facts = survey(Path(model), config.precision)
    whole = split(facts, **config.room())
    taken = whole.fixed + whole.kv + whole.workspace
    taken -= facts.embedding_bytes * (not whole.embedding_stays)
    return taken + max(facts.min_slots, int(share * facts.total_experts)) * facts.slot_bytes


def write_texts(file: Path, prompt: int, answer: int) -> Path:
    """Eight texts of two tasks, of `prompt` tokens and `answer` more."""
    rows = [
        {"task": task, "prompt": prompt_of(prompt, at), "continuation": prompt_of(answer, at)}
        for at in range(4)
        for task in ("a", "b")
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


def prompt_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=random).tolist()


def greedy(count: int, **fields: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **fields)


@contextmanager
def recorded(llm: LLM) -> Iterator[list[Pass]]:
    """Note every forward pass that succeeds while the context is open."""
    runner, seen = llm.assembly.engine._runner, list[Pass]()
    plain = runner.run

    def recording(segments: Sequence[Segment], phase: Phase) -> tuple[torch.Tensor, PhaseCounters]:
        starts = [segment.sequence.length for segment in segments]
        logits, counters = plain(segments, phase)
        assert logits.shape == (len(segments), llm.assembly.facts.vocab_size)
        seen.append(Pass(phase, list(segments), starts, logits.clone()))
        return logits, counters

    runner.run = recording  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        runner.run = plain  # type: ignore[method-assign]


def run_logits(llm: LLM, prompt: list[int], forced: list[int]) -> torch.Tensor:
    """Logits of every engine step for `prompt` and then the given ids: [steps, vocabulary]."""
    request = forced_request(prompt, forced)
    with recorded(llm) as passes:
        for _ in llm.run(request):
            pass
    assert request.token_ids == forced
    return torch.cat([each.logits for each in passes])


def run_logits_together(
    llm: LLM, prompts: Sequence[list[int]], forced: Sequence[list[int]]
) -> list[torch.Tensor]:
    """The same for several at once: of each one, [steps, vocabulary]."""
    requests = [forced_request(*each) for each in zip(prompts, forced, strict=True)]
    with recorded(llm) as passes:
        for _ in llm.serve(requests):
            pass
    assert [request.token_ids for request in requests] == list(forced)
    rows: dict[int, list[torch.Tensor]] = {}
    for each in passes:
        for segment, logits in zip(each.segments, each.logits, strict=True):
            rows.setdefault(id(segment.sequence), []).append(logits)
    return [torch.stack(found) for found in rows.values()]  # admitted in order of arrival


def forced_request(prompt: list[int], forced: list[int]) -> Request:
    return new_request(prompt, greedy(len(forced)), None, forced=forced)


def threads_and_files() -> tuple[int, int]:
    """How many reader threads and how many open files this process has.

    transformers' loader has threads of its own, which end a moment later.
    """
    readers = [thread for thread in threading.enumerate() if thread.name.startswith("retinue")]
    return len(readers), len(list(Path("/proc/self/fd").iterdir()))


def learnt(given: Given, hidden: int, vocabulary: int) -> Given:
    """`given` with random arrays of every kind that its preset asked for."""
    random = np.random.default_rng(5)
    rows = tuple(range(given.layers))
    sizes: dict[str, int] = {"rows": len(rows), "experts": given.experts, "hidden": hidden}
    sizes |= {"vocabulary": vocabulary}
    made = {}
    for kind in ("expertflow", "fmoe", "moe-infinity", "promoe"):
        arrays = {}
        for name, shape in KINDS[kind].shapes.items():
            length = tuple(one if isinstance(one, int) else sizes.get(one, 8) for one in shape)
            arrays[name] = random.random(length, dtype=np.float32)
        made[kind] = arrays
    made["promoe"]["stride"] = np.full(1, 2.0, dtype=np.float32)
    return replace(given, routed=rows, learned=made)
