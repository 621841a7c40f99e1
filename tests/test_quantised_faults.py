"""Quantised checkpoints that are damaged, mixed up, or of other kinds: refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import models
import quantised
from models import Tensors
from retinue.errors import CheckpointError, NotFinite, RetinueError, Unsupported

PROMPT = models.prompt_of(21)


def damaged(source: Path, target: Path, change: Callable[[Tensors], object]) -> Path:
    def edit(tensors: Tensors) -> Tensors:
        change(tensors)
        return tensors

    return models.rewrite(source, target, edit)


def refused(folder: Path, kind: type[RetinueError], *parts: str) -> None:
    before = models.threads_and_files()
    with pytest.raises(RetinueError) as caught:
        models.open_llm(folder)
    assert type(caught.value) is kind, caught.value
    assert all(part in str(caught.value) for part in parts), caught.value
    assert caught.value.hint
    assert models.threads_and_files() == before


FP8_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FP8_DENSE = "model.layers.0.self_attn.q_proj.weight"
MXFP4_EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize("name", [FP8_EXPERT, FP8_DENSE])
def test_fp8_without_scales(fp8: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(fp8, tmp_path / "m", lambda t: t.pop(f"{name}_scale_inv"))
    refused(folder, CheckpointError, f"`{name}_scale_inv` is missing", f"`{name}`")


@pytest.mark.parametrize("name", [FP8_EXPERT, FP8_DENSE])
def test_fp8_without_weights(fp8: Path, tmp_path: Path, name: str) -> None:
    folder = damaged(fp8, tmp_path / "m", lambda t: t.pop(name))
    refused(folder, CheckpointError, f"`{name}` is missing", f"`{name}_scale_inv`")


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_mxfp4_with_half_of_it(mxfp4: Path, tmp_path: Path, part: str) -> None:
    folder = damaged(mxfp4, tmp_path / "m", lambda t: t.pop(f"{MXFP4_EXPERTS}_{part}"))
    refused(folder, CheckpointError, f"`{MXFP4_EXPERTS}_{part}` is missing")


def test_scales_of_another_shape(fp8: Path, mxfp4: Path, tmp_path: Path) -> None:
    name = f"{FP8_EXPERT}_scale_inv"
    folder = damaged(fp8, tmp_path / "1", lambda t: t.update({name: torch.ones(3, 2)}))
    refused(folder, CheckpointError, f"`{name}` has the shape [3, 2]", "[136, 160]")
    name = f"{MXFP4_EXPERTS}_scales"
    folder = damaged(mxfp4, tmp_path / "2", lambda t: t.update({name: t[name][:, :, :2].clone()}))
    refused(folder, CheckpointError, f"`{name}` has the shape [8, 64, 2]", "in mxfp4")


def test_blocks_of_another_model(mxfp4: Path, tmp_path: Path) -> None:
    """Weights and scales agree with each other, but not with config.json."""

    def shrink(tensors: Tensors) -> None:
        for part in ("blocks", "scales"):
            name = f"{MXFP4_EXPERTS}_{part}"
            tensors[name] = tensors[name][:, :32].clone()

    refused(damaged(mxfp4, tmp_path / "m", shrink), CheckpointError, MXFP4_EXPERTS)


@pytest.mark.parametrize("change", [{"weight_block_size": [64, 64]}, {"weight_block_size": None}])
def test_another_block_than_the_scales_have(fp8: Path, tmp_path: Path, change) -> None:
    folder = models.copy(fp8, tmp_path / "m")
    models.edit_config(folder, quantization_config=quantised.FP8_CONFIG | change)
    refused(folder, CheckpointError, "_scale_inv` has the shape")


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128.0, 128], 128, [True, 1]])
def test_a_block_that_is_none(fp8: Path, tmp_path: Path, block: object) -> None:
    folder = models.copy(fp8, tmp_path / "m")
    settings = quantised.FP8_CONFIG | {"weight_block_size": block}
    models.edit_config(folder, quantization_config=settings)
    refused(folder, CheckpointError, "`weight_block_size`")


def test_types_that_do_not_make_a_format(fp8: Path, mxfp4: Path, tmp_path: Path) -> None:
    name = f"{FP8_DENSE}_scale_inv"
    folder = damaged(fp8, tmp_path / "1", lambda t: t.update({name: t[name].to(torch.int32)}))
    refused(folder, Unsupported, f"`{name}` `I32`")
    folder = damaged(fp8, tmp_path / "2", lambda t: t.update({FP8_DENSE: t[FP8_DENSE].float()}))
    refused(folder, Unsupported, f"`{FP8_DENSE}` has the type `F32`")
    name = f"{MXFP4_EXPERTS}_scales"
    folder = damaged(mxfp4, tmp_path / "3", lambda t: t.update({name: t[name].float()}))
    refused(folder, Unsupported, f"`{name}` `F32`")


def test_five_bits_of_exponent(fp8: Path, tmp_path: Path) -> None:
    other = torch.float8_e5m2
    folder = damaged(fp8, tmp_path / "m", lambda t: t.update({FP8_DENSE: t[FP8_DENSE].to(other)}))
    refused(folder, Unsupported, f"`{FP8_DENSE}` has the type `F8_E5M2`")


def test_experts_in_four_bits_beside_fp8(fp8: Path, tmp_path: Path) -> None:
    folder = models.copy(fp8, tmp_path / "m")
    settings = quantised.FP8_CONFIG | {"expert_dtype": "fp4"}
    models.edit_config(folder, quantization_config=settings)
    refused(folder, Unsupported, "`fp4`")


def test_a_config_that_does_not_explain_the_types(checkpoint: Path, tmp_path: Path) -> None:
    folder = models.edit_config(models.copy(checkpoint, tmp_path / "m"), quantization_config=None)
    kind = "F8_E4M3" if checkpoint.name == "fp8" else "U8"
    refused(folder, Unsupported, f"type `{kind}`", "`quantization_config`")
    other = {"fp8": "mxfp4", "mxfp4": "fp8"}[checkpoint.name]
    models.edit_config(folder, quantization_config={"quant_method": other})
    refused(folder, Unsupported, f"`{kind}`", f"`{other}`")


METHODS = ["awq", "gptq", "bitsandbytes", "compressed-tensors", "hqq", "fbgemm_fp8", "mxfp8"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_other_methods_are_refused_by_name(
    fp8: Path, tmp_path: Path, method: str, key: str
) -> None:
    folder = models.copy(fp8, tmp_path / "m")
    models.edit_config(folder, **{"quantization_config": None, key: {"quant_method": method}})
    refused(folder, Unsupported, f"`{method}`")


def test_a_truncated_file(checkpoint: Path, tmp_path: Path) -> None:
    folder = models.copy(checkpoint, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    refused(folder, CheckpointError, "damaged or truncated")


# --- numbers that are none


def poison(checkpoint: Path, target: Path) -> Path:
    """A NaN in every expert of layer 0, as each format says it."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if "layers.0.mlp.experts" in name and name.endswith("down_proj_scales"):
                tensor[:, 3, 1] = 255
            elif "layers.0.mlp.experts" in name and name.endswith("down_proj.weight"):
                tensor.view(torch.uint8)[7, 5] = 0x7F

    return damaged(checkpoint, target, change)


def test_damaged_weights_are_named_at_load_and_when_they_are_used(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = poison(checkpoint, tmp_path / "m")
    with pytest.raises(NotFinite, match=r"expert \d of layer 0 .*`down_proj`.*model\.safetensors"):
        models.open_llm(folder)
    with (
        models.open_llm(folder, self_check=False) as llm,
        pytest.raises(NotFinite, match=r"expert \d of layer 0 .*`down_proj`"),
    ):
        llm.generate(PROMPT, models.greedy(2))
