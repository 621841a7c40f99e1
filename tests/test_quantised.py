"""Quantised checkpoints end to end: the tokens of their plain counterpart, in their own bytes."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    Mxfp4Config,
    Qwen3MoeConfig,
)

import models
import quantised
from command import Call, caller
from disk import entry_fields, write_raw
from models import Tensors
from retinue.errors import Unsupported
from retinue.memory.checkpoint import DTYPE_BYTES, open_checkpoint
from retinue.memory.files import ALIGNMENT
from retinue.memory.formats import Float8, Mxfp4, Packed
from retinue.memory.layout import lay_out
from retinue.memory.quantised import PackedEntry, explain, packed_piece
from retinue.model.reference import read_expert
from retinue.model.survey import survey

PROMPT, NEW_TOKENS = models.prompt_of(21), 16
FORMATS = ("fp8", "mxfp4")

Sizes = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def counterpart(checkpoint: Path, checkpoints: Path) -> Path:
    return quantised.plain(checkpoint, checkpoints / f"{checkpoint.name}-plain")


def tokens(folder: Path, **settings: Any) -> list[int]:
    with models.open_llm(folder, **settings) as llm:
        return llm.generate(PROMPT, models.greedy(NEW_TOKENS))[0].token_ids


def stock_tokens(folder: Path, **settings: Any) -> list[int]:
    """The plain model's; not one token over and over."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", **settings
    )
    expected = models.stock_greedy(model.eval(), PROMPT, NEW_TOKENS)
    assert len(set(expected)) > 4
    return expected


# --- the same tokens


def test_tokens_of_the_counterpart(checkpoint: Path, counterpart: Path) -> None:
    expected = stock_tokens(counterpart)
    assert tokens(checkpoint) == expected
    assert tokens(checkpoint, experts="25%") == expected


def test_tokens_of_transformers_own_way_for_mxfp4(mxfp4: Path) -> None:
    settings = Mxfp4Config(dequantize=True)
    assert tokens(mxfp4) == stock_tokens(mxfp4, quantization_config=settings)


def test_tokens_of_transformers_own_way_for_fp8(tmp_path: Path) -> None:
    """In blocks that divide every size."""
    source = models.make(tmp_path / "plain", "qwen3_moe", num_hidden_layers=2)
    folder = quantised.to_fp8(source, tmp_path / "fp8", (16, 8))
    settings = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 8))
    assert tokens(folder) == stock_tokens(folder, quantization_config=settings)


def test_one_scale_a_tensor(tmp_path: Path) -> None:
    """And scales for activations, which are not quantised here."""
    source = models.make(tmp_path / "plain", "qwen3_moe", num_hidden_layers=2)
    folder = quantised.to_fp8(source, tmp_path / "fp8", None)

    def add(tensors: Tensors) -> Tensors:
        names = [name for name in tensors if name.endswith("_proj.weight")]
        scales = {n.replace(".weight", ".activation_scale"): torch.tensor(0.5) for n in names}
        return tensors | scales

    static = models.rewrite(folder, tmp_path / "static", add)
    assert tokens(static) == stock_tokens(quantised.plain(folder, tmp_path / "by-hand", None))


