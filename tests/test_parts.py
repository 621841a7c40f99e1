"""Learned parts in the predictor's file: their shapes, versions, merging, and who refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from retinue.config import Config
from retinue.engine.reserve import given_of
from retinue.errors import Refused, UsageError
from retinue.memory.home import sample_folder
from retinue.model.predictors import default_predictor, kept, read_predictor, write_predictor
from retinue.model.survey import survey
from retinue.policy.parts.kinds import KINDS, WIDTHS, misfit
from retinue.policy.policies import Policies
from retinue.policy.predict.learned import Learned, Part
from retinue.policy.predict.network import Network, shapes
from retinue.policy.preset import Arrays, Given, Preset

ROWS = (0, 1, 2, 3)
LENGTHS = {"rows": len(ROWS), "experts": models.EXPERTS, "hidden": 20, "vocabulary": 21}


LENGTHS_OF_BITS = (len(ROWS), models.EXPERTS)


def arrays_of(kind: str, seed: int = 0) -> Arrays:
    """Arrays of the right shape, ids in their range; each free length is another one."""
    random = np.random.default_rng(seed)
    lengths = dict(LENGTHS)
    made = {}
    for name, shape in KINDS[kind].shapes.items():
        sizes = [
            said if isinstance(said, int) else lengths.setdefault(said, 20 + len(lengths))
            for said in shape
        ]
        made[name] = random.standard_normal(sizes).astype(np.float32)
        if name in KINDS[kind].whole:
            least, below = KINDS[kind].whole[name]
            made[name] = random.integers(least, LENGTHS[below], sizes).astype(np.float32)
    if kind == "edgemoe":
        made["bits"] = random.choice(WIDTHS, LENGTHS_OF_BITS).astype(np.float32)
        made["keys"][:, 0] = random.integers(0, len(ROWS), len(made["keys"]))
    return kept(made)


def learned(*kinds: str, seed: int = 0, networks: tuple[str, ...] = ()) -> Learned:
    sizes = shapes(len(ROWS), models.EXPERTS, 1, 8, 1)
    weights = {name: np.full(size, seed, np.float32) for name, size in sizes.items()}
    return Learned(
        "tiny",
        models.LAYERS,
        models.EXPERTS,
        models.TOP_K,
        np.array(ROWS),
        ("a",),
        4 + seed,
        dict.fromkeys(networks, (0.5,) * 4),
        {name: Network(weights, name == "emoe-l") for name in networks},
        {kind: Part(arrays_of(kind, seed), {"recall": (0.25, 0.5)}) for kind in kinds},
    )


def same(left: Arrays, right: Arrays) -> bool:
    return left.keys() == right.keys() and all((left[key] == right[key]).all() for key in left)


def test_every_kind_through_a_file(tmp_path: Path) -> None:
    file, made = tmp_path / "parts.npz", learned(*KINDS)
    write_predictor(made, file)
    found = read_predictor(file)
    assert found.about() == made.about()
    for kind, part in found.parts.items():
        assert same(part.arrays, made.parts[kind].arrays), kind
        assert part.worth == {"recall": (0.25, 0.5)}
        assert {array.dtype for array in part.arrays.values()} == {np.dtype(np.float32)}


def test_whole_numbers_stay_whole_and_weights_are_rounded() -> None:
    ids = np.array([[0, 511, -1]])
    weights = np.linspace(0, 1, 300)
    found = kept({"ids": ids, "weights": weights, "few": np.array([0.1])})
    assert found["ids"].tolist() == ids.tolist()
    assert np.abs(found["weights"] - weights).max() < 5e-4
    assert found["few"] == np.float32(0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_array_of_another_shape_is_noticed(kind: str) -> None:
    right = arrays_of(kind)
    assert misfit(kind, right, len(ROWS), models.EXPERTS) is None
    for name, array in right.items():
        wrong = {
            "one more": np.concatenate([array, array]) if array.shape[0] != 1 else array[:0],
            "one less": array[..., 0],
            "not finite": np.full_like(array, np.nan),
        }
        bound = KINDS[kind].shapes[name][0]
        shared = sum(bound in shape for shape in KINDS[kind].shapes.values()) > 1
        if bound not in ("rows", "experts") and not isinstance(bound, int) and not shared:
            del wrong["one more"]  # a length of its own may be any
        for what, other in wrong.items():
            changed = {**right, name: other}
            assert misfit(kind, changed, len(ROWS), models.EXPERTS), (name, what)
        lacking = {key: value for key, value in right.items() if key != name}
        assert misfit(kind, lacking, len(ROWS), models.EXPERTS)


@pytest.mark.parametrize(
    ("kind", "name", "at", "value"),
    [
        ("promoe", "stride", 0, 0),
        ("promoe", "stride", 0, len(ROWS)),
        ("promoe", "stride", 0, 1.5),
        ("edgemoe", "ids", (0, 0), models.EXPERTS),
        ("edgemoe", "ids", (0, 0), -2),
        ("edgemoe", "keys", (0, 2), models.EXPERTS),
        ("edgemoe", "keys", (0, 0), -1),
        ("edgemoe", "keys", (0, 0), len(ROWS)),
        ("edgemoe", "bits", (0, 0), 5),
    ],
)
def test_what_names_nothing_is_noticed(kind: str, name: str, at: Any, value: float) -> None:
    changed = {key: array.copy() for key, array in arrays_of(kind).items()}
    changed[name][at] = value
    found = misfit(kind, changed, len(ROWS), models.EXPERTS)
    assert found is not None
    assert f"`{name}` of {kind}" in found


def test_kinds_of_one_model_have_one_width(tmp_path: Path) -> None:
    made, file = learned("promoe", "read-me"), tmp_path / "parts.npz"
    write_predictor(made, file)
    read_predictor(file)
    wide = dict(made.parts["read-me"].arrays)
    wide["read"] = np.zeros((LENGTHS["hidden"] + 1, wide["read"].shape[1]), np.float32)
    parts = {**made.parts, "read-me": Part(wide, {})}
    assert misfit("read-me", wide, len(ROWS), models.EXPERTS) is None, "by itself it may be right"
    write_predictor(replace(made, parts=parts), file)
    with pytest.raises(UsageError, match="the arrays of read-me do not fit the model"):
        read_predictor(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, _: a["parts"].update(promoe=3), "damaged predictor"),
        (lambda a, _: a["parts"].update(fmoe={}), "the arrays of fmoe are not maps"),
        (lambda _, w: w.pop("promoe/say"), "the arrays of promoe are not"),
        (lambda _, w: w["promoe/say"].__setitem__((0, 0, 0), np.nan), "not finite"),
        (lambda _, w: w.update({"promoe/say": np.zeros((4, 3, 8))}), "promoe do not fit"),
        (lambda a, _: a.update(rows=[0, 1]), "promoe do not fit"),
    ],
)
def test_damaged(change: Callable[[Any, Any], object], message: str, tmp_path: Path) -> None:
    file = tmp_path / "parts.npz"
    write_predictor(learned("promoe"), file)
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    about = json.loads(str(arrays.pop("about")))
    change(about, arrays)
    np.savez(file, about=np.array(json.dumps(about)), **arrays)
    with pytest.raises(UsageError, match=message):
        read_predictor(file)


def test_older_files_and_kinds_to_come_are_read(tmp_path: Path) -> None:
    """Version 1 had no parts; a kind that only a later retinue knows is left out."""
    file = tmp_path / "parts.npz"
    write_predictor(learned("hobbit", networks=("emoe-a",)), file)
    with np.load(file) as content:
        arrays = {name: content[name] for name in content.files}
    about = json.loads(str(arrays.pop("about")))
    later = {**about, "parts": {**about["parts"], "tomorrow": {"x": [1]}}}
    more = {**arrays, "tomorrow/x": np.zeros(3)}
    np.savez(file, about=np.array(json.dumps(later)), **more)
    assert list(read_predictor(file).parts) == ["hobbit"]
    del about["parts"]
    first = {name: array for name, array in arrays.items() if not name.startswith("hobbit")}
    np.savez(file, about=np.array(json.dumps({**about, "version": 1})), **first)
    found = read_predictor(file)
    assert (list(found.networks), dict(found.parts)) == (["emoe-a"], {})


def test_what_is_trained_keeps_the_rest() -> None:
    old = learned("promoe", "fmoe", networks=("emoe-a", "emoe-l"))
    parts = learned("fmoe", seed=1).over(old)
    assert list(parts.parts) == ["promoe", "fmoe"]
    assert same(parts.parts["fmoe"].arrays, arrays_of("fmoe", 1))
    assert same(parts.parts["promoe"].arrays, arrays_of("promoe"))
    assert (list(parts.networks), parts.texts) == (["emoe-a", "emoe-l"], 4)
    network = learned(seed=1, networks=("emoe-l",)).over(old)
    assert list(network.networks) == ["emoe-a", "emoe-l"]
    assert network.networks["emoe-l"].arrays["place"][0, 0] == 1
    assert (list(network.parts), network.texts) == (["promoe", "fmoe"], 5)
    # Networks share one list of tasks; those of another list would not fit it.
    other = replace(learned(seed=1, networks=("emoe-l",)), tasks=("b",)).over(old)
    assert (list(other.networks), list(other.parts)) == (["emoe-l"], ["promoe", "fmoe"])
    # Of another model nothing is kept.
    assert not replace(learned(), rows=np.array([0, 1])).over(old).parts


def preset_of(*kinds: str) -> Preset:
    def build(given: Given) -> Policies:
        raise AssertionError("not built here")

    return Preset("by-hand", True, "", (), "", build, learned=kinds)


def test_presets_get_what_they_name(olmoe: Path, tmp_path: Path) -> None:
    own = models.copy(olmoe, tmp_path / "own")
    facts, config = survey(own), Config()
    nothing = given_of(own, facts, 8, preset_of("promoe"), config)
    assert (nothing.routed, dict(nothing.learned)) == (ROWS, {})
    with pytest.raises(Refused, match="needs a `promoe`") as caught:
        nothing.arrays("promoe")
    assert "retinue train-predictor" in caught.value.hint
    assert "--kind promoe" in caught.value.hint
    write_predictor(learned("promoe", "fmoe"), default_predictor(own))
    given = given_of(own, facts, 8, preset_of("promoe"), config)
    assert given.routed == ROWS
    assert list(given.learned) == ["promoe"]
    assert same(given.arrays("promoe"), arrays_of("promoe"))
    # What needs nothing is not held up by a file, not even by a damaged one.
    default_predictor(own).write_bytes(b"PK")
    assert dict(given_of(own, facts, 8, preset_of(), config).learned) == {}
    with pytest.raises(UsageError, match="cannot read the predictor"):
        given_of(own, facts, 8, preset_of("promoe"), config)
    sample = given_of(sample_folder(), survey(sample_folder()), 8, preset_of(), config)
    assert sample.routed == tuple(range(8))
