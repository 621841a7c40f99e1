"""Every family, in every form of checkpoint that is read in place, gives transformers' tokens."""

from pathlib import Path

import pytest
import torch
from transformers.cache_utils import DynamicCache

import models
from retinue.memory.home import sample_folder

FORMS = ("per-expert", "fused", "sharded")
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=FORMS)
def checkpoint(request: pytest.FixtureRequest, family: str, checkpoints: Path) -> Path:
    folder = checkpoints / f"{family}-{request.param}"
    if request.param == "sharded":
        return models.make(folder, family, shard_size="100KB")
    whole = models.make(checkpoints / f"{family}-whole", family)
    return models.fuse(whole, folder) if request.param == "fused" else whole


def same_tokens(folder: Path, prompt: list[int], **settings: object) -> None:
    """Greedy answers of both, which must not be a single token over and over."""
    expected = models.stock_greedy(models.stock(folder), prompt, NEW_TOKENS)
    assert len(set(expected)) > 4
    with models.open_llm(folder, **settings) as llm:
        output = llm.generate(prompt, models.greedy(NEW_TOKENS))[0]
    assert output.token_ids == expected


def logits_of_both(folder: Path, prompt: list[int], forced: list[int]) -> list[torch.Tensor]:
    """retinue's and the plain model's logits for the prompt's end and each forced id but one."""
    with models.open_llm(folder) as llm:
        ours = models.run_logits(llm, prompt, forced)
    model, rows = models.stock(folder), []
    cache = DynamicCache(config=model.config)
    for tokens in [prompt, *([token] for token in forced[:-1])]:
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([tokens]), past_key_values=cache)
        rows.append(out.logits[0, -1])
    return [ours, torch.stack(rows)]


def test_greedy_tokens_equal_transformers(checkpoint: Path) -> None:
    same_tokens(checkpoint, models.prompt_of(19))


def test_greedy_tokens_equal_transformers_with_a_quarter_of_the_experts(checkpoint: Path) -> None:
    same_tokens(checkpoint, models.prompt_of(19, seed=1), experts="25%")


def test_logits_equal_transformers_in_float32(checkpoint: Path) -> None:
    ours, plain = logits_of_both(checkpoint, models.prompt_of(33), models.prompt_of(12, seed=5))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_sharded_form_has_many_files_and_the_fused_form_has_fused_keys(
    checkpoints: Path,
) -> None:
    """The forms above are what they are called."""
    whole = models.make(checkpoints / "olmoe-whole")
    sharded = models.make(checkpoints / "olmoe-sharded", shard_size="100KB")
    fused = models.fuse(whole, checkpoints / "olmoe-fused")
    assert len(list(whole.glob("*.safetensors"))) == 1
    assert len(list(sharded.glob("*.safetensors"))) > 4
    assert models.expert_keys(whole, 1, 3)
    assert not models.expert_keys(fused, 1, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_agree_to_rounding(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    # Every expert is chosen: a choice that rounding turns around would be no rounding error.
    folder = models.make(tmp_path / "half", family, dtype, num_experts_per_tok=models.EXPERTS)
    ours, plain = logits_of_both(folder, models.prompt_of(21), models.prompt_of(10, seed=5))
    assert ours.dtype is dtype
    error = (ours.float() - plain.float()).norm() / plain.float().norm()
    # A few units in the last place: eight bits of precision in bfloat16, eleven in float16.
    assert error < (0.02 if dtype is torch.bfloat16 else 0.0025)


def test_the_sample_model_equals_transformers_in_float32(checkpoints: Path) -> None:
    folder = models.rewrite(
        sample_folder(),
        checkpoints / "sample-fp32",
        lambda tensors: {name: tensor.float() for name, tensor in tensors.items()},
    )
    models.edit_config(folder, dtype="float32")
    with models.open_llm(folder, experts="40%") as llm:
        prompt = llm.encode("Question: what is the capital of France? Answer:")
        ours = llm.generate(prompt, models.greedy(NEW_TOKENS))[0].token_ids
    assert ours == models.stock_greedy(models.stock(folder), prompt, NEW_TOKENS)


def test_layers_without_experts(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "holes", "qwen3_moe", **models.HOLES)
    same_tokens(folder, models.prompt_of(19), experts="25%")
    with models.open_llm(folder) as llm:
        assert llm.assembly.facts.moe_layers == 2
        assert llm.assembly.cache.total == 2 * models.EXPERTS


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mixtral", {"sliding_window": 8}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}),
        ("olmoe", {"tie_word_embeddings": True}),
        ("olmoe", {"clip_qkv": 0.5, "norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False, "decoder_sparse_step": 2}),
        ("mixtral", {"num_experts_per_tok": models.EXPERTS}),
        ("mixtral", {"num_experts_per_tok": 1}),
    ],
)
def test_variants_of_a_family(name: str, fields: dict[str, object], tmp_path: Path) -> None:
    """Prompts here are longer than a sliding window."""
    folder = models.make(tmp_path / "variant", name, **fields)
    ours, plain = logits_of_both(folder, models.prompt_of(30), models.prompt_of(12, seed=5))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert ours.argmax(-1).tolist() == plain.argmax(-1).tolist()


def test_experts_of_another_type_than_the_model(olmoe: Path, tmp_path: Path) -> None:
    """bfloat16 experts in a float32 model are computed in float32, as transformers does."""

    def change(tensors: models.Tensors) -> models.Tensors:
        return {
            name: tensor.bfloat16() if models.is_expert(name) else tensor
            for name, tensor in tensors.items()
        }

    folder = models.rewrite(olmoe, tmp_path / "mixed", change)
    same_tokens(folder, models.prompt_of(19), experts="25%")


@pytest.mark.parametrize("remainder", [1, 2, 4, 6])
@pytest.mark.parametrize("form", ["per-expert", "fused"])
def test_headers_of_any_length(olmoe: Path, tmp_path: Path, remainder: int, form: str) -> None:
    """Tensors that begin at odd addresses are read all the same."""
    source = models.fuse(olmoe, tmp_path / "source") if form == "fused" else olmoe
    folder = models.pad_header(models.copy(source, tmp_path / "odd"), remainder)
    prompt = models.prompt_of(19)
    expected = models.stock_greedy(models.stock(olmoe), prompt, NEW_TOKENS)
    with models.open_llm(folder, experts="25%") as llm:
        assert llm.generate(prompt, models.greedy(NEW_TOKENS))[0].token_ids == expected


def test_end_tokens_come_from_the_generation_configuration(olmoe: Path, tmp_path: Path) -> None:
    """Chat models name several end tokens there, and one in `config.json`; transformers obeys."""
    prompt = models.prompt_of(19)
    answer = models.stock_greedy(models.stock(olmoe), prompt, NEW_TOKENS)
    end = answer[5]
    folder = models.copy(olmoe, tmp_path / "ends")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end}]}}')
    with models.open_llm(folder) as llm:
        output = llm.generate(prompt, models.SamplingParams(max_new_tokens=NEW_TOKENS))[0]
    assert output.finish_reason == "stop"
    assert output.token_ids == answer[: answer.index(end) + 1]
