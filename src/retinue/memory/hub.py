"""Downloads a repository of the hub: only the needed files, resumed where the last try ended.

huggingface_hub speaks with the hub and lays out the cache, so that every tool shares what is
there. Of its downloads only the weights are done here: its own start a file again that was cut.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retinue.config import format_size
from retinue.errors import DownloadError, Refused, Unsupported
from retinue.memory import hub_cache
from retinue.memory.checkpoint import read_index
from retinue.memory.hub_cache import Repository
from retinue.memory.hub_errors import AGAIN, explained, offline

Say = Callable[[str], None]

INDEX = "model.safetensors.index.json"
TEXT_FILES = frozenset(
    {
        *("config.json", "generation_config.json", INDEX),
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
        *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("chat_template.json", "chat_template.jinja", "tiktoken.model", "tekken.json"),
        *("retinue.json", "retinue-profile.json"),
    }
)
_ASK_S = 10.0
_SPARE_BYTES = 64 << 20
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as the hub lists it; `digest` names its blob, sha256 if `large`, git's sha1 if not."""

    name: str
    size: int
    digest: str
    large: bool


@dataclass(frozen=True, slots=True)
class Remote:
    """What the hub says of one commit of a repository."""

    repository: Repository
    commit: str
    files: dict[str, RemoteFile]

    @property
    def snapshot(self) -> Path:
        """Where its files lie, once they are here."""
        return self.repository.snapshot(self.commit)

    def blob(self, file: RemoteFile) -> Path:
        """Where the bytes of `file` lie, once they are here."""
        return self.repository.folder / "blobs" / file.digest

    def part(self, file: RemoteFile) -> Path:
        """Where the bytes of `file` lie until all are here."""
        return self.repository.folder / "blobs" / f"{file.digest}.retinue.incomplete"


def fetch(repository: Repository, say: Say) -> Path:
    """The folder with a complete checkpoint of `repository`, downloaded as far as it is not here.

    Asks the hub whether the revision has moved; what keeps that from working is only said, if the
    cache has a complete copy. Raises DownloadError, Refused for too small a disk, Unsupported for
    a repository without safetensors.
    """
    here = hub_cache.find(repository)
    if here is not None and (repository.fixed or is_offline()):
        return here
    try:
        return download(ask(repository), say)
    except (DownloadError, Refused) as error:
        copy = fall_back(repository, here, error)
        say(f"{error}; using the copy of {copy.name[:12]} that is here")
        return copy


def fall_back(repository: Repository, here: Path | None, error: Exception) -> Path:
    """A complete copy that is in the cache, although it may be old; or `error`."""
    copy = here or hub_cache.find_older(repository)
    if copy is None:
        raise error
    return copy


def is_offline() -> bool:
    """Whether the user forbids the network."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def ask(repository: Repository) -> Remote:
    """The commit and the files of `repository`: one request. Raises DownloadError."""
    if is_offline():
        raise offline(repository)
    from huggingface_hub import HfApi

    with explained(repository):
        info = HfApi().model_info(
            repository.name, revision=repository.revision, files_metadata=True, timeout=_ASK_S
        )
    files = {item.rfilename: _remote_file(item) for item in info.siblings or []}
    remote = Remote(repository, str(info.sha), files)
    _refuse_without_safetensors(remote)
    return remote


def _remote_file(item: Any) -> RemoteFile:
    digest = item.lfs.sha256 if item.lfs else item.blob_id
    return RemoteFile(item.rfilename, int(item.size or 0), str(digest), bool(item.lfs))


def _refuse_without_safetensors(remote: Remote) -> None:
    if "config.json" not in remote.files:
        raise Unsupported(
            f"`{remote.repository}` is no model of transformers: it has no config.json",
            hint="use the repository that its authors made for transformers",
        )
    if _weights_without_index(remote) or INDEX in remote.files:
        return
    kinds = sorted({Path(name).suffix for name in remote.files if Path(name).suffix in _OTHERS})
    raise Unsupported(
        f"`{remote.repository}` has no safetensors files" + (f", only {kinds}" if kinds else ""),
        hint="retinue reads safetensors: look for another repository of the same model",
    )


_OTHERS = (".bin", ".gguf", ".pth", ".pt", ".ckpt", ".onnx", ".h5", ".msgpack")


def _weights_without_index(remote: Remote) -> list[str]:
    if "model.safetensors" in remote.files:
        return ["model.safetensors"]
    at_root = [name for name in remote.files if name.endswith(".safetensors") and "/" not in name]
    # Some repositories hold the same weights a second time, in their authors' own layout.
    return sorted(name for name in at_root if not name.startswith("consolidated"))


def weight_names(remote: Remote, folder: Path) -> list[str]:
    """The weight files of the commit: those that the index in `folder` names, or all at its root.

    Raises DownloadError when the repository lacks one.
    """
    index = read_index(folder)
    names = _weights_without_index(remote) if index is None else sorted(set(index.values()))
    for name in names:
        if name not in remote.files:
            raise DownloadError(
                f"`{remote.repository}` lacks `{name}`, which its index names",
                hint="the repository is not complete: try another revision, ORG/NAME@REVISION",
            )
    return names


def download(remote: Remote, say: Say) -> Path:
    """Fetch what is missing of `remote`; returns its folder."""
    texts = sorted(name for name in remote.files if name in TEXT_FILES)
    try:
        with explained(remote.repository):
            for name in texts:
                if _lacks(remote, remote.files[name]):
                    _link(remote, name)
            names = weight_names(remote, remote.snapshot)
            wanted = [remote.files[name] for name in names]
            missing = [file for file in wanted if _lacks(remote, file)]
            if missing:
                _download_weights(remote, missing, say)
    except KeyboardInterrupt:
        say(f"stopped; {AGAIN}")
        raise
    hub_cache.remember(remote.repository, remote.commit)
    return remote.snapshot


def _lacks(remote: Remote, file: RemoteFile) -> bool:
    """Whether `file` has to come; one of another size, which no hub has given, is deleted."""
    here = remote.snapshot / file.name
    if not here.is_file():
        return True
    if _size_of(here) == file.size:
        return False
    here.resolve().unlink()
    here.unlink(missing_ok=True)
    return True


def _link(remote: Remote, name: str) -> None:
    """Let huggingface_hub put `name` into the snapshot, downloading it if its blob is not here."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import silent_tqdm

    silent: Any = silent_tqdm
    hf_hub_download(remote.repository.name, name, revision=remote.commit, tqdm_class=silent)


