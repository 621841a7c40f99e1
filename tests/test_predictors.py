"""Learnt predictors in files: damaged, another model's, remembered, shipped; and the verb."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from command import Call, caller
from retinue.errors import UsageError, WriteError
from retinue.memory.home import sample_folder
from retinue.model.predictors import (
    default_predictor,
    find_predictor,
    read_predictor,
    write_predictor,
)
from retinue.model.profiles import find_profile
from retinue.model.survey import survey
from retinue.policy.predict.forecasters import LEARNED, forecaster
from retinue.policy.predict.learned import Learned
from retinue.policy.predict.network import Network, shapes

ROWS = (1, 3)
TINY = ("--threads", 1, "--memory", "2GiB")


def learned(model: str = "tiny", experts: int = models.EXPERTS) -> Learned:
    random = np.random.default_rng(5)
    sizes = shapes(len(ROWS), experts, 2, 8, 1)
    arrays = {name: random.random(size, dtype=np.float32) for name, size in sizes.items()}
    networks = {"emoe-a": Network(arrays, False), "emoe-l": Network(arrays, True)}
    shape = (models.LAYERS, experts, models.TOP_K)
    held_out = {"popularity": (0.25, 0.5, 0.75, 1.0)}
    return Learned(model, *shape, np.array(ROWS), ("a", "ü"), 12, held_out, networks)


def equal(left: Learned, right: Learned) -> bool:
    same = left.about() == right.about() and left.networks.keys() == right.networks.keys()
    return same and all(
        network.layerwise == right.networks[name].layerwise
        and network.arrays.keys() == right.networks[name].arrays.keys()
        and all((array == right.networks[name].arrays[key]).all() for key, array in pairs)
        for name, network in left.networks.items()
        for pairs in [network.arrays.items()]
    )


def test_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "predictor.npz"
    write_predictor(learned(), file)
    found = read_predictor(file)
    assert equal(found, learned())
    assert (found.task("ü"), found.task("other"), found.task(None)) == (1, 2, 2)
    assert found.spread(np.ones((2, 8))).sum(axis=1).tolist() == [0, 8, 0, 8]
    assert [entry.name for entry in file.parent.iterdir()] == ["predictor.npz"]
    first = file.read_bytes()
    write_predictor(learned(), file)
    assert file.read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, _: a.update(version=3), "unknown version of a predictor: `3`"),
        (lambda a, _: a.update(format="trace"), "not a predictor"),
        (lambda a, _: a.pop("tasks"), "damaged predictor"),
        (lambda a, _: a["tasks"].append("b"), "arrays of emoe-a do not fit"),
        (lambda a, _: a.update(experts=9), "arrays of emoe-a do not fit"),
        (lambda a, _: a.update(rows=[1]), "arrays of emoe-a do not fit"),
        (lambda a, _: a.update(rows=[1, 4]), "rows are not layers"),
        (lambda a, _: a.update(rows=[]), "rows are not layers"),
        (lambda a, _: a.update(networks=["emoe-z"]), "damaged predictor"),
        (lambda a, _: a.update(held_out=3), "damaged predictor"),
        (lambda _, w: w.pop("emoe-l/say"), "arrays of emoe-l do not fit"),
        (lambda _, w: w.pop("emoe-l/place"), "damaged predictor"),
        (lambda _, w: w.update({"emoe-a/place": np.float32(1)}), "damaged predictor"),
        (lambda _, w: w.update({"emoe-a/more": np.zeros(2)}), "arrays of emoe-a do not fit"),
        (lambda _, w: w["emoe-a/say"].__setitem__((0, 0, 0), np.nan), "not finite"),
    ],
)
def test_damaged(change: Callable[[Any, Any], object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "predictor.npz"
    write_predictor(learned(), file)
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    about = json.loads(str(arrays.pop("about")))
    change(about, arrays)
    np.savez(file, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(UsageError, match=message) as caught:
        read_predictor(file)
    assert str(file) in str(caught.value)
    assert "train-predictor" in caught.value.hint


def pickled() -> bytes:
    content = io.BytesIO()
    np.savez(content, about=np.array({"format": "retinue-predictor"}))
    return content.getvalue()


def with_about(text: str) -> bytes:
    content = io.BytesIO()
    np.savez(content, about=np.array(text))
    return content.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"PK\x03\x04", b"\x93NUMPY", pickled(), with_about("{"), with_about("[]")],
)
def test_no_predictor_at_all(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "predictor.npz"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="predictor"):
        read_predictor(file)
    with pytest.raises(UsageError, match="cannot read"):
        read_predictor(tmp_path / "nothing.npz")


def test_a_file_that_is_cut_short_is_said(tmp_path: Path) -> None:
    file = tmp_path / "predictor.npz"
    write_predictor(learned(), file)
    whole = file.read_bytes()
    for length in (1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(UsageError, match="cannot read the predictor"):
            read_predictor(file)


def test_a_predictor_is_found_by_its_checkpoint(olmoe: Path, tmp_path: Path) -> None:
    own = models.copy(olmoe, tmp_path / "own")
    facts = survey(own)
    assert find_predictor(own, facts) is None
    write_predictor(learned(), default_predictor(own))
    found = find_predictor(own, facts)
    assert found is not None
    assert equal(found, learned())


def test_a_predictor_of_another_shape_is_refused(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_predictor(learned("other", 9), default_predictor(olmoe))
    with pytest.raises(UsageError, match="is of `other`: 4 layers of 9 experts"):
        find_predictor(olmoe, survey(olmoe))


def test_an_unwritable_place_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot write"):
        write_predictor(learned(), tmp_path / "file" / "predictor.npz")


def test_the_sample_ships_its_predictor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    facts = survey(sample_folder())
    made, profile = (
        find_predictor(sample_folder(), facts),
        find_profile(sample_folder(), facts, None),
    )
    assert made is not None
    assert set(made.networks) == set(LEARNED)
    assert made.texts == 96
    assert set(made.tasks) == set(profile.tasks)
    used = np.random.default_rng(2).random((facts.layers, facts.experts_per_layer))
    for name in LEARNED:
        one = forecaster(name, profile, made)
        before = one.shares("math_qa")
        one.observe("math_qa", used.astype(np.float32))
        after = one.shares("math_qa")
        for shares in (before, after, one.shares(None)):
            assert shares.sum(axis=1) == pytest.approx(1)
        assert np.abs(after - before).max() > 1e-3


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    return caller(capsys)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return models.write_texts(tmp_path / "texts.jsonl", 6, 4)


def test_training_by_the_command_line(call: Call, olmoe: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.npz"
    arguments = ("train-predictor", olmoe, "--data", texts, "--epochs", 2, "--seed", 3, *TINY)
    done = call(*arguments, "--kind", "emoe-a,emoe-l", "--out", out, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert (document["texts"], document["held_out"], document["seed"]) == (8, 2, 3)
    assert document["kinds"] == ["emoe-a", "emoe-l"]
    for order in ("mixed", "blocks"):
        for found in document["scores"][order].values():
            assert set(found) == {"precision", "recall", "f1", "covered"}
            assert len(found["f1"]) == models.LAYERS
            assert list(found["covered"]) == ["20%", "40%", "60%", "80%"]
    assert "tasks mixed" in done.err
    first = out.read_bytes()
    assert call(*arguments, "--kind", "emoe-a,emoe-l", "--out", out).code == 0
    assert out.read_bytes() == first
    only = call(*arguments, "--kind", "emoe-l", "--out", tmp_path / "only.npz")
    assert only.code == 0
    assert "emoe-a" not in only.out
    assert list(read_predictor(tmp_path / "only.npz").networks) == ["emoe-l"]


def test_a_trace_teaches_what_its_texts_teach(
    call: Call, olmoe: Path, texts: Path, tmp_path: Path
) -> None:
    trace, direct, out = (tmp_path / name for name in ("a.trace", "direct.npz", "out.npz"))
    few = ("--epochs", 1, "--kind", "emoe-a")
    detail = ("--detail", "histogram")
    assert call("trace", olmoe, "--data", texts, "--out", trace, *detail, *TINY).code == 0
    assert call("train-predictor", olmoe, "--data", texts, *few, "--out", direct, *TINY).code == 0
    done = call("train-predictor", olmoe, "--trace", trace, *few, "--out", out)
    assert done.code == 0, done.err
    assert out.read_bytes() == direct.read_bytes()
    done = call("train-predictor", "sample", "--trace", trace, *few, "--out", out)
    assert done.code == 2
    assert "is of another model" in done.err
    for option in (("--data", texts), ("--per-task", 2), ("--threads", 1), ("--no-self-check",)):
        done = call("train-predictor", olmoe, "--trace", trace, *option)
        assert done.code == 2
        assert "is of no use with `--trace`" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 0), "epochs is out of range: `0`"),
        (("--seed", -1), "seed is out of range: `-1`"),
        (("--per-task", 2), "too few texts of `a`"),
    ],
)
def test_what_cannot_be_trained(
    arguments: tuple[object, ...], message: str, call: Call, olmoe: Path, texts: Path
) -> None:
    done = call("train-predictor", olmoe, "--data", texts, *TINY, *arguments)
    assert done.code == 2
    assert message in done.err
    assert "hint:" in done.err
    assert "text/s" not in done.err  # it is seen before texts run
