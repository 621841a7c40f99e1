"""The hub's cache on this disk, laid out as every tool that uses it does. Downloads nothing.

`models--ORG--NAME/` holds `blobs/` (the bytes, named by their hash), `snapshots/COMMIT/` (links to
them under their own names) and `refs/` (which commit a branch was at). Other tools write here too,
so nothing is taken for complete that was not looked at.
"""

import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from retinue.errors import DownloadError, RetinueError
from retinue.memory.checkpoint import read_header, read_index, weight_files

DEFAULT_REVISION = "main"

_ID = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_EXPERTS = re.compile(r"expert|moe")


@dataclass(frozen=True, slots=True)
class Repository:
    """A model repository of the hub, `ORG/NAME`, at a branch, tag or commit."""

    name: str
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        at = "" if self.revision == DEFAULT_REVISION else f"@{self.revision}"
        return self.name + at

    @property
    def folder_name(self) -> str:
        """The name of its folder in the cache."""
        return "models--" + self.name.replace("/", "--")

    @property
    def folder(self) -> Path:
        """Its folder in the cache, whether that exists or not."""
        return cache_root() / self.folder_name

    @property
    def fixed(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return bool(_COMMIT.fullmatch(self.revision))

    def snapshot(self, commit: str) -> Path:
        """The folder of one commit."""
        return self.folder / "snapshots" / commit


@dataclass(frozen=True, slots=True)
class Cached:
    """A repository that lies in the cache: what it takes and whether it could be run."""

    name: str
    revision: str
    bytes: int
    last_used: float
    state: str


def parse_id(text: str) -> Repository | None:
    """The repository that `ORG/NAME` or `ORG/NAME@REVISION` names; None for anything else."""
    found = _ID.fullmatch(text)
    if found is None or ".." in text or "--" in found["name"]:
        return None
    return Repository(found["name"], found["revision"] or DEFAULT_REVISION)


def cache_root() -> Path:
    """Where the hub's cache is: `HF_HUB_CACHE`, or `hub` below `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def name_of(folder: Path) -> str:
    """What a person calls the checkpoint in `folder`: the repository's id, for a snapshot."""
    outer = folder.parent.parent.name
    if folder.parent.name == "snapshots" and outer.startswith("models--"):
        return _id_of(outer)
    return folder.name


def find(repository: Repository) -> Path | None:
    """The snapshot of the revision as the cache knows it, if it is complete."""
    commit = repository.revision
    if not repository.fixed:
        try:
            commit = (repository.folder / "refs" / repository.revision).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    folder = repository.snapshot(commit)
    return folder if commit and is_complete(folder) else None


def find_older(repository: Repository) -> Path | None:
    """The newest complete snapshot of any commit, where no revision was asked for by name."""
    if repository.revision != DEFAULT_REVISION:
        return None
    complete = [folder for folder in _snapshots(repository.folder) if is_complete(folder)]
    return max(complete, key=lambda folder: folder.stat().st_mtime, default=None)


def is_complete(folder: Path) -> bool:
    """Whether configuration and all weights that the index names are there."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all(file.is_file() for file in weight_files(folder))
    except RetinueError:
        return False


def remember(repository: Repository, commit: str) -> None:
    """Write down which commit the revision is at, as far as the cache can be written."""
    if repository.fixed:
        return
    file = repository.folder / "refs" / repository.revision
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not (file.is_file() and file.read_text() == commit):
            draft.write_text(commit)
            draft.replace(file)


def cached() -> list[Cached]:
    """Every model repository in the cache, by name."""
    with suppress(OSError):
        folders = sorted(cache_root().glob("models--*--*"))
        return [_describe(folder) for folder in folders if folder.is_dir()]
    return []


def used_bytes(folder: Path) -> int:
    """Bytes on disk of everything below `folder`; a link counts as nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(place) / name).st_blocks * 512
    return total


def remove(name: str) -> None:
    """Delete the repository `name` from the cache: every revision, and what is half downloaded.

    Raises DownloadError when it cannot be deleted.
    """
    repository = Repository(name)
    delete(repository.folder)
    shutil.rmtree(cache_root() / ".locks" / repository.folder_name, ignore_errors=True)


def delete(folder: Path) -> None:
    """Delete `folder` with all that is in it. Raises DownloadError when that is not allowed."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise DownloadError(
            f"cannot delete `{folder}`: {error.strerror}", hint="check its permissions"
        ) from error


def _describe(folder: Path) -> Cached:
    revisions, snapshots = _references(folder), _snapshots(folder)
    newest = max(snapshots, key=lambda snapshot: snapshot.stat().st_mtime, default=None)
    shown = revisions.get(newest.name, newest.name[:12]) if newest else "-"
    return Cached(
        name=_id_of(folder.name),
        revision=shown,
        bytes=used_bytes(folder),
        last_used=_last_used(folder),
        state="incomplete" if _is_arriving(folder) else _state(newest),
    )


def _is_arriving(folder: Path) -> bool:
    """Whether a download was cut, or is under way."""
    return any((folder / "blobs").glob("*.incomplete"))


def _references(folder: Path) -> dict[str, str]:
    """Commit to `BRANCH (COMMIT)`."""
    found = {}
    for file in sorted((folder / "refs").rglob("*")):
        with suppress(OSError, UnicodeDecodeError):
            commit = file.read_text().strip()
            found[commit] = f"{file.relative_to(folder / 'refs')} ({commit[:12]})"
    return found


def _snapshots(folder: Path) -> list[Path]:
    with suppress(OSError):
        return [path for path in sorted((folder / "snapshots").iterdir()) if path.is_dir()]
    return []


def _last_used(folder: Path) -> float:
    """Seconds since the epoch: the last time that one of its files was read or written."""
    last = folder.stat().st_mtime
    for file in (folder / "blobs").glob("*"):
        with suppress(OSError):
            status = file.stat()
            last = max(last, status.st_atime, status.st_mtime)
    return last


def _state(snapshot: Path | None) -> str:
    """Whether the snapshot could be run, and why not."""
    if snapshot is None or not any(snapshot.iterdir()):
        return "incomplete"
    if not (snapshot / "config.json").is_file():
        return "not a model of transformers"
    index = snapshot / "model.safetensors.index.json"
    if not index.is_file() and not any(snapshot.glob("*.safetensors")):
        return "no safetensors"
    if not is_complete(snapshot):
        return "incomplete"
    try:
        names = read_index(snapshot) or [
            entry.name for file in weight_files(snapshot) for entry in read_header(file)
        ]
    except RetinueError:
        return "damaged, or of a type that is not served"
    return "ready" if any(_EXPERTS.search(name) for name in names) else "no experts"


def _id_of(folder_name: str) -> str:
    return folder_name.removeprefix("models--").replace("--", "/", 1)
