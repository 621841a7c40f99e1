"""Where profiles lie: a file that the user names, the cache folder, or the package, for the sample.

A profile is safe to delete: `retinue profile` makes it again.
"""

import json
from dataclasses import replace
from pathlib import Path
from shlex import quote

from retinue.errors import Unsupported, UsageError
from retinue.memory.home import PACK_PROFILE, called, sample_folder, sample_profile
from retinue.memory.machine import cache_folder, machine_name
from retinue.memory.whole_file import write_whole
from retinue.model.survey import fingerprint
from retinue.policy.predict.learned import Learned
from retinue.policy.profile import Profile, profile_from
from retinue.types import Facts


def default_profile(folder: Path) -> Path:
    """Where the profile of the checkpoint in `folder` is remembered."""
    return cache_folder() / f"profile-{fingerprint(folder)}.json"


def learnt_profile(folder: Path) -> Path:
    """Where what requests taught of the checkpoint in `folder` is remembered, beside that."""
    return cache_folder() / f"learnt-{fingerprint(folder)}.json"


def find_profile(folder: Path, facts: Facts, file: str | None) -> Profile:
    """The profile in `file`, or else what is remembered of the checkpoint or ships with it.

    Costs that were measured on another machine are left out.

    Raises Unsupported where there is none, UsageError for one that is damaged or another model's.
    """
    places = [Path(file).expanduser()] if file is not None else [default_profile(folder)]
    if file is None:
        places.append(folder / PACK_PROFILE)  # of a pack
    if file is None and folder.resolve() == sample_folder().resolve():
        places.append(sample_profile())
    for place in places:
        if file is not None or place.is_file():
            profile = read_profile(place)
            check_profile(profile, facts, place)
            elsewhere = profile.costs is not None and profile.costs.machine != machine_name()
            return replace(profile, costs=None) if elsewhere else profile
    raise Unsupported(
        f"there is no profile of `{facts.name}`, which this preset needs",
        hint=f"make one with `retinue profile {quote(called(folder))} --data FILE`, or give"
        " `--profile FILE`",
    )


def check_profile(profile: Profile, facts: Facts, file: Path) -> None:
    """Raise UsageError unless `profile` has the shape of the model."""
    hint = "give the profile of this model, or make it with `retinue profile`"
    check_shape(profile, facts, f"the profile `{file}`", hint)


def check_shape(known: Profile | Learned, facts: Facts, what: str, hint: str) -> None:
    """Raise UsageError unless `known`, which is called `what`, has the shape of the model."""
    mine = (facts.layers, facts.experts_per_layer, facts.top_k)
    theirs = (known.layers, known.experts, known.top_k)
    if mine != theirs:
        raise UsageError(
            f"{what} is of `{known.model}`: {theirs[0]} layers of {theirs[1]}"
            f" experts, top {theirs[2]}; `{facts.name}` has {mine[0]}, {mine[1]} and {mine[2]}",
            hint=hint,
        )


def read_profile(file: Path) -> Profile:
    """The profile in `file`. Raises UsageError where it cannot be read or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read the profile `{file}`: {error}", hint="make it with `retinue profile`"
        ) from error
    try:
        return profile_from(content)
    except UsageError as error:
        raise UsageError(f"`{file}`: {error}", hint=error.hint) from error


def write_profile(profile: Profile, file: Path) -> None:
    """Write `profile`, whole or not at all. Raises WriteError where that is not possible."""
    content = json.dumps(profile.as_dict(), ensure_ascii=False, separators=(",", ":"))
    write_whole(file, content.encode(), "the profile")
