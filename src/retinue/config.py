"""One frozen configuration and its one loader: defaults < file < environment < flags.

Sizes stay as the user wrote them (`6GiB`, `80%`) until `memory/budget.py` knows what they are
a share of. Each default exists once, here; the command line reads it from the fields.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from retinue.errors import Unsupported, UsageError
from retinue.types import Deadline, SamplingParams

ENVIRONMENT_PREFIX = "RETINUE_"
AS_IS = "as-is"
PRECISIONS = (AS_IS, "int8", "int4")
CLASSIFIERS = ("learned", "keywords", "none")
ORDERS = ("fcfs", "shortest", "emoe")
ALIKE = "alike"  # an order for presets that predict routes

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**n for n, letter in enumerate("KMGT", 1)}
_UNITS |= {f"{letter}iB": 1024**n for n, letter in enumerate("KMGT", 1)}
_UNITS_BY_CASE = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_size(text: str | int, *, whole: int | None = None) -> int:
    """Bytes in `text`: `512MiB`, `6GB`, a plain number, or a share such as `80%` of `whole`.

    Raises UsageError for anything else, and for a share where there is no whole.
    """
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"not a size: `{text}`", hint="write 0 or more")
        return text
    share = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if share and whole is not None:
        return int(float(share[1]) / 100 * whole)
    size = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS_BY_CASE.get(size[2].lower()) if size else None
    if size is None or factor is None:
        allowed = "a size such as 512MiB or 6GB" + (" or a share such as 80%" if whole else "")
        raise UsageError(f"not a size: `{text}`", hint=f"write {allowed}")
    return int(float(size[1]) * factor)


def format_size(count: float) -> str:
    """`count` bytes for people, in binary units: `5.9 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def _option(default: Any, help: str, metavar: str = "") -> Any:
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True)
class Config:
    """Every setting of the engine and of one request's sampling. The command line is made of it."""

    memory: str | int = _option(
        "80%", "upper bound for the peak resident memory of the process and its children", "SIZE"
    )
    gpu_memory: str | int | None = _option(
        None,
        "the same for the memory of the GPU; this version uses none, and refuses all but 0",
        "SIZE",
    )
    experts: str | int | None = _option(
        None, "upper bound for the resident routed experts: a share of all, or a size", "SHARE"
    )
    context: int | None = _option(None, "longest sequence to make room for, in tokens", "TOKENS")
    kv_tokens: int | None = _option(
        None, "tokens of all running requests together (default: the context)", "TOKENS"
    )
    batch: int | None = _option(None, "requests that run at once (default: 1, in Python 8)", "N")
    chunk: int = _option(2048, "tokens of prompts that one pass takes at most", "TOKENS")
    preset: str = _option(
        "auto",
        "a named combination of policies, see `retinue presets`, or one of your own,"
        " `./my_policy.py:PRESET`",
        "NAME",
    )
    fetch_above: float | None = _option(
        None,
        "in presets that replace missing experts: fetch those whose share of the token's routing"
        " weight is above W (1: never, 0: always, which is exact; default: the preset's own)",
        "W",
    )
    read_limit: str | int | None = _option(
        None, "read at most so much a second, as a slower disk would", "SIZE"
    )
    task: str | None = _option(
        None, "the kind of work that a request belongs to, for presets that know tasks", "NAME"
    )
    infer_task: str = _option(
        "learned", "finds the task where none is given: learned, keywords or none", "NAME"
    )
    profile: str | None = _option(
        None, "what `retinue profile` wrote; default: what it remembered of this model", "FILE"
    )
    period: int | None = _option(
        None,
        "prompts between two forecasts of presets that make them (default: the profile's)",
        "P",
    )
    forecaster: str | None = _option(
        None, "who forecasts for presets that ask (default: the preset's)", "NAME"
    )
    order: str | None = _option(
        None,
        "who goes first: emoe (by deadlines; without any, by arrival and shared experts), shortest,"
        " fcfs, or alike (by what the preset predicts; default: the preset's, else emoe)",
        "NAME",
    )
    first_token_deadline: float | None = _option(
        None, "of every request: its first token is due so long after its arrival", "SECONDS"
    )
    token_deadline: float | None = _option(
        None, "of every request: each token is due so long after the one before", "SECONDS"
    )
    deadlines: Mapping[str, Deadline] = field(default_factory=dict)  # by task, in a file only
    queue: int = _option(1024, "requests that wait at most; more are refused", "N")
    precision: str = _option(AS_IS, "of weights in memory: as-is, int8 or int4", "NAME")
    threads: int | None = _option(None, "cores that may be used", "N")
    self_check: bool = _option(True, "compare with the reference at load")
    eager: bool = _option(False, "run each decoding step as transformers does, unprepared")
    max_new_tokens: int = _option(256, "longest answer, in tokens", "N")
    temperature: float | None = _option(
        None, "0 is greedy (default: 0; in `serve` 1, as in OpenAI's interface)", "T"
    )
    top_p: float = _option(1.0, "sample from the most likely tokens of this total share", "P")
    top_k: int = _option(0, "sample from this many of the most likely tokens; 0: all", "K")
    min_p: float = _option(0.0, "sample from tokens this likely, relative to the likeliest", "P")
    seed: int | None = _option(None, "makes a sampled answer reproducible", "N")
    stop: tuple[str, ...] = _option((), "a text that ends the answer; may be repeated", "TEXT")
    learn: bool | None = _option(
        None, "keep what requests teach of each task, for later starts (default: in `serve`)"
    )
    host: str = _option("127.0.0.1", "address to listen at", "ADDRESS")
    port: int = _option(8000, "port to listen at; 0: any that is free", "N")
    api_key: str | None = _option(
        None, "a key that clients must send; without it any key passes", "KEY"
    )
    served_name: str | None = _option(None, "another name for the model", "NAME")
    time_limit: float = _option(600.0, "longest time for a request, in seconds", "S")
    grace: float = _option(30.0, "time for running requests when the server stops", "S")
    choices: int = _option(16, "answers that one request may ask for", "N")
    max_prompt: int | None = _option(None, "longest prompt (default: the context)", "TOKENS")
    max_body: str | int = _option("1MiB", "longest body of a request", "SIZE")
    keys: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # key -> {task: NAME}
    routes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # prefix -> {task: NAME}

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UsageError(
                f"unknown precision: `{self.precision}`",
                hint=f"this version serves: {', '.join(PRECISIONS)}",
            )
        self._check_gpu()
        if self.infer_task not in CLASSIFIERS:
            raise UsageError(
                f"infer_task is unknown: `{self.infer_task}`",
                hint=f"this version knows: {', '.join(CLASSIFIERS)}",
            )
        orders = (*ORDERS, ALIKE)
        if self.order is not None and self.order not in orders:
            raise UsageError(f"unknown order: `{self.order}`", hint=f"one of {', '.join(orders)}")
        for name in (
            *("context", "threads", "kv_tokens", "batch", "chunk"),
            *("queue", "choices", "max_prompt", "period"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is out of range: `{value}`", hint="1 or more")
        share = self.fetch_above
        if share is not None and not 0 <= share <= 1:
            raise UsageError(f"fetch_above is out of range: `{share}`", hint="from 0 to 1")
        if self.read_bytes_per_s is not None and self.read_bytes_per_s < 1:
            raise UsageError(
                f"read_limit is out of range: `{self.read_limit}`", hint="such as 300MB"
            )
        for name in ("grace", "time_limit"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UsageError(f"{name} is out of range: `{value}`", hint="a number, 0 or more")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port is out of range: `{self.port}`", hint="from 0 to 65535")
        if parse_size(self.max_body) < 1:
            raise UsageError(f"max_body is out of range: `{self.max_body}`", hint="1 byte or more")
        self.sampling()
        self.deadline(None)

    def _check_gpu(self) -> None:
        if self.gpu_memory is not None and parse_size(self.gpu_memory, whole=100) > 0:
            raise Unsupported(
                f"this version uses no GPU: `{self.gpu_memory}` of its memory",
                hint="leave `--gpu-memory` out",
            )

    def deadline(self, task: str | None) -> Deadline | None:
        """What a request of `task` is promised: its own line of `deadlines`, else that of all.

        None: nothing. Raises UsageError for seconds that are out of range.
        """
        if task is not None and task in self.deadlines:
            return self.deadlines[task]
        if self.first_token_deadline is None and self.token_deadline is None:
            return None
        return Deadline(self.first_token_deadline, self.token_deadline)

    @property
    def read_bytes_per_s(self) -> int | None:
        """What `read_limit` says."""
        return None if self.read_limit is None else parse_size(self.read_limit)

    def room(self) -> dict[str, Any]:
        """What `memory.budget.split` is asked for under this configuration."""
        names = ("memory", "context", "experts", "kv_tokens", "chunk")
        return {name: getattr(self, name) for name in names} | {"batch": self.batch or 1}

    def sampling(self) -> SamplingParams:
        """The sampling parameters of a request under this configuration."""
        names = {f.name for f in fields(self)} & {f.name for f in fields(SamplingParams)}
        values = {name: getattr(self, name) for name in names}
        return SamplingParams(**values | {"temperature": self.temperature or 0.0})


# All that a variable can hold; not the port: Kubernetes sets RETINUE_PORT itself, to an address.
ENVIRONMENT_KEYS = tuple(
    item.name for item in fields(Config) if item.name not in ("port", "deadlines", "keys", "routes")
)
DEFAULT_CONTEXT = 4096
INSENSITIVE_ABOVE = 0.97  # agreement under random routing, see docs/LOG.md
DEFAULT_BATCH = 8  # of the Python interface, whose `generate` takes many prompts


def load_config(
    flags: Mapping[str, Any],
    file: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Merge defaults < `file` (YAML) < `RETINUE_*` < `flags` (None: not given) into a Config.

    An empty value in a file is not given either. Raises UsageError for unknown keys and for
    values of the wrong type or range.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = _read_file(Path(file)) if file is not None else {}
    for key in ENVIRONMENT_KEYS:
        if (text := environ.get(ENVIRONMENT_PREFIX + key.upper())) is not None:
            values[key] = text
    values |= {key: value for key, value in flags.items() if value is not None}
    known = {f.name: f.type for f in fields(Config)}
    for key in values:
        if key not in known:
            raise UsageError(f"unknown setting: `{key}`", hint=f"known: {', '.join(known)}")
    given = {key: value for key, value in values.items() if value is not None}
    return Config(**{key: _coerce(key, known[key], value) for key, value in given.items()})


def _read_file(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(
            f"cannot read the configuration `{path}`: {error}", hint="write YAML, in UTF-8"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"not a mapping: `{path}`", hint="write one `key: value` a line")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


def _coerce(key: str, kind: object, value: Any) -> Any:
    """Turn a text from a file or the environment into the field's own type."""
    try:
        if kind in (bool, bool | None):
            return _boolean(value)
        if isinstance(value, bool):
            raise ValueError(value)
        if kind in (int, int | None):
            return _integer(value)
        if kind in (float, float | None):
            return float(value)
        if key == "deadlines":
            return {str(task): _deadline(given) for task, given in value.items()}
        if key in ("keys", "routes"):
            return _tasks(value)
        if key == "stop":
            return (value,) if isinstance(value, str) else tuple(str(item) for item in value)
        if isinstance(value, (list, dict)):
            raise TypeError(value)
        sized = isinstance(value, int) and kind in (str | int, str | int | None)
        return value if sized else str(value)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{key} has the wrong type: `{value}`", hint=_FORMS.get(kind, _FORMS[str])
        ) from error


_FORMS: dict[object, str] = {
    bool: "write yes or no",
    bool | None: "write yes or no",
    int: "write a whole number",
    int | None: "write a whole number",
    float: "write a number",
    float | None: "write a number",
    str | int: "write a size such as 6GiB",
    str | int | None: "write a size such as 6GiB",
    str: "write a text",
    tuple[str, ...]: "write a text, or a list of texts",
    Mapping[str, Deadline]: "write `TASK: {first_token_s: 2, between_tokens_s: 0.5}`",
    Mapping[str, Mapping[str, str]]: "write `NAME: {task: TASK}`, or `NAME: {}`",
}


def _deadline(given: Any) -> Deadline:
    """A deadline from a file: `{first_token_s: 2, between_tokens_s: 0.5}`."""
    if isinstance(given, Deadline):
        return given
    return Deadline(**{str(key): float(value) for key, value in given.items()})


def _tasks(value: Any) -> dict[str, dict[str, str]]:
    """`{name: {task: NAME}}`; what has no task is written `{name: {}}`."""
    found = {str(name): dict(fields or {}) for name, fields in dict(value).items()}
    for given in found.values():
        if given.keys() - {"task"} or not all(isinstance(task, str) for task in given.values()):
            raise ValueError(value)
    return found


def _integer(value: Any) -> int:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)  # int() would cut it off
    return int(value)


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ValueError(value)
