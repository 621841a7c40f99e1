"""Where learnt predictors lie: a file that the user names, the cache folder, or the package.

A predictor is safe to delete: `retinue train-predictor` makes it again. The files hold plain
arrays, and a line of JSON that says whose they are; nothing in them is ever executed.
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np

from retinue.errors import UsageError
from retinue.memory.home import sample_folder, sample_predictor
from retinue.memory.machine import cache_folder
from retinue.model.profiles import check_shape
from retinue.model.survey import fingerprint
from retinue.policy.predict.learned import AGAIN, Learned, learned_from
from retinue.types import Facts

ABOUT = "about"


def default_predictor(folder: Path) -> Path:
    """Where the predictor of the checkpoint in `folder` is remembered."""
    return cache_folder() / f"predictor-{fingerprint(folder)}.npz"


def find_predictor(folder: Path, facts: Facts, file: str | None = None) -> Learned | None:
    """The predictor in `file`, or else what is remembered of the checkpoint or ships with it.

    None where there is none. Raises UsageError for one that is damaged or another model's.
    """
    places = [default_predictor(folder)] if file is None else [Path(file).expanduser()]
    if file is None and folder.resolve() == sample_folder().resolve():
        places.append(sample_predictor())
    for place in places:
        if file is not None or place.is_file():
            learned = read_predictor(place)
            check_predictor(learned, facts, place)
            return learned
    return None


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
        return learned_from(about, arrays)
    except UsageError as error:
        raise UsageError(f"`{file}`: {error}", hint=error.hint) from error
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise UsageError(f"cannot read the predictor `{file}`: {error!r}", hint=AGAIN) from error


def write_predictor(learned: Learned, file: Path) -> None:
    """Write `learned`, whole or not at all. Raises UsageError where that is not possible."""
    arrays = {
        f"{name}/{key}": array
        for name, network in learned.networks.items()
        for key, array in network.arrays.items()
    }
    content = io.BytesIO()
    np.savez(content, **{ABOUT: np.array(json.dumps(learned.about()))}, **arrays)  # type: ignore[arg-type]
    draft = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content.getvalue())
        draft.replace(file)
    except OSError as error:
        raise UsageError(f"cannot write the predictor `{file}`: {error}") from error
