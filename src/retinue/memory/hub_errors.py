"""What went wrong between the hub and the disk, in words that say what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from retinue.errors import DownloadError, RetinueError, UsageError
from retinue.memory.hub_cache import Repository, cache_root

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
AGAIN = "what has arrived is kept: run the same command again to go on"


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn what huggingface_hub, its network library and the disk raise into a DownloadError."""
    try:
        yield
    except RetinueError:
        raise
    except Exception as error:
        told = _explain(error, repository)
        if told is None:
            raise
        raise told from error


def _explain(error: BaseException, repository: Repository) -> RetinueError | None:
    """The error for the user; None for what must be a defect of ours."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(repository)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"not a repository id: `{repository}`", hint="write ORG/NAME")
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, repository)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repository)
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2"):
        return _unreachable(error, repository)
    if isinstance(error, OSError):
        return _disk(error, repository)
    return None


def offline(repository: Repository) -> DownloadError:
    """Nothing complete is in the cache, and the network must not be used."""
    return DownloadError(
        f"no such folder: `{repository}`, no complete copy in the cache, and HF_HUB_OFFLINE is set",
        hint=f"unset it to download; the cache is `{cache_root()}`, `retinue list` shows it",
    )


def _refusal(error: BaseException, repository: Repository) -> DownloadError:
    """The server answered, with an error."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository.name}"
    response: Any = getattr(error, "response", None)
    status = response.status_code if response is not None else 0
    reason = str(response.headers.get("X-Error-Message", "")) if response is not None else ""
    if status == 401 and "credentials" in reason:
        return DownloadError(
            "the hub does not accept the token", hint="put a new one into HF_TOKEN, or unset it"
        )
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"`{repository.name}` is gated",
            hint=f"accept its licence at {page}, and set HF_TOKEN to a token of that account",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DownloadError(
            f"`{repository.name}` has no revision `{repository.revision}`",
            hint=f"branches and tags are listed at {page}/tree/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return DownloadError(
            f"no such folder here, and no such repository: `{repository.name}`",
            hint=f"check the spelling at {page}; a private one needs HF_TOKEN",
        )
    if status == 403:
        return DownloadError(
            f"access to `{repository.name}` is forbidden",
            hint=f"look at {page}, and whether the token in HF_TOKEN may read it",
        )
    if status == 429:
        return DownloadError(
            "the hub refuses more requests for now", hint="wait a minute; HF_TOKEN allows more"
        )
    return DownloadError(f"the hub answered {status} for `{repository}`", hint=f"later: {AGAIN}")


def _unreachable(error: BaseException, repository: Repository) -> DownloadError:
    from huggingface_hub import constants

    what = str(error) or type(error).__name__
    return DownloadError(
        f"cannot get `{repository}` from {constants.ENDPOINT}: {what}",
        hint=f"a folder of that name is not here either; check the network, and HF_ENDPOINT if it"
        f" is set; {AGAIN}",
    )


def _disk(error: OSError, repository: Repository) -> DownloadError:
    place = cache_root()
    if error.errno in _FULL:
        return DownloadError(
            f"the disk is full: `{place}`",
            hint=f"`retinue list` shows what could go, HF_HOME names another place; {AGAIN}",
        )
    if error.errno in _FORBIDDEN:
        return DownloadError(
            f"cannot write to the cache `{place}`: {error.strerror}",
            hint="set HF_HOME to a folder that is yours",
        )
    return DownloadError(f"cannot download `{repository}`: {error}", hint=AGAIN)
