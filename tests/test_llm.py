"""The offline interface with the sample model and tiny ones."""

import dataclasses
import gc
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import models
import retinue
from retinue import LLM, Output, SamplingParams, Stats, UsageError
from retinue.config import load_config
from retinue.engine.request import new_request
from retinue.memory.mover import READERS
from retinue.types import BLOCK_TOKENS

TEXT = "The capital of France is"


@pytest.fixture(scope="module")
def sample() -> Iterator[LLM]:
    with models.open_llm("sample", experts="60%") as llm:
        yield llm


@pytest.fixture(scope="module")
def tiny(olmoe: Path) -> Iterator[LLM]:
    with models.open_llm(olmoe, experts="50%") as llm:
        yield llm


def settled(llm: LLM) -> None:
    """Nothing runs, no slot is lost, nothing is pinned."""
    engine = llm.assembly.engine
    assert not engine.busy
    engine.idle()


# --- generate


def test_a_text_gives_a_text(sample: LLM) -> None:
    (output,) = sample.generate(TEXT, models.greedy(12))
    assert output.prompt_tokens == len(sample.encode(TEXT))
    assert len(output.token_ids) == 12
    assert output.text == sample.tokenizer.decode(output.token_ids, skip_special_tokens=True)
    assert output.finish_reason == "length"
    assert output.logprobs is None


def test_a_text_and_its_ids_are_the_same_prompt(sample: LLM) -> None:
    texts = sample.generate(TEXT, models.greedy(6))
    ids = sample.generate(sample.encode(TEXT), models.greedy(6))
    assert texts[0].token_ids == ids[0].token_ids


def test_a_batch_is_answered_in_order_as_one_by_one(sample: LLM) -> None:
    prompts = [TEXT, sample.encode("2 + 2 ="), "Once upon a time"]
    together = sample.generate(prompts, models.greedy(5), progress=False)
    alone = [sample.generate([prompt], models.greedy(5))[0] for prompt in prompts]
    assert [out.token_ids for out in together] == [out.token_ids for out in alone]
    assert sample.generate([], models.greedy(5)) == []


def test_the_bar_goes_to_stderr_and_can_be_silenced(
    tiny: LLM, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [[5, 6], [7, 8]]
    tiny.generate(prompts, models.greedy(1), progress=False)
    assert capsys.readouterr() == ("", "")
    tiny.generate(prompts, models.greedy(1))
    out, err = capsys.readouterr()
    assert out == ""
    assert "2/2" in err


def test_every_prompt_is_checked_before_the_first_one_runs(tiny: LLM) -> None:
    steps = tiny.assembly.cache.step
    for wrong in ([], [models.VOCABULARY], [3] * models.CONTEXT):
        with pytest.raises(UsageError):
            tiny.generate([[5, 6, 7], wrong], models.greedy(2))
    assert tiny.assembly.cache.step == steps
    assert len(tiny.generate([5, 6, 7], models.greedy(2))[0].token_ids) == 2


def test_sampling_settings_are_no_dictionary(tiny: LLM) -> None:
    with pytest.raises(UsageError, match="`dict`"):
        tiny.generate([5, 6], {"temperature": 0.5})  # type: ignore[arg-type]


def test_a_text_needs_a_tokenizer(tiny: LLM) -> None:
    assert tiny.tokenizer is None
    with pytest.raises(UsageError, match="no tokenizer"):
        tiny.generate("hello")
    assert tiny.generate([5, 6], models.greedy(2))[0].text == ""


def test_seeds_reproduce_answers(tiny: LLM) -> None:
    def answer(seed: int) -> list[int]:
        params = models.greedy(12, temperature=1.0, seed=seed)
        return tiny.generate([5, 6, 7], params)[0].token_ids

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)


def test_logprobs_of_every_token(tiny: LLM) -> None:
    (output,) = tiny.generate([5, 6, 7], models.greedy(6, logprobs=3))
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    for entry in output.logprobs:
        assert len(entry.top) == 3
        # Greedy: what was chosen is the likeliest.
        assert entry.top[0] == (entry.token_id, entry.logprob)
        assert entry.logprob < 0


