"""`retinue train-predictor` for learned parts: every kind, from texts and traces; the sample."""

from pathlib import Path

import numpy as np
import pytest

import models
from command import Call, caller, refused
from retinue.cli import recorded
from retinue.cli.kinds import KINDS, kinds_of
from retinue.config import Config
from retinue.engine.reserve import given_of
from retinue.errors import UsageError
from retinue.memory.home import sample_folder, sample_predictor
from retinue.model.experts import ExpertHost
from retinue.model.predictors import read_predictor
from retinue.model.survey import survey
from retinue.policy.parts.kinds import KINDS as PARTS
from retinue.policy.presets import PRESETS

TINY = ("--threads", 1, "--memory", "2GiB")
FEW = ("--epochs", 1, "--seed", 3, *TINY)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return models.write_texts(tmp_path / "texts.jsonl", 8, 6)


def test_every_kind_at_once(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    arguments = ("train-predictor", olmoe, "--data", texts, *FEW)
    done = call(*arguments, "--out", out, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert document["kinds"] == list(KINDS)
    assert set(document["parts"]) == set(PARTS)
    assert set(document["baseline"]) == {"popularity", "gate 1", "gate 2", "gate 3"}
    for figures in (*document["parts"].values(), document["baseline"]):
        assert figures
        assert all(np.isfinite(values).all() for values in figures.values())
    for shown in ("recall by layer", "edgemoe: bits", "hobbit: penalty", "scored on 2 of 8"):
        assert shown in done.err
    found = read_predictor(out)
    assert (set(found.parts), list(found.networks)) == (set(PARTS), ["emoe-a", "emoe-l"])
    assert found.parts["promoe"].worth["recall"] == pytest.approx(
        document["parts"]["promoe"]["recall"]
    )
    first = out.read_bytes()
    # The same seed makes the same file, and one kind alone leaves the others.
    assert call(*arguments, "--kind", "promoe", "--out", out).code == 0
    assert out.read_bytes() == first
    again = call(*arguments, "--kind", "promoe, fmoe", "--epochs", 2, "--out", out)
    assert again.code == 0
    assert "moe-infinity" not in again.out
    changed = read_predictor(out)
    assert changed.parts.keys() == found.parts.keys()
    differs = changed.parts["promoe"].arrays["say"] != found.parts["promoe"].arrays["say"]
    assert differs.any()
    same = changed.parts["hobbit"].arrays["weights"] == found.parts["hobbit"].arrays["weights"]
    assert same.all()


def test_a_model_of_one_layer(call: Call, texts: Path, tmp_path: Path) -> None:
    """Nothing lies ahead of its only layer: what learns that is left out, or refused by name."""
    model, out = models.make(tmp_path / "one", num_hidden_layers=1), tmp_path / "out.npz"
    arguments = ("train-predictor", model, "--data", texts, *FEW, "--out", out)
    done = call(*arguments, "--json")
    assert done.code == 0, done.err
    assert set(KINDS) - set(done.document["kinds"]) == {"promoe", "pre-gated"}
    assert "no `promoe`: the model has one layer with experts" in done.err
    refused(call(*arguments, "--kind", "pre-gated"), 3, "no `pre-gated`: the model has one layer")
    file = tmp_path / "a.trace"
    words = ("trace", model, "--data", texts, "--out", file, "--signals", "hidden", *TINY)
    assert call(*words).code == 0
    traced = ("train-predictor", model, "--trace", file, "--out", out)
    refused(call(*traced, "--kind", "promoe"), 2, "the trace is not enough for `promoe`")


def test_a_damaged_file_is_replaced(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    out.write_bytes(b"PK")
    done = call("train-predictor", olmoe, "--data", texts, "--kind", "hobbit", "--out", out, *TINY)
    assert done.code == 0, done.err
    assert "what was there is replaced" in done.err
    assert list(read_predictor(out).parts) == ["hobbit"]


def test_a_model_that_is_too_large_to_be_whole(
    call: Call, olmoe: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sensitivity is tried layer by layer; bit widths are refused by name, and left out of all."""
    monkeypatch.setattr(recorded, "whole_bytes", lambda facts: 1 << 50)
    out = tmp_path / "out.npz"
    arguments = ("train-predictor", olmoe, "--data", texts, "--out", out, *FEW)
    done = call(*arguments, "--kind", "adapmoe", "--json")
    assert done.code == 0, done.err
    assert min(read_predictor(out).parts["adapmoe"].arrays["sensitivity"]) > 0
    done = call(*arguments, "--kind", "edgemoe")
    assert done.code == 3
    assert "whole plain model in fp32" in done.err
    assert "and `--memory" in done.err
    monkeypatch.setattr(ExpertHost, "sees_ahead", False)
    done = call(*arguments, "--json")
    assert done.code == 0, done.err
    left = {*KINDS} - {"edgemoe", "fmoe", "pre-gated", "read-me", "adapmoe"}
    assert set(done.document["kinds"]) == left
    for kind in ("edgemoe", "fmoe"):
        assert f"no `{kind}`" in done.err


def test_a_trace_is_enough_for_some(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    plain, full = tmp_path / "plain.trace", tmp_path / "full.trace"
    direct, out = tmp_path / "direct.npz", tmp_path / "out.npz"
    record = ("trace", olmoe, "--data", texts, *TINY)
    assert call(*record, "--out", plain).code == 0
    assert call(*record, "--out", full, "--signals", "scores,hidden,embedding").code == 0
    done = call("train-predictor", olmoe, "--trace", full, "--epochs", 1, "--out", out, "--json")
    assert done.code == 0, done.err
    enough = ["emoe-a", "emoe-l", "promoe", "moe-infinity", "fmoe", "read-me", "hobbit"]
    assert done.document["kinds"] == enough
    some = ("--kind", "promoe,moe-infinity,hobbit", "--epochs", 1)
    texts_too = ("train-predictor", olmoe, "--data", texts, *some, "--out", direct, *TINY)
    assert call(*texts_too).code == 0
    # fp16 in the trace as in memory: the same is learnt.
    for kind, part in read_predictor(direct).parts.items():
        traced = read_predictor(out).parts[kind].arrays
        assert all((part.arrays[name] == traced[name]).all() for name in traced), kind
    done = call("train-predictor", olmoe, "--trace", plain, "--kind", "promoe", "--out", out)
    assert done.code == 2
    assert "not enough for `promoe`: it has no `hidden`" in done.err
    assert "--signals hidden" in done.err
    for kind in ("expertflow", "pre-gated", "adapmoe", "edgemoe"):
        done = call("train-predictor", olmoe, "--trace", full, "--kind", kind, "--out", out)
        assert done.code == 2
        assert "--data" in done.err


def test_kinds_are_named() -> None:
    assert kinds_of("fmoe, promoe") == ["promoe", "fmoe"]
    assert kinds_of("all") == list(KINDS)
    with pytest.raises(UsageError, match="unknown kind of predictor: `nothing`") as caught:
        kinds_of("promoe,nothing")
    assert "pre-gated" in caught.value.hint


def test_an_unknown_kind_is_refused(call: Call, texts: Path, olmoe: Path) -> None:
    done = call("train-predictor", olmoe, "--data", texts, "--kind", "nothing", *TINY)
    assert done.code == 2
    assert "known: emoe-a" in done.err


@pytest.mark.parametrize("name", [row.name for row in PRESETS.values() if row.learned])
def test_an_untrained_preset_names_the_command(call: Call, olmoe: Path, name: str) -> None:
    done = call("run", olmoe, "--token-ids", "1 2 3", "--preset", name, *TINY)
    assert done.code == 3
    (kind,) = PRESETS[name].learned
    assert f"retinue train-predictor {olmoe} --data FILE --kind {kind}" in done.err


def test_the_sample_ships_every_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sample_predictor().stat().st_size < 4 << 20
    found = read_predictor(sample_predictor())
    assert set(found.parts) == set(PARTS)
    facts = survey(sample_folder())
    for preset in PRESETS.values():
        if preset.learned and not preset.replayed:
            given = given_of(sample_folder(), facts, 64, preset, Config())
            assert set(given.learned) == {*preset.learned, *preset.better_with}
            assert preset.build(given).exact == preset.exact
    worse = found.parts["hobbit"].worth
    assert worse["penalty"][0] < min(worse["by recency"][0], worse["by use"][0])
    for kind, least in (("promoe", 0.75), ("pre-gated", 0.75), ("expertflow", 0.6)):
        recall = [value for value in found.parts[kind].worth["recall"] if value]
        assert np.mean(recall) > least
