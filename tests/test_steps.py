"""Prepared decoding steps give what the network gives, and give way where they cannot."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from retinue import LLM
from retinue.errors import Cancelled, ReadError, Unsupported
from retinue.memory import native
from retinue.model import step as step_module
from retinue.model.kv import Segment
from retinue.model.step import Step

needs_library = pytest.mark.skipif(native.library() is None, reason=str(native.why_not()))
pytestmark = needs_library

FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "gpt_oss")
PROMPTS = [models.prompt_of(count, seed=count) for count in (30, 9, 17)]
NEW_TOKENS = 20
UNPREPARED = "decoding steps run unprepared"


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def counted() -> Iterator[list[int]]:
    """The number of sequences of every prepared step that runs while the context is open."""
    seen, plain = list[int](), Step.run

    def run(step: Step, segments: Any) -> torch.Tensor:
        seen.append(len(segments))
        return plain(step, segments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "run", run)
        yield seen


def unprepared(llm: LLM) -> list[str]:
    return [note for note in llm.assembly.notes if UNPREPARED in note]


def tokens_of(folder: Path, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    with models.open_llm(folder, kv_tokens=512, context=128, **settings) as llm:
        outputs = llm.generate(prompts, models.greedy(NEW_TOKENS), progress=False)
    return [output.token_ids for output in outputs]


def small(tmp_path: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    window = {"sliding_window": 12} if family in ("mixtral", "gpt_oss") else {}
    return models.make(tmp_path / family, family, dtype, **window)


# --- the same answers


def test_tokens_equal_the_networks_alone_and_together(family: str, tmp_path: Path) -> None:
    folder = small(tmp_path, family)
    plain = tokens_of(folder, PROMPTS, eager=True)
    with counted() as steps:
        assert tokens_of(folder, PROMPTS) == plain
        assert tokens_of(folder, PROMPTS[:1], experts="50%") == plain[:1]
    assert steps.count(3) > NEW_TOKENS // 2
    assert steps.count(1) > NEW_TOKENS // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_the_networks_to_rounding(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = small(tmp_path, family, dtype)
    # Every expert is chosen: a choice that rounding turns around would be no rounding error.
    models.edit_config(folder, num_experts_per_tok=models.EXPERTS)
    prompts, forced = PROMPTS, [models.prompt_of(10, seed=40 + n) for n in range(3)]
    both = []
    for eager in (True, False):
        with models.open_llm(folder, kv_tokens=512, eager=eager) as llm, counted() as steps:
            both.append(torch.stack(models.run_logits_together(llm, prompts, forced)).float())
        assert bool(steps) is not eager
    distance = (both[1] - both[0]).norm() / both[0].norm()
    assert distance < (0.02 if dtype is torch.bfloat16 else 1e-5)


def test_what_is_resident_changes_no_bit(tmp_path: Path) -> None:
    folder = small(tmp_path, "olmoe", torch.bfloat16)
    forced = models.prompt_of(12, seed=5)
    logits = []
    for share in ("25%", "100%"):
        with models.open_llm(folder, experts=share) as llm:
            logits.append(models.run_logits(llm, PROMPTS[0], forced))
    assert torch.equal(*logits)


def test_a_step_does_not_depend_on_what_ran_before_it(tmp_path: Path) -> None:
    folder = small(tmp_path, "qwen3_moe", torch.bfloat16)
    forced = models.prompt_of(12, seed=5)
    with models.open_llm(folder, kv_tokens=512) as llm:
        first = models.run_logits(llm, PROMPTS[0], forced)
        models.run_logits_together(llm, PROMPTS, [forced] * 3)
        assert torch.equal(models.run_logits(llm, PROMPTS[0], forced), first)


def test_int4_goes_through_prepared_steps(tmp_path: Path) -> None:
    folder = small(tmp_path, "olmoe", torch.bfloat16)
    forced, logits = models.prompt_of(6, seed=5), []
    for eager in (True, False):
        with (
            models.open_llm(folder, precision="int4", eager=eager) as llm,
            counted() as steps,
        ):
            logits.append(models.run_logits(llm, PROMPTS[0], forced).float())
        assert bool(steps) is not eager
    assert (logits[1] - logits[0]).norm() < 0.05 * logits[0].norm()


# --- giving way


@pytest.mark.parametrize(
    ("family", "dtype", "reason"),
    [
        ("deepseek_v3", torch.float32, "attention takes other keys"),
        ("olmoe", torch.float16, "not for float16"),
    ],
    ids=str,
)
def test_what_cannot_be_prepared_says_so_and_runs(
    family: str, dtype: torch.dtype, reason: str, tmp_path: Path
) -> None:
    folder = small(tmp_path, family, dtype)
    with models.open_llm(folder) as llm, counted() as steps:
        (note,) = unprepared(llm)
        assert reason in note
        output = llm.generate(PROMPTS[0], models.greedy(4), progress=False)[0]
    assert (len(output.token_ids), steps) == (4, [])


def test_eager_is_asked_for_and_not_noted(olmoe: Path) -> None:
    with models.open_llm(olmoe, eager=True) as llm, counted() as steps:
        llm.generate(PROMPTS[0], models.greedy(4), progress=False)
        assert (unprepared(llm), steps) == ([], [])


def test_without_the_library_the_network_runs_as_it_comes(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module.native, "library", lambda: None)
    monkeypatch.setattr(step_module.native, "why_not", lambda: "nobody built it")
    with models.open_llm(olmoe) as llm, counted() as steps:
        (note,) = unprepared(llm)
        assert "nobody built it" in note
        llm.generate(PROMPTS[0], models.greedy(4), progress=False)
    assert steps == []


def test_a_recording_that_fails_fails_no_request(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokens_of(olmoe, PROMPTS, eager=True)
    record = step_module.record

    def fails_for_three(model: Any, store: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        if tokens.shape[1] == 3:
            raise Unsupported("three is a crowd")
        return record(model, store, tokens, *rest)

    monkeypatch.setattr(step_module, "record", fails_for_three)
    with models.open_llm(olmoe, kv_tokens=512, context=128) as llm:
        outputs = llm.generate(PROMPTS, models.greedy(NEW_TOKENS), progress=False)
        assert "three is a crowd" in unprepared(llm)[0]
    assert [output.token_ids for output in outputs] == plain


# --- the middle of a step


def test_a_cancelled_step_leaves_no_trace(olmoe: Path) -> None:
    expected = tokens_of(olmoe, PROMPTS[:1], eager=True)[0]
    with models.open_llm(olmoe) as llm:
        assembly = llm.assembly
        runner = assembly.engine._runner
        sequence = runner.new_sequence([0, 1, 2, 3])
        logits, _ = runner.run([Segment(sequence, PROMPTS[0])], "prefill")
        tokens, layers = [int(logits[0].argmax())], []
        for fail in [True, *[False] * 5]:
            layers.clear()
            assembly.host.stop = lambda fail=fail: fail and (layers.append(0) or len(layers) == 3)
            length = sequence.length
            if fail:
                with counted() as steps, pytest.raises(Cancelled):
                    runner.run([Segment(sequence, tokens[-1:])], "decode")
                assert (sequence.length, steps) == (length, [1])
                continue
            logits, _ = runner.run([Segment(sequence, tokens[-1:])], "decode")
            tokens.append(int(logits[0].argmax()))
        assembly.engine.idle()
    assert tokens == expected[: len(tokens)]


def test_a_read_that_fails_in_a_step_fails_its_request_alone(
    olmoe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(olmoe, PROMPTS[:1], eager=True)[0]
    with models.open_llm(olmoe, experts="25%", context=128) as llm:
        host, calls = llm.assembly.host, []

        def run(layer: int, *rest: Any) -> torch.Tensor:
            calls.append(layer)
            if len(calls) == 4 * models.LAYERS + 2:
                raise ReadError("the disk is gone")
            return host_run(layer, *rest)

        host_run = host.run
        monkeypatch.setattr(host, "run", run)
        with counted() as steps, pytest.raises(ReadError):
            llm.generate(PROMPTS[0], models.greedy(NEW_TOKENS), progress=False)
        assert len(steps) == 4
        output = llm.generate(PROMPTS[0], models.greedy(NEW_TOKENS), progress=False)[0]
    assert output.token_ids == expected
