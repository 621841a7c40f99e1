"""From what the user calls a model to the folder that holds it."""

from importlib.resources import files
from pathlib import Path

from retinue.errors import CheckpointError, Unsupported

SAMPLE = "sample"


def locate(model: str | Path) -> Path:
    """The checkpoint folder of `model`: a path, or `sample`, the model that ships along."""
    if str(model) == SAMPLE and not Path(model).is_dir():
        return sample_folder()
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if str(model).count("/") == 1 and not str(model).startswith((".", "/", "~")):
        raise Unsupported(
            f"no such folder: `{model}`",
            hint="repository ids cannot be downloaded yet; download the checkpoint and give its"
            " folder",
        )
    raise CheckpointError(
        f"no such folder: `{model}`",
        hint="give a local checkpoint folder, or `sample` for the model that ships along",
    )


def sample_folder() -> Path:
    """The small trained model that is part of the package."""
    return Path(str(files("retinue"))) / "data" / "sample"


def sample_tasks() -> Path:
    """Texts of eight tasks for the sample model: JSON lines."""
    return Path(str(files("retinue"))) / "data" / "sample-tasks.jsonl"


def sample_profile() -> Path:
    """What `retinue profile sample` learnt from these texts."""
    return Path(str(files("retinue"))) / "data" / "sample-profile.json"