def test_stop_strings_end_the_answer_and_are_not_part_of_it(sample: LLM) -> None:
    whole = sample.generate(TEXT, models.greedy(20))[0]
    stop = whole.text[8:14]
    (output,) = sample.generate(TEXT, models.greedy(20, stop=stop))
    assert output.text == whole.text[: whole.text.index(stop)]
    assert output.finish_reason == "stop"
    assert output.token_ids == whole.token_ids[: len(output.token_ids)]
    assert len(output.token_ids) < 20


# --- stream


def test_the_deltas_of_a_stream_make_up_the_text(sample: LLM) -> None:
    outputs = list(sample.stream(TEXT, models.greedy(20, stop="zzzz")))
    final = outputs[-1]
    assert len(outputs) > 5
    assert "".join(output.delta for output in outputs) == final.text
    assert final.text == sample.generate(TEXT, models.greedy(20))[0].text
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert final.finish_reason == "length"
    for before, after in pairwise(outputs):
        assert after.token_ids[: len(before.token_ids)] == before.token_ids


def test_a_stream_that_is_left_early_ends_its_request(sample: LLM) -> None:
    stream = sample.stream(TEXT, models.greedy(50))
    next(stream)
    stream.close()
    settled(sample)
    for _ in sample.stream(TEXT, models.greedy(50)):
        break
    settled(sample)
    assert len(sample.generate(TEXT, models.greedy(3))[0].token_ids) == 3


def test_an_answer_while_a_stream_is_open(sample: LLM) -> None:
    """Both get all of their tokens, and each step serves both."""
    expected = sample.generate(TEXT, models.greedy(20))[0]
    stream = sample.stream(TEXT, models.greedy(20))
    first = next(stream)
    (other,) = sample.generate("Once upon a time", models.greedy(4))
    assert other.token_ids == sample.generate("Once upon a time", models.greedy(4))[0].token_ids
    rest = list(stream)
    assert rest[0].token_ids[:5] == expected.token_ids[:5]
    assert "".join(output.delta for output in [first, *rest]) == expected.text
    assert rest[-1].token_ids == expected.token_ids
    assert rest[-1].finish_reason == "length"
    settled(sample)


def test_several_streams_at_once(sample: LLM) -> None:
    """Turn by turn, or one after the other: each one has its own text, its end and its stats."""
    prompts = [TEXT, "2 + 2 =", "Once upon a time"]
    expected = sample.generate(prompts, models.greedy(9), progress=False)
    streams = [sample.stream(prompt, models.greedy(9)) for prompt in prompts]
    heads = [next(stream) for stream in streams]
    for stream, head, plain in zip(streams, heads, expected, strict=True):
        outputs = [head, *stream]
        assert "".join(output.delta for output in outputs) == plain.text
        assert outputs[-1].token_ids == plain.token_ids
        assert outputs[-1].finish_reason == "length"
        assert outputs[-1].stats.decode_s > 0
        assert [output.finish_reason for output in outputs].count("length") == 1
    settled(sample)


def test_an_interrupted_neighbour_leaves_other_streams_alone(sample: LLM) -> None:
    expected = sample.generate(TEXT, models.greedy(12))[0].token_ids
    first, second = (sample.stream(TEXT, models.greedy(12)) for _ in range(2))
    next(first)
    next(second)
    first.close()
    assert [*second][-1].token_ids == expected
    settled(sample)


def test_cancel_ends_every_stream_with_a_last_output(sample: LLM) -> None:
    streams = [sample.stream(TEXT, models.greedy(50)) for _ in range(3)]
    for stream in streams:
        next(stream)
    sample.cancel()
    for stream in streams:
        assert [*stream][-1].finish_reason == "cancelled"
    settled(sample)


def test_a_wrong_prompt_is_refused_before_the_first_piece(tiny: LLM) -> None:
    with pytest.raises(UsageError, match="empty"):
        tiny.stream([])


