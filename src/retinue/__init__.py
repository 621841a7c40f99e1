"""retinue runs Mixture-of-Experts language models in a fraction of their memory.

Public names are imported on first use, so that `import retinue` and the command line's `--help`
do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from retinue.config import Config
    from retinue.engine.llm import LLM
    from retinue.errors import (
        Cancelled,
        CheckpointError,
        DoesNotFit,
        DownloadError,
        NotFinite,
        Overloaded,
        ReadError,
        Refused,
        RetinueError,
        SelfCheckFailed,
        Unsupported,
        UsageError,
        WriteError,
    )
    from retinue.policy.presets import PRESETS
    from retinue.types import Deadline, Output, SamplingParams, Stats, TokenLogprob

_HOMES = {
    "LLM": "retinue.engine.llm",
    "Config": "retinue.config",
    "PRESETS": "retinue.policy.presets",
    **dict.fromkeys(
        ("Deadline", "Output", "SamplingParams", "Stats", "TokenLogprob"), "retinue.types"
    ),
    **dict.fromkeys(
        (
            "Cancelled",
            "CheckpointError",
            "DoesNotFit",
            "DownloadError",
            "NotFinite",
            "Overloaded",
            "ReadError",
            "Refused",
            "RetinueError",
            "SelfCheckFailed",
            "Unsupported",
            "UsageError",
            "WriteError",
        ),
        "retinue.errors",
    ),
}

__all__ = [
    "LLM",
    "PRESETS",
    "Cancelled",
    "CheckpointError",
    "Config",
    "Deadline",
    "DoesNotFit",
    "DownloadError",
    "NotFinite",
    "Output",
    "Overloaded",
    "ReadError",
    "Refused",
    "RetinueError",
    "SamplingParams",
    "SelfCheckFailed",
    "Stats",
    "TokenLogprob",
    "Unsupported",
    "UsageError",
    "WriteError",
]


def __getattr__(name: str) -> Any:
    if name == "LLM":
        importlib.import_module("retinue.memory.process").prepare()
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'retinue' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
