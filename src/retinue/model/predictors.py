"""Where learnt predictors lie: the cache folder, or the package.

A predictor is safe to delete: `retinue train-predictor` makes it again. The files hold plain
arrays, and a line of JSON that says whose they are; nothing in them is ever executed.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retinue.errors import UsageError
from retinue.memory.home import sample_folder, sample_predictor
from retinue.memory.machine import cache_folder
from retinue.memory.whole_file import write_whole
from retinue.model.profiles import check_shape
from retinue.model.survey import fingerprint
from retinue.policy.predict.learned import AGAIN, Learned, learned_from
from retinue.types import Facts, FloatArray

ABOUT = "about"
MANY = 256  # numbers; fewer are kept in fp32


def default_predictor(folder: Path) -> Path:
    """Where the predictor of the checkpoint in `folder` is remembered."""
    return cache_folder() / f"predictor-{fingerprint(folder)}.npz"


def find_predictor(folder: Path, facts: Facts) -> Learned | None:
    """What is remembered of the checkpoint in `folder`, or ships with it.

    What ships fills in what is not remembered. None where there is none. Raises UsageError for
    one that is damaged or another model's.
    """
    places = [default_predictor(folder)]
    if folder.resolve() == sample_folder().resolve():
        places.append(sample_predictor())
    found: Learned | None = None
    for place in places:
        if place.is_file():
            learned = read_predictor(place)
            check_predictor(learned, facts, place)
            found = learned if found is None else found.over(learned)
    return found


def check_predictor(learned: Learned, facts: Facts, file: Path) -> None:
    """Raise UsageError unless `learned` has the shape of the model."""
    hint = "train one for this model with `retinue train-predictor`"
    check_shape(learned, facts, f"the predictor `{file}`", hint)


def read_predictor(file: Path) -> Learned:
    """The predictor in `file`. Raises UsageError where it cannot be read or is none."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        about = json.loads(str(arrays.pop(ABOUT)))
        return learned_from(
            about, {name: array.astype(np.float32) for name, array in arrays.items()}
        )
    except UsageError as error:
        raise UsageError(f"`{file}`: {error}", hint=error.hint) from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the predictor `{file}`: {error!r}", hint=AGAIN) from error


def write_predictor(learned: Learned, file: Path) -> None:
    """Write `learned`, whole or not at all. Raises WriteError where that is not possible."""
    arrays: dict[str, npt.NDArray[Any]] = {
        f"{name}/{key}": array
        for name, network in learned.networks.items()
        for key, array in network.arrays.items()
    }
    for kind, part in learned.parts.items():
        arrays |= {f"{kind}/{key}": _narrow(array) for key, array in part.arrays.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **{ABOUT: np.array(json.dumps(learned.about()))}, **arrays)  # type: ignore[arg-type]
    write_whole(file, content.getvalue(), "the predictor")


def kept(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, FloatArray]:
    """`arrays` of a part as a file gives them back: rounded to 16 bits where that does no harm."""
    return {name: _narrow(np.asarray(array)).astype(np.float32) for name, array in arrays.items()}


def _narrow(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Whole numbers as int16, weights as fp16; what is few or large as it is, in fp32."""
    wide = array.astype(np.float32)
    largest = float(np.abs(wide).max(initial=0))
    if largest < 2**15 and (wide == np.rint(wide)).all():
        return wide.astype(np.int16)
    return wide.astype(np.float16) if array.size >= MANY and largest < 2**15 else wide