def test_cancel_from_the_loop_of_a_stream(sample: LLM) -> None:
    outputs: list[Output] = []
    for output in sample.stream(TEXT, models.greedy(50)):
        outputs.append(output)
        if len(outputs) == 3:
            sample.cancel()
    assert outputs[-1].finish_reason == "cancelled"
    assert len(outputs[-1].token_ids) < 10
    assert "".join(output.delta for output in outputs) == outputs[-1].text
    settled(sample)
    sample.cancel()  # nothing runs: no effect on what follows
    assert sample.generate(TEXT, models.greedy(2))[0].finish_reason == "length"


# --- reuse


def test_a_conversation_prefills_only_what_is_new(olmoe: Path) -> None:
    """Three turns, each the whole history so far: in float32 the same tokens as from scratch."""
    history = models.prompt_of(20)
    with models.open_llm(olmoe, experts="50%") as llm, models.open_llm(olmoe) as fresh:
        stored = 0
        for turn in range(3):
            before = llm.assembly.metrics.total.prefill.tokens
            *_, last = llm.stream(history, models.greedy(8), reuse=True)
            assert last.token_ids == fresh.generate(history, models.greedy(8))[0].token_ids
            assert last.stats.reused_tokens == stored
            prefilled = llm.assembly.metrics.total.prefill.tokens - before
            assert prefilled == len(history) - stored
            # Whole blocks of what was run are there for the next turn; the last token never was.
            stored = (len(history) + 8 - 1) // BLOCK_TOKENS * BLOCK_TOKENS
            history = history + last.token_ids + models.prompt_of(5, seed=turn)
        assert fresh.generate(history, models.greedy(1))[0].stats.reused_tokens == 0


def test_an_edited_history_reuses_the_part_before_the_edit(tiny: LLM) -> None:
    prompt = models.prompt_of(60, seed=3)
    list(tiny.stream(prompt, models.greedy(4), reuse=True))
    edited = [*prompt[:40], prompt[40] ^ 1, *prompt[41:]]
    *_, last = tiny.stream(edited, models.greedy(6), reuse=True)
    assert last.stats.reused_tokens == 40 // BLOCK_TOKENS * BLOCK_TOKENS
    assert last.token_ids == tiny.generate(edited, models.greedy(6))[0].token_ids


def test_chunks_do_not_change_float32_tokens(olmoe: Path) -> None:
    prompt = models.prompt_of(50)
    with models.open_llm(olmoe) as llm:
        expected = llm.generate(prompt, models.greedy(10))[0].token_ids
    with models.open_llm(olmoe, chunk=7) as llm:
        assert llm.assembly.split.chunk == 7
        assert llm.generate(prompt, models.greedy(10))[0].token_ids == expected


# --- numbers


def test_the_keys_of_stats() -> None:
    """The names that scripts rely on; the bounds are there once they were measured."""
    keys = set(Stats().as_dict())
    assert keys >= {
        *("load_s", "ttft_s", "prefill_s", "decode_s", "prefill_tokens_per_s"),
        *("decode_tokens_per_s", "decode_median_tokens_per_s", "peak_rss_bytes", "budget_bytes"),
        *("resident_experts", "total_experts", "hits", "pending", "misses", "hit_rate"),
        *("bytes_read", "bytes_read_per_token", "read_bytes_per_s", "stall_s", "degraded_share"),
    }
    bounds = {"disk_bytes_per_s", "memory_bytes_per_s", "bound_tokens_per_s", "share_of_bound"}
    assert not keys & bounds
    measured = dataclasses.replace(Stats(), **dict.fromkeys(bounds, 1.0))
    assert set(measured.as_dict()) == keys | bounds


