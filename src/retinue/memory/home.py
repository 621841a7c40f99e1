"""From what the user calls a model to the folder that holds it."""

import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from retinue.errors import CheckpointError
from retinue.memory.headers import fetch_headers, is_stand_in
from retinue.memory.hub import fetch
from retinue.memory.hub_cache import Repository, cache_root, find, is_complete, parse_id

SAMPLE = "sample"
PACK_PROFILE = "retinue-profile.json"  # what a pack brings along


def silent(text: str) -> None:
    """Say nothing."""


def locate(model: str | Path, say: Callable[[str], None] = silent) -> Path:
    """The checkpoint folder of `model`: a path, a repository id, which is downloaded, or `sample`.

    A folder of that name wins over a repository. `say` hears of downloads and of copies that may
    be old. Raises CheckpointError for what is neither, and what `hub.fetch` raises.
    """
    found = _look_up(model)
    return fetch(found, say) if isinstance(found, Repository) else found


def locate_headers(model: str | Path, say: Callable[[str], None] = silent) -> Path:
    """The same for who reads headers alone: of a repository, nothing else is downloaded."""
    found = _look_up(model)
    return fetch_headers(found, say) if isinstance(found, Repository) else found


def find_here(model: str | Path) -> Path | None:
    """The folder of `model` if that is on this disk already; asks nobody and raises nothing."""
    try:
        found = _look_up(model)
    except CheckpointError:
        return None
    return find(found) if isinstance(found, Repository) else found


def _look_up(model: str | Path) -> Path | Repository:
    folder = Path(os.path.expanduser(model))  # noqa: PTH111  pathlib raises for `~nobody`
    if os.path.isdir(folder):  # noqa: PTH112  and for names that are too long
        return folder
    if str(model) == SAMPLE:
        return sample_folder()
    repository = parse_id(model) if isinstance(model, str) and not os.path.lexists(folder) else None
    if repository is None:
        raise CheckpointError(
            f"no such folder: `{model}`",
            hint="give a local checkpoint folder, a repository id as ORG/NAME, or `sample` for the"
            " model that ships along",
        )
    return repository


def sample_folder() -> Path:
    """The small trained model that is part of the package."""
    return Path(str(files("retinue"))) / "data" / "sample"


def called(folder: Path) -> str:
    """What a command line calls the checkpoint in `folder`."""
    return SAMPLE if folder.resolve() == sample_folder().resolve() else str(folder)


def sample_tasks() -> Path:
    """Texts of eight tasks for the sample model: JSON lines."""
    return Path(str(files("retinue"))) / "data" / "sample-tasks.jsonl"


def sample_profile() -> Path:
    """What `retinue profile sample` learnt from these texts."""
    return Path(str(files("retinue"))) / "data" / "sample-profile.json"


def sample_predictor() -> Path:
    """What `retinue train-predictor sample` learnt from them."""
    return Path(str(files("retinue"))) / "data" / "sample-predictor.npz"


def weights_near(folder: Path) -> Path:
    """A folder of real weights to measure the disk with: `folder`, unless it has headers alone.

    Then whatever complete checkpoint is in the hub's cache, where it would lie; or the sample.
    """
    if not is_stand_in(folder):
        return folder
    complete = (
        snapshot
        for snapshot in sorted(cache_root().glob("models--*--*/snapshots/*"))
        if is_complete(snapshot)
    )
    return next(complete, sample_folder())
