"""Families beyond the first three, end to end: saved by transformers, answered by LLM."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, JetMoeConfig, PreTrainedModel

import models
import tiny
from retinue import LLM
from retinue.errors import Unsupported
from retinue.memory.checkpoint import open_checkpoint
from retinue.model.architecture import model_class
from retinue.model.load import build
from retinue.model.twin import twin

NEW_TOKENS = 12


def saved(folder: Path, name: str, dtype: torch.dtype, **options: Any) -> Path:
    model = twin(tiny.config_of(name)).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, **options)
    return folder


def keys(folder: Path) -> set[str]:
    return set(models.read_tensors(folder))


def stock(folder: Path) -> PreTrainedModel:
    """The plain model of transformers, whichever of its auto classes has it."""
    kind = model_class(AutoConfig.from_pretrained(folder)).kind
    return kind.from_pretrained(folder, experts_implementation="eager").eval()


def answers_agree(folder: Path) -> None:
    prompt = models.prompt_of(40, seed=1)
    expected = models.stock_greedy(stock(folder), prompt, NEW_TOKENS)
    with models.open_llm(folder, experts="50%") as llm:
        assert llm.generate(prompt, models.greedy(NEW_TOKENS))[0].token_ids == expected


def test_one_tensor_per_expert(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "deepseek_v3", torch.float32)
    assert any(".experts.7." in key for key in keys(folder))
    answers_agree(folder)


def test_all_experts_of_a_layer_in_one_tensor(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "granitemoe", torch.float32)
    assert not any(".experts.7." in key for key in keys(folder))
    answers_agree(folder)


def test_shards(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "glm4_moe", torch.float32, max_shard_size="200KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    answers_agree(folder)


def test_transposed_interleaved_with_biases_in_bfloat16(tmp_path: Path) -> None:
    """gpt-oss; in bfloat16 rounding may turn a choice around, so that logits are compared."""
    folder = saved(tmp_path / "m", "gpt_oss", torch.bfloat16)
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in keys(folder)
    prompt, forced = models.prompt_of(40, seed=1), models.prompt_of(8, seed=5)
    with models.open_llm(folder, experts="50%") as llm:
        assert llm.assembly.network.model.dtype is torch.bfloat16
        ours = models.run_logits(llm, prompt, forced).float()
    with torch.inference_mode():
        ids = torch.tensor([prompt + forced[:-1]])
        plain = stock(folder)(input_ids=ids).logits[0, len(prompt) - 1 :].float()
    assert (ours - plain).norm() < 0.03 * plain.norm()


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "mistral4"])
def test_the_text_side_of_a_family_with_images(name: str, tmp_path: Path) -> None:
    answers_agree(saved(tmp_path / "m", name, torch.float32))


def test_the_weights_of_a_tower_are_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "qwen3_vl_moe", torch.float32)
    network = build(open_checkpoint(folder))
    towers = [key for key in keys(folder) if ".visual." in key]
    assert towers
    assert not set(towers) & set(network.experts.dense)
    with LLM(folder, memory=models.MEMORY, threads=1) as llm:
        parameters = dict(llm.assembly.network.model.named_parameters())
        unread = [name for name, tensor in parameters.items() if ".visual." in name]
        assert all(parameters[name].is_meta for name in unread)
        assert llm.assembly.facts.dense_bytes < sum(
            tensor.nbytes for tensor in models.read_tensors(folder).values()
        )


def test_a_family_whose_experts_nobody_else_may_run_is_refused(tmp_path: Path) -> None:
    """jetmoe has experts, and runs them in a way of its own."""
    JetMoeConfig(num_hidden_layers=1, vocab_size=64).save_pretrained(tmp_path)
    models.save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(Unsupported, match="`jetmoe` has no routed experts") as caught:
        build(open_checkpoint(tmp_path))
    assert "families.md" in caught.value.hint
    assert caught.value.exit_code == 3