def test_stats_count_the_decode_phase(olmoe: Path) -> None:
    with models.open_llm(olmoe, experts="25%", preset="on-demand") as llm:
        (output,) = llm.generate(models.prompt_of(20), models.greedy(11))
        stats, assembly = output.stats, llm.assembly
    lookups = stats.hits + stats.pending + stats.misses
    # Ten decode steps, in each layer as many distinct experts as a token has.
    assert lookups == 10 * models.LAYERS * models.TOP_K
    assert stats.hit_rate == pytest.approx(stats.hits / lookups)
    assert stats.misses > 0
    assert stats.bytes_read == pytest.approx(stats.bytes_read_per_token * 10)
    weight_bytes = assembly.facts.expert_bytes
    assert stats.used_bytes_read == stats.misses * weight_bytes
    assert stats.bytes_read >= stats.used_bytes_read
    assert stats.prefill_bytes_read > 0
    assert stats.total_experts == models.LAYERS * models.EXPERTS
    assert stats.resident_experts <= stats.total_experts // 4
    assert stats.budget_bytes == 2 << 30
    assert stats.degraded_share == 0
    assert stats.ttft_s > 0
    assert stats.prefill_s > 0
    assert stats.decode_s >= stats.stall_s > 0
    assert stats.decode_tokens_per_s == pytest.approx(10 / stats.decode_s)
    assert stats.load_s > 0
    assert stats.peak_rss_bytes > 50 << 20


# --- life


def test_close_is_idempotent_and_final(olmoe: Path) -> None:
    llm = models.open_llm(olmoe)
    llm.close()
    llm.close()
    for use in (lambda: llm.generate([5]), lambda: llm.tokenizer, lambda: llm.stream([5])):
        with pytest.raises(UsageError, match="closed"):
            use()
    llm.cancel()


def test_the_context_manager_closes(olmoe: Path) -> None:
    with pytest.raises(ZeroDivisionError), models.open_llm(olmoe) as llm:
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="closed"):
        llm.generate([5])


def test_a_stream_over_a_closed_model_raises() -> None:
    """The slots' memory is gone: no answer may come from it."""
    llm = models.open_llm("sample", experts="10%")
    stream = llm.stream(TEXT, models.greedy(20))
    next(stream)
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        next(stream)


def test_close_frees_the_weights_at_once(olmoe: Path) -> None:
    llm = models.open_llm(olmoe)
    llm.generate([5, 6, 7], models.greedy(2))
    assembly = llm.assembly
    parts = [assembly.network.model, assembly.engine, assembly.cache, assembly.tier]
    alive = [weakref.ref(part) for part in parts]
    gc.disable()
    try:
        del assembly, parts
        llm.close()
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()


def test_five_cycles_leave_no_thread_and_no_file(olmoe: Path) -> None:
    before = models.threads_and_files()
    for _ in range(5):
        with models.open_llm(olmoe, experts="25%") as llm:
            llm.generate(models.prompt_of(12), models.greedy(2))
            assert models.threads_and_files()[0] == before[0] + READERS
    assert models.threads_and_files() == before


def test_two_models_side_by_side(olmoe: Path, tmp_path: Path) -> None:
    """Different families, sizes and presets, step by step; each gives its own answer."""
    other = models.make(tmp_path / "mixtral", "mixtral", num_local_experts=6)
    prompts = [models.prompt_of(15, seed) for seed in range(3)]

    def alone(folder: Path) -> list[list[int]]:
        with models.open_llm(folder) as llm:
            return [llm.generate(prompt, models.greedy(6))[0].token_ids for prompt in prompts]

    expected = [alone(olmoe), alone(other)]
    with (
        models.open_llm(olmoe, experts="25%") as first,
        models.open_llm(other, experts="50%", preset="layer-stream") as second,
    ):
        for at, prompt in enumerate(prompts):
            requests = [new_request(prompt, models.greedy(6), None) for _ in range(2)]
            for _ in zip(first.run(requests[0]), second.run(requests[1]), strict=True):
                pass
            assert [r.token_ids for r in requests] == [expected[0][at], expected[1][at]]


def test_a_configuration_that_is_complete_already(olmoe: Path) -> None:
    config = load_config({"memory": "1GiB", "experts": "50%", "preset": "on-demand"})
    with LLM.from_config(olmoe, config) as llm:
        assert llm.config is config
        assert llm.assembly.preset.name == "on-demand"
        assert llm.assembly.cache.slots == models.EXPERTS * models.LAYERS // 2


def test_public_names() -> None:
    for name in retinue.__all__:
        assert getattr(retinue, name) is not None
    assert retinue.SamplingParams is SamplingParams
    with pytest.raises(AttributeError):
        _ = retinue.nothing
    assert not torch.is_inference_mode_enabled()