def test_the_layers_of_deepseek(tmp_path: Path) -> None:
    """Latent attention, a dense layer and shared experts, all in FP8; a router that is not."""
    fields = quantised.ODD | {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    source = models.make(tmp_path / "plain", "deepseek_v3", **fields)
    folder = quantised.to_fp8(source, tmp_path / "fp8")
    names = {name for name, t in models.read_tensors(folder).items() if t.itemsize == 1}
    parts = (
        "kv_a_proj_with_mqa",
        "shared_experts.up_proj",
        "layers.0.mlp.down_proj",
        ".experts.7.",
    )
    assert all(any(part in name for name in names) for part in parts)
    assert not any(".gate." in name or "lm_head" in name for name in names)
    assert tokens(folder) == stock_tokens(quantised.plain(folder, tmp_path / "by-hand"))


def test_all_experts_of_a_layer_in_one_fp8_tensor(fp8: Path, tmp_path: Path) -> None:
    def fuse(tensors: Tensors) -> Tensors:
        result = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
        for layer in range(2):
            base = f"model.layers.{layer}.mlp.experts"
            for suffix in ("", "_scale_inv"):
                rows = [
                    [tensors[f"{base}.{e}.{kind}_proj.weight{suffix}"] for e in range(8)]
                    for kind in ("gate", "up", "down")
                ]
                gate, up, down = (torch.stack(row) for row in rows)
                result[f"{base}.gate_up_proj{suffix}"] = torch.cat([gate, up], 1)
                result[f"{base}.down_proj{suffix}"] = down
        return result

    # Gate and up share a tensor only where their rows are whole blocks.
    source = models.make(tmp_path / "source", "qwen3_moe", num_hidden_layers=2)
    folder = quantised.to_fp8(source, tmp_path / "fp8", (16, 32))
    assert tokens(models.rewrite(folder, tmp_path / "fused", fuse)) == tokens(folder)


def test_a_layer_that_was_not_converted(mxfp4: Path, counterpart: Path, tmp_path: Path) -> None:
    """Slots are as large as the largest expert."""
    plain = models.read_tensors(quantised.plain(mxfp4, tmp_path / "plain"))

    def mix(tensors: Tensors) -> Tensors:
        kept = {name: t for name, t in tensors.items() if "layers.1.mlp.experts" not in name}
        return kept | {name: t for name, t in plain.items() if "layers.1.mlp.experts" in name}

    folder = models.rewrite(mxfp4, tmp_path / "mixed", mix)
    assert tokens(folder, experts="50%") == tokens(mxfp4)
    assert survey(folder).expert_bytes > 5 * survey(mxfp4).expert_bytes
    assert survey(folder).stored == "mxfp4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_is_that_of_the_counterpart(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Bit for bit: the dense ones as they were loaded, the experts as they are computed with."""
    family = "qwen3_moe" if kind == "fp8" else "gpt_oss"
    fields = {"hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 64}
    source = models.make(tmp_path / "source", family, dtype, **fields)
    make = quantised.to_fp8 if kind == "fp8" else quantised.to_mxfp4
    folder = make(source, tmp_path / kind)
    state = models.stock(quantised.plain(folder, tmp_path / "plain")).state_dict()
    with models.open_llm(folder) as llm:
        assembly = llm.assembly
        for name, parameter in assembly.network.model.named_parameters():
            if not parameter.is_meta:
                assert parameter.dtype == state[name].dtype
                assert torch.equal(parameter, state[name]), name
        llm.generate(models.prompt_of(40), models.greedy(2))
        (found,) = assembly.network.experts.modules
        for expert in range(found.experts):
            (slot,) = assembly.cache.use(found.layer, [expert]).tolist()
            views = assembly.host.views(found.layer, expert, slot)
            for name, blocks in views.items():
                parts = [b.decode(dtype) if isinstance(b, Packed) else b for b in blocks]
                assert torch.equal(torch.cat(parts), state[f"{found.name}.{name}"][expert])


# --- the stored bytes


def test_a_slot_holds_the_stored_bytes(fp8: Path, mxfp4: Path) -> None:
    inner, hidden = quantised.ODD["moe_intermediate_size"], quantised.ODD["hidden_size"]
    facts = survey(fp8)
    # Weights of one byte, and a grid of 2 x 2 fp32 scales for each of three matrices.
    assert facts.expert_bytes == 3 * inner * hidden + 3 * 4 * 4
    assert (facts.stored, facts.dtype) == ("fp8", "float32")
    assert facts.decoded_bytes == 3 * inner * hidden * 4
    facts = survey(mxfp4)
    weights, biases = 3 * 96 * 64, 2 * 96 + 64
    assert facts.expert_bytes == weights * 17 // 32 + biases * 4
    assert (facts.stored, facts.decoded_bytes) == ("mxfp4", (weights + biases) * 4)


def hollow(folder: Path, config: Any, settings: dict[str, Any], sizes: Sizes) -> Path:
    """A checkpoint of `sizes` (name -> type and shape) in the library's order, and all holes."""
    folder.mkdir()
    config.save_pretrained(folder)
    models.edit_config(folder, quantization_config=settings)
    header, place = {}, 0
    for name, (dtype, shape) in sorted(sizes.items(), key=lambda s: (-DTYPE_BYTES[s[1][0]], s[0])):
        stop = place + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name], place = entry_fields(dtype, shape, place, stop), stop
    file = write_raw(folder / "model.safetensors", header)
    os.truncate(file, file.stat().st_size + place)
    return folder


def test_a_layer_of_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """A slot takes 4.25 bits a weight; six reads an expert, and nothing but what it needs."""
    out, experts = 2880, "model.layers.0.mlp.experts"
    sizes: Sizes = {
        f"{experts}.gate_up_proj_blocks": ("U8", (32, 2 * out, 90, 16)),
        f"{experts}.gate_up_proj_scales": ("U8", (32, 2 * out, 90)),
        f"{experts}.gate_up_proj_bias": ("BF16", (32, 2 * out)),
        f"{experts}.down_proj_blocks": ("U8", (32, out, 90, 16)),
        f"{experts}.down_proj_scales": ("U8", (32, out, 90)),
        f"{experts}.down_proj_bias": ("BF16", (32, out)),
    }
    config = GptOssConfig(num_hidden_layers=1, num_local_experts=32, dtype="bfloat16")
    facts = survey(hollow(tmp_path / "m", config, quantised.MXFP4_CONFIG, sizes))
    assert facts.expert_bytes == 3 * out * out * 4.25 / 8 + 3 * out * 2
    assert facts.slot_bytes < facts.expert_bytes + 6 * 2 * ALIGNMENT < facts.expert_bytes * 1.01
    assert facts.decoded_bytes == (3 * out * out + 3 * out) * 2


def test_a_layer_of_qwen3_in_fp8_as_it_is_published(tmp_path: Path) -> None:
    sizes: Sizes = {}
    for expert in range(128):
        for kind, shape in (("gate", (768, 2048)), ("up", (768, 2048)), ("down", (2048, 768))):
            name = f"model.layers.0.mlp.experts.{expert}.{kind}_proj.weight"
            sizes[name] = ("F8_E4M3", shape)
            sizes[f"{name}_scale_inv"] = ("BF16", (shape[0] // 128, shape[1] // 128))
    config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=128, dtype="bfloat16")
    facts = survey(hollow(tmp_path / "m", config, quantised.FP8_CONFIG, sizes))
    assert facts.expert_bytes == 3 * 768 * (2048 + 2 * 16 / 128)
    assert facts.slot_bytes < facts.expert_bytes + 2 * 2 * ALIGNMENT < facts.expert_bytes * 1.01


def test_dense_weights_count_as_they_are_loaded(checkpoint: Path, counterpart: Path) -> None:
    ours, plain = survey(checkpoint), survey(counterpart)
    assert ours.dense_bytes == plain.dense_bytes
    assert ours.flops_per_token == plain.flops_per_token
    assert ours.workspace_bytes == plain.workspace_bytes + ours.decoded_bytes
    assert ours.expert_bytes < plain.expert_bytes / 3
    assert (plain.stored, plain.decoded_bytes) == ("", 0)


def test_only_the_experts_that_are_used_are_read(checkpoint: Path) -> None:
    with models.open_llm(checkpoint, preset="on-demand", self_check=False) as llm:
        llm.generate(PROMPT[:3], models.greedy(3))
        cache, layouts = llm.assembly.cache, llm.assembly.network.experts.layouts
        used = [layouts[row][e] for row, e in zip(*(cache.last_used > 0).nonzero(), strict=True)]
        assert 0 < len(used) < llm.assembly.facts.total_experts
        missing = sum(layout.read_bytes for layout in used) - llm.assembly.mover.bytes_read
        assert 0 <= missing < ALIGNMENT  # the last page of the file is not whole


def test_a_prefill_decodes_an_expert_once(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for kind in (Float8, Mxfp4):
        plain = kind.decode

        def counted(*arguments: Any, plain: Any = plain) -> torch.Tensor:
            calls.append(1)
            return plain(*arguments)

        monkeypatch.setattr(kind, "decode", counted)
    with models.open_llm(checkpoint, self_check=False) as llm:
        calls.clear()
        llm.generate(models.prompt_of(200), models.greedy(1))
        used = int((llm.assembly.cache.last_used > 0).sum())
        parts = 3 if checkpoint.name == "fp8" else 2
        assert len(calls) == used * parts


# --- what people see


def test_plan_and_bench_say_the_precision(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call: Call = caller(capsys)
    done = call("plan", checkpoint, "--memory", "2GiB", "--json")
    assert done.code == 0
    assert f"({checkpoint.name} experts)" in done.err
    assert f"stay in {checkpoint.name}" in done.document["reasons"][0]
    done = call("bench", checkpoint, "--memory", "2GiB", "--new-tokens", "2", "--json")
    assert (done.document["precision"], done.document["stored"]) == ("as-is", checkpoint.name)


# --- what explain makes of a folder


@pytest.fixture
def entry(tmp_path: Path) -> PackedEntry:
    """Three experts of [32, 64] in one tensor, in blocks of 16."""
    values = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(0))
    weights, scales = zip(*(Float8((16, 16)).encode(expert) for expert in values), strict=True)
    tensors = {"w": torch.stack(weights), "w_scale_inv": torch.stack(scales)}
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    config = {"model_type": "tiny", "quantization_config": settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = explain(open_checkpoint(tmp_path)).tensors["w"]
    assert isinstance(found, PackedEntry)
    return found


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_tensor_of_all(entry: PackedEntry, transposed: bool) -> None:
    view = torch.empty(entry.shape, device="meta")[1]
    piece = packed_piece("up_proj", entry, view.T if transposed else view)
    stored = models.read_tensors(entry.file.parent)
    expected = quantised.fp8_by_hand(stored["w"][1], stored["w_scale_inv"][1], (16, 16))
    (got,) = read_expert(lay_out([piece]))["up_proj"]
    assert isinstance(got, Packed)
    numbers = got.decode(torch.float32)
    assert torch.equal(numbers, expected.T if transposed else expected)
    assert piece.format is not None
    assert piece.format.name == "fp8"
    assert piece.format.shape((32, 64), (2, 4)) == ((64, 32) if transposed else (32, 64))
    again = Packed(piece.format, *piece.format.encode(numbers)).decode(torch.float32)
    assert torch.allclose(again, numbers)


@pytest.mark.parametrize("cut", [(1, slice(16)), (1, slice(0, None, 2)), (1, slice(None), 0)])
def test_rows_of_a_packed_tensor_are_not_cut_out(entry: PackedEntry, cut) -> None:
    view = torch.empty(entry.shape, device="meta")[cut]
    with pytest.raises(Unsupported, match="`w` would have to be cut") as caught:
        packed_piece("up_proj", entry, view)
    assert caught.value.hint


def test_names_are_those_of_the_plain_checkpoint(checkpoint: Path, counterpart: Path) -> None:
    entries = explain(open_checkpoint(checkpoint)).tensors
    plain = open_checkpoint(counterpart).tensors
    assert entries.keys() == plain.keys()
    assert {name: e.shape for name, e in entries.items()} == {n: e.shape for n, e in plain.items()}
    packed = {name for name, entry in entries.items() if isinstance(entry, PackedEntry)}
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["quantization_config"]["modules_to_not_convert"]
    assert not any("lm_head" in name or "gate.weight" in name for name in packed)


def test_a_plain_checkpoint_is_left_alone(counterpart: Path) -> None:
    plain = open_checkpoint(counterpart)
    assert explain(plain).tensors == plain.tensors
