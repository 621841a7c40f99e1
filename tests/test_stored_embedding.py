"""An embedding whose rows stay in the checkpoint's file is the same embedding."""

from pathlib import Path

import pytest
import torch
from torch import nn

import models
from retinue.errors import CheckpointError, ReadError
from retinue.memory import files
from retinue.memory.budget import split
from retinue.memory.checkpoint import TensorEntry, open_checkpoint
from retinue.memory.files import Reader
from retinue.model.load import build
from retinue.model.stored_embedding import StoredEmbedding
from retinue.model.survey import survey

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def stored(
    path: Path, rows: int, width: int, kind: str, lead: int = 8
) -> tuple[TensorEntry, torch.Tensor]:
    """A matrix of this shape in a file, behind `lead` bytes, and the same in memory."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
    weight = weight.to(TYPES[kind])
    data = weight.view(torch.uint8).numpy().tobytes()
    path.write_bytes(b"x" * lead + data + b"behind it")
    return TensorEntry("rows", path, kind, (rows, width), lead, lead + len(data)), weight


@pytest.mark.parametrize("dtype", TYPES.values(), ids=str)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "width", "lead"), [(97, 7, 8), (3, 1, 13), (501, 2048, 4090)])
def test_the_rows_are_those_of_an_embedding(
    rows: int, width: int, lead: int, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    entry, weight = stored(tmp_path / "w", rows, width, kind, lead)
    plain, reader = nn.Embedding.from_pretrained(weight.to(dtype)), Reader()
    ours = StoredEmbedding(entry, reader, dtype)
    for shape in [(1, 1), (1, 40), (3, 5), (4,), (1, 0)]:
        ids = torch.randint(0, rows, shape)
        got = ours(ids)
        assert got.dtype == dtype
        assert torch.equal(got, plain(ids))
    twice = torch.tensor([[rows - 1, 0, rows - 1, rows - 1], [0, 0, 0, 0]])
    assert torch.equal(ours(twice), plain(twice))
    same = torch.zeros(1, 3, dtype=torch.int64)  # one row, several tokens
    assert torch.equal(ours(same), plain(same))
    reader.close()


@pytest.mark.parametrize("token", [-1, 97])
def test_a_token_that_there_is_not(token: int, tmp_path: Path) -> None:
    entry, _ = stored(tmp_path / "w", 97, 7, "BF16")
    reader = Reader()
    with pytest.raises(IndexError, match="none of 97"):
        StoredEmbedding(entry, reader, torch.bfloat16)(torch.tensor([[3, token]]))
    reader.close()


def test_a_file_that_became_shorter(tmp_path: Path) -> None:
    entry, _ = stored(tmp_path / "w", 97, 7, "BF16")
    entry.file.write_bytes(entry.file.read_bytes()[: entry.start + 40 * 14 + 5])
    reader = Reader()
    ours = StoredEmbedding(entry, reader, torch.bfloat16)
    assert ours(torch.tensor([[39]])).shape == (1, 1, 7)
    with pytest.raises(CheckpointError, match="truncated: it ends within `rows`") as caught:
        ours(torch.tensor([[40]]))
    assert caught.value.hint
    reader.close()


# --- which embeddings may


def whole_budget(folder: Path) -> int:
    """A budget that just holds all that there is."""
    facts = survey(folder)
    made = split(facts, memory=models.MEMORY)
    assert made.slots == facts.total_experts
    assert not made.embedding_stays
    return made.fixed + made.kv + made.workspace + made.experts


def test_rows_stay_where_experts_lack_room_and_nowhere_else(checkpoints: Path) -> None:
    folder = models.make(checkpoints / "rows-olmoe")
    facts, whole = survey(folder), whole_budget(folder)
    assert facts.embedding_bytes == models.VOCABULARY * 64 * 4
    for memory, stay in [(whole, False), (whole - 1, True)]:
        made = split(facts, memory=memory)
        assert made.embedding_stays is stay
        with models.open_llm(folder, memory=memory) as llm:
            embedding = llm.assembly.network.model.get_input_embeddings()
        assert isinstance(embedding, StoredEmbedding) is stay
    half = split(facts, memory=whole, experts="50%")  # there is room, and it is not wanted
    assert not half.embedding_stays


def test_what_rows_leave_holds_experts(checkpoints: Path) -> None:
    folder = models.make(checkpoints / "rows-many", vocab_size=1000)
    facts = survey(folder)
    memory = whole_budget(folder) - 12 * facts.slot_bytes
    made = split(facts, memory=memory)
    taken = made.fixed + made.kv + made.workspace
    with_rows = (memory - taken - facts.embedding_bytes) // facts.slot_bytes
    assert made.slots == (memory - taken) // facts.slot_bytes > with_rows
    least = split(facts, memory=made.smallest)
    assert least.slots == facts.min_slots


def test_a_head_that_shares_the_weights_keeps_them_in_memory(checkpoints: Path) -> None:
    folder = models.make(checkpoints / "rows-tied", tie_word_embeddings=True)
    network = build(open_checkpoint(folder))
    assert network.stored_embedding is None
    assert survey(folder).embedding_bytes == 0
    memory = models.short_of_room(folder, 0.5)
    prompt = models.prompt_of(9)
    with models.open_llm(folder, memory=memory) as llm:
        tokens = llm.generate(prompt, models.greedy(8))[0].token_ids
    assert tokens == models.stock_greedy(models.stock(folder), prompt, 8)


# --- a model that runs so


def test_prepared_steps_and_the_plain_network_give_the_same_tokens(checkpoints: Path) -> None:
    folder = models.make(checkpoints / "rows-olmoe")
    prompts = [models.prompt_of(length, length) for length in (3, 40, 40)]
    memory = models.short_of_room(folder, 0.25)
    answers = []
    for eager, budget in [(False, memory), (True, memory), (False, models.MEMORY)]:
        with models.open_llm(folder, memory=budget, eager=eager) as llm:
            outputs = llm.generate(prompts, models.greedy(12), progress=False)
            stays = llm.assembly.split.embedding_stays
        assert stays is (budget == memory)
        answers.append([output.token_ids for output in outputs])
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_weights_that_are_encoded_while_they_are_loaded(precision: str, checkpoints: Path) -> None:
    """The tokens are those of the same weights with the embedding in memory."""
    folder, answers = models.make(checkpoints / "rows-olmoe"), []
    whole = models.short_of_room(folder, 1.0, precision=precision)
    for memory in (models.short_of_room(folder, 0.5, precision=precision), 2 * whole):
        with models.open_llm(folder, memory=memory, precision=precision) as llm:
            assert llm.assembly.split.embedding_stays is (memory < whole)
            answers.append(llm.generate(models.prompt_of(9), models.greedy(12))[0].token_ids)
    assert answers[0] == answers[1]


def test_a_disk_that_fails_amid_an_answer(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request fails, the books balance, and the next request is answered."""
    folder = models.make(checkpoints / "rows-olmoe")
    prompt, plain = models.prompt_of(5), files._pread
    with models.open_llm(folder, memory=models.short_of_room(folder, 0.5)) as llm:
        expected = llm.generate(prompt, models.greedy(6))[0].token_ids
        width = 64 * 4

        def fail(handle: int, into: memoryview, offset: int) -> int:
            if len(into) == width:
                raise OSError(5, "Input/output error")
            return plain(handle, into, offset)

        monkeypatch.setattr(files, "_pread", fail)
        with pytest.raises(ReadError, match="Input/output error") as caught:
            llm.generate(prompt, models.greedy(6))
        assert caught.value.hint
        monkeypatch.setattr(files, "_pread", plain)
        llm.assembly.cache.check()
        assert llm.generate(prompt, models.greedy(6))[0].token_ids == expected
