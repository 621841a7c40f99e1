"""`--precision int8` and `int4` on plain checkpoints, which are encoded while they are loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from command import Call, caller, refused
from encoded import counterpart, through
from encoded import torch_alone as torch_alone
from retinue import LLM
from retinue.errors import NotFinite, Unsupported
from retinue.memory import native
from retinue.memory.grouped import Grouped
from retinue.model.grouped_linear import GroupedLinear
from retinue.model.linear import RowLinear
from retinue.model.survey import survey

PROMPT, FORCED = models.prompt_of(21), models.prompt_of(4, seed=1)
# Layers of every kind: separate tensors, w1 to w3, shared experts, transposed with biases.
FAMILIES = ("olmoe", "mixtral", "deepseek_v3", "gpt_oss")


@pytest.fixture(scope="module")
def plain(checkpoints: Path) -> dict[str, Path]:
    return {family: models.make(checkpoints / f"p-{family}", family) for family in FAMILIES}


def tokens(folder: Path, **settings: Any) -> list[int]:
    with models.open_llm(folder, **settings) as llm:
        return llm.generate(PROMPT, models.greedy(12))[0].token_ids


def expected_logits(source: Path, target: Path, precision: str) -> torch.Tensor:
    """Of transformers over the decoded numbers."""
    model = models.stock(counterpart(source, target, precision))
    ids = torch.tensor([PROMPT + FORCED[:-1]])
    with torch.inference_mode():
        return model(input_ids=ids).logits[0, len(PROMPT) - 1 :]


@pytest.mark.usefixtures("torch_alone")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_the_counterpart(family: str, plain: dict[str, Path], tmp_path: Path) -> None:
    """Whatever is resident."""
    precision = "int8" if family == "mixtral" else "int4"
    expected = expected_logits(plain[family], tmp_path / "c", precision)
    for experts in (None, "25%"):
        with models.open_llm(plain[family], precision=precision, experts=experts) as llm:
            found = models.run_logits(llm, PROMPT, FORCED)
        assert (found - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.skipif(native.library() is None, reason="there are no kernels")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_kernels_stay_near_the_counterpart(
    precision: str, plain: dict[str, Path], tmp_path: Path
) -> None:
    """They round the inputs to eight bits besides, and a router may choose another expert."""
    expected = expected_logits(plain["olmoe"], tmp_path / "c", precision)
    with models.open_llm(plain["olmoe"], precision=precision) as llm:
        found = models.run_logits(llm, PROMPT, FORCED)
    assert (found - expected).norm() <= 0.2 * expected.norm()


def test_every_linear_layer_and_nothing_else(plain: dict[str, Path]) -> None:
    tensors = models.read_tensors(plain["deepseek_v3"])
    with models.open_llm(plain["deepseek_v3"], precision="int8") as llm:
        model = llm.assembly.network.model
        left = [name for name, m in model.named_modules() if isinstance(m, RowLinear)]
        assert left == []
        assert not any("linear layers stay" in text for text in llm.assembly.notes)
        kinds = {
            type(m).__name__ for m in model.modules() if m.__class__.__name__ == "GroupedLinear"
        }
        assert kinds == {"GroupedLinear"}
        gate = model.get_parameter("model.layers.1.mlp.gate.weight")
        assert torch.equal(gate, tensors["model.layers.1.mlp.gate.weight"])
        embedding = model.get_parameter("model.embed_tokens.weight")
        assert torch.equal(embedding, tensors["model.embed_tokens.weight"])
        name = "model.layers.1.mlp.shared_experts.down_proj"
        layer = model.get_submodule(name)
        assert isinstance(layer, GroupedLinear)
        # For modules that use a layer's weights by themselves.
        assert torch.allclose(layer.weight, through(tensors[f"{name}.weight"], "int8"), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = models.make(tmp_path / "m", "qwen3_moe", dtype, **models.HOLES)
    assert len(set(tokens(folder, precision="int4", experts="50%"))) > 2


def test_a_head_that_shares_the_embedding_gets_weights_of_its_own(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "tied", tie_word_embeddings=True)
    embedding = models.read_tensors(folder)["model.embed_tokens.weight"]
    with models.open_llm(folder, precision="int8") as llm:
        model = llm.assembly.network.model
        assert torch.equal(model.get_input_embeddings().weight, embedding)
        assert isinstance(model.lm_head, GroupedLinear)
        assert torch.allclose(model.lm_head.weight.float(), embedding, atol=0.03)
        assert llm.generate(PROMPT, models.greedy(3))[0].token_ids
    facts, as_is = survey(folder, "int8"), survey(folder)
    head = Grouped(8, *embedding.shape).stored_bytes
    assert facts.dense_bytes_per_token == facts.dense_bytes - embedding.numel() * 4
    assert facts.dense_bytes < as_is.dense_bytes
    assert facts.dense_bytes > embedding.numel() * 4 + head


def test_the_budget_counts_what_is_in_memory(plain: dict[str, Path]) -> None:
    facts, as_is = survey(plain["olmoe"], "int4"), survey(plain["olmoe"])
    matrices = 2 * Grouped(4, 48, 64).stored_bytes + Grouped(4, 64, 48).stored_bytes
    assert facts.expert_bytes == matrices
    assert facts.slot_bytes == -(-matrices // 4096) * 4096
    assert (facts.stored, facts.read_bytes) == ("int4", as_is.expert_bytes)
    assert facts.dense_bytes < as_is.dense_bytes
    assert facts.workspace_bytes > as_is.workspace_bytes + 2 * as_is.slot_bytes
    assert facts.flops_per_token == as_is.flops_per_token
    with models.open_llm(plain["olmoe"], precision="int4") as llm:
        model = llm.assembly.network.model
        names = [*model.named_parameters(), *model.named_buffers()]
        held = sum(t.nbytes for _, t in names if not t.is_meta)
        rotary = sum(t.nbytes for name, t in names if "inv_freq" in name)
        assert held - rotary == facts.dense_bytes
        assert llm.assembly.cache.resident == facts.total_experts  # encoded once, at load


def test_the_verbs_say_the_precision(plain: dict[str, Path], capsys: Any) -> None:
    call: Call = caller(capsys)
    folder = plain["olmoe"]
    done = call("plan", folder, "--memory", "2GiB", "--precision", "int4", "--json")
    assert done.code == 0, done.err
    assert "(int4 experts)" in done.err
    slots = ("--experts", "30%", "--threads", "1")
    options = ("--memory", "2GiB", "--precision", "int4", "--new-tokens", "2", *slots)
    done = call("bench", folder, *options, "--json")
    assert done.code == 0, done.err
    assert (done.document["precision"], done.document["stored"]) == ("int4", "int4")
    assert done.document["peak_rss_bytes"] <= done.document["budget_bytes"]
    assert f"hint: retinue pack {folder} OUT --precision int4" in done.err


def test_what_is_quantised_already_is_refused(checkpoint: Path, capsys: Any) -> None:
    call: Call = caller(capsys)
    for verb in ("run", "plan"):
        prompt = ("1 2", "--token-ids") if verb == "run" else ()
        done = call(verb, checkpoint, *prompt, "--memory", "2GiB", "--precision", "int8")
        refused(done, 3, f"stored in {checkpoint.name}")
    with pytest.raises(Unsupported, match="is not encoded again"):
        LLM(checkpoint, precision="int4", memory=models.MEMORY)


def test_an_expert_that_is_no_number_is_named(plain: dict[str, Path], tmp_path: Path) -> None:
    def change(tensors: models.Tensors) -> models.Tensors:
        for expert in range(models.EXPERTS):
            name = f"model.layers.2.mlp.experts.{expert}.up_proj.weight"
            tensors[name] = tensors[name].clone()
            tensors[name][3, 5] = torch.nan
        return tensors

    folder = models.rewrite(plain["olmoe"], tmp_path / "nan", change)
    with models.open_llm(folder, precision="int4") as llm:
        with pytest.raises(NotFinite, match=r"expert \d of layer 2"):
            llm.generate(PROMPT, models.greedy(2))
        llm.assembly.engine.idle()