def _download_weights(remote: Remote, missing: list[RemoteFile], say: Say) -> None:
    from huggingface_hub.utils import tqdm

    new_bar: Any = tqdm
    absent = [file for file in missing if not remote.blob(file).exists()]
    total = sum(file.size for file in absent)
    arrived = sum(_size_of(remote.part(file)) for file in absent)
    _refuse_without_room(remote, total - arrived)
    if absent:
        resumed = f", {format_size(arrived)} of them are here" if arrived else ""
        say(f"downloading {format_size(total)} of `{remote.repository}`{resumed}")
    shown = {"unit": "B", "unit_scale": True, "disable": None}
    with new_bar(desc=remote.repository.name, total=total, **shown) as bar:
        for file in missing:
            _fetch_blob(remote, file, bar)
            _link(remote, file.name)


def _refuse_without_room(remote: Remote, needed: int) -> None:
    place = hub_cache.cache_root()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if needed and needed + _SPARE_BYTES > free:
        raise Refused(
            f"`{remote.repository}` needs {format_size(needed)} more on disk, and"
            f" {format_size(free)} are free at `{place}`",
            hint="`retinue list` shows what could go; HF_HOME names another place",
        )


def _fetch_blob(remote: Remote, file: RemoteFile, bar: Any) -> None:
    """The bytes of `file`, going on where the last try ended."""
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    blob, name = remote.blob(file), remote.repository.folder_name
    if file.size > constants.MAX_HTTP_DOWNLOAD_SIZE:
        return  # the hub gives these away by its own protocol only, which `_link` speaks
    lock = hub_cache.cache_root() / ".locks" / name / f"{file.digest}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not blob.exists():
            _fetch_part(remote, file, bar)
            remote.part(file).replace(blob)


def _fetch_part(remote: Remote, file: RemoteFile, bar: Any) -> None:
    from huggingface_hub.file_download import http_get

    part = remote.part(file)
    done = _size_of(part)
    if done > file.size:
        part.unlink()
        done = 0
    bar.update(done)
    url, headers = address(remote, file.name)
    with part.open("r+b" if done else "wb") as handle:
        handle.seek(done)
        http_get(
            url,
            handle,
            resume_size=done,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
            _tqdm_bar=bar,
        )
    if done and _digest(part, file) != file.digest:
        part.unlink()
        raise DownloadError(
            f"`{file.name}` was damaged on the way: its checksum is not the hub's",
            hint="run the same command again; this file starts anew",
        )


def address(remote: Remote, name: str) -> tuple[str, dict[str, str]]:
    """The URL of a file and the headers to ask for it with, the user's token among them."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="retinue")
    # Ranges count the bytes as they are stored.
    headers["Accept-Encoding"] = "identity"
    return hf_hub_url(remote.repository.name, name, revision=remote.commit), headers


def _digest(path: Path, file: RemoteFile) -> str:
    """The checksum that the hub names the blob by."""
    found = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % file.size)
    with path.open("rb") as handle:
        while piece := handle.read(_PIECE_BYTES):
            found.update(piece)
    return found.hexdigest()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
