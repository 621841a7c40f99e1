"""The kernels of `native/`, loaded with ctypes: the C interface with Python's shapes and types.

Knows tensors and matrices, no model and no policy. Arguments are checked here, since what the
library is given wrong would be read beyond its end; a mistake is a `ValueError`, for only our own
code calls this. The library has scratch and threads of its own: one caller at a time, except for
`encode`, `decode` and `unnest`. `native/retinue.h` says how a matrix lies in memory.
"""

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

ABI = 5
LIBRARY = Path(__file__).resolve().parents[1] / "libretinue.so"
LANES, GROUP = 16, 32
SWITCH = "RETINUE_NATIVE"

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ERRORS = {1: "refused its arguments", 2: "found no memory or threads"}


class Format(IntEnum):
    """How the numbers of a matrix are stored."""

    BF16 = 0
    INT8 = 1
    INT4 = 2


class Activation(IntEnum):
    """What an expert applies to its gate; `GELU` is the one with the error function."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


class Matrix(ctypes.Structure):
    """`rows` by `columns` numbers at given addresses; `held` is what keeps the memory alive."""

    held: object = None

    _fields_ = [
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("format", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    ]


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("format", "type", "activation")]
    _fields_ += [(name, ctypes.c_int32) for name in ("hidden", "inner", "k")]


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """What all experts of a call have in common; `k` is the number of experts a token."""

    format: Format
    dtype: torch.dtype
    activation: Activation
    hidden: int
    inner: int
    k: int
    _c: _Shape = field(init=False, repr=False, compare=False)

    @property
    def numbers(self) -> tuple[int, ...]:
        """As the library has it: format, type, activation, hidden, inner, k."""
        return tuple(getattr(self._c, item[0]) for item in _Shape._fields_)

    def __post_init__(self) -> None:
        numbers = (self.hidden, self.inner, self.k)
        if min(numbers) < 1:
            raise ValueError(f"{numbers = }: all at least 1")
        made = _Shape(self.format, _type(self.dtype), self.activation, *numbers)
        object.__setattr__(self, "_c", made)


def codes_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a matrix's codes, those of whole tiles."""
    if format is Format.BF16:
        return rows * columns * 2
    numbers = -(-rows // LANES) * LANES * (-(-columns // GROUP) * GROUP)
    return numbers // 2 if format is Format.INT4 else numbers


def scales_bytes(format: Format, rows: int, columns: int) -> int:
    """Bytes of a matrix's scales; none for bfloat16."""
    if format is Format.BF16:
        return 0
    return -(-rows // LANES) * LANES * -(-columns // GROUP) * 2


def matrix(
    format: Format, rows: int, columns: int, codes: torch.Tensor, scales: torch.Tensor | None = None
) -> Matrix:
    """The matrix that lies in these tensors, and keeps them; their bytes count, not their types."""
    for tensor, size in (
        (codes, codes_bytes(format, rows, columns)),
        (scales, scales_bytes(format, rows, columns)),
    ):
        if size and (tensor is None or not tensor.is_contiguous() or tensor.nbytes != size):
            given = None if tensor is None else tensor.nbytes
            raise ValueError(f"{given = } bytes: {size} are needed, contiguous")
    address = scales.data_ptr() if scales is not None else None
    made = Matrix(codes.data_ptr(), address, format, rows, columns, 0)
    made.held = codes, scales
    return made


class Native:
    """The loaded library; `library()` has the one there is."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` where the file cannot be loaded or is of another interface."""
        self._c = ctypes.CDLL(str(path))
        for name, types in _ARGUMENTS.items():
            function = getattr(self._c, name)
            function.argtypes, function.restype = types, ctypes.c_int32
        if (abi := self._c.retinue_abi()) != ABI:
            raise OSError(f"{path} has interface {abi}, not {ABI}: build it again")
        self._c.retinue_features.restype = ctypes.c_char_p

    @property
    def features(self) -> str:
        """The instructions in use: `avx512-amx`, `avx512-vnni`, `avx2` or `portable`."""
        return str(self._c.retinue_features().decode())

    def set_threads(self, threads: int, spin_us: int = 50) -> None:
        """Compute with this many threads, the caller among them; idle ones spin, then sleep."""
        self.end_experts()
        _check(self._c.retinue_threads(threads, spin_us))

    def linear(
        self, weight: Matrix, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`x` [..., columns] times the transposed matrix, plus `bias` [rows]; of x's type."""
        rows, columns = weight.rows, weight.columns
        if x.shape[-1] != columns or (x.dim() != 2 and not x.is_contiguous()):
            raise ValueError(f"{x.shape = }: contiguous with {columns} columns is needed")
        stride = x.stride(0) if x.dim() == 2 and x.shape[0] > 1 else columns
        if x.stride(-1) != 1 or stride < columns:
            raise ValueError(f"{x.stride() = }: neighbouring columns must be neighbours")
        if bias is not None and (
            bias.dtype != x.dtype or bias.shape != (rows,) or not bias.is_contiguous()
        ):
            raise ValueError(f"{bias.shape = }, {bias.dtype = }: [{rows}] of {x.dtype} is needed")
        out = x.new_empty((*x.shape[:-1], rows))
        tokens = x.numel() // columns
        address = None if bias is None else bias.data_ptr()
        _check(
            self._c.retinue_linear(
                weight, x.data_ptr(), stride, _type(x.dtype), tokens, address, out.data_ptr()
            )
        )
        return out

    def experts(
        self,
        shape: ExpertsShape,
        parts: torch.Tensor,
        groups: tuple[torch.Tensor, torch.Tensor],
        x: torch.Tensor,
        rows: torch.Tensor,
    ) -> None:
        """Write `rows` [tokens * k, hidden], fp32, of the pairs of some experts.

        `parts` [count, 6] are addresses of codes and scales of gate, up and down; `groups` are
        `starts` [count + 1] and `pairs`, all int64: expert e has `pairs[starts[e]:starts[e + 1]]`,
        each one token * k + rank. `x` is [tokens, hidden] of the shape's type.
        """
        starts, pairs = groups
        count, tokens = parts.shape[0], x.shape[0]
        _tensor("parts", parts, torch.int64, (count, 6))
        _tensor("starts", starts, torch.int64, (count + 1,))
        _tensor("pairs", pairs, torch.int64, pairs.shape[:1])
        _tensor("x", x, shape.dtype, (tokens, shape.hidden))
        _tensor("rows", rows, torch.float32, (tokens * shape.k, shape.hidden))
        places = [tensor.data_ptr() for tensor in (parts, starts, pairs, x, rows)]
        _check(self._c.retinue_experts(shape._c, count, *places))

    def end_experts(self) -> None:
        """Compute what is left of what a layer of a step has begun, if anything was."""
        self._c.retinue_end_experts()  # which refuses where nothing was

    def weighted_sum(
        self, rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """Sum `rows` [tokens * k, hidden] by `weights` [tokens, k], both fp32, in router order."""
        tokens, k = weights.shape
        hidden = rows.shape[-1]
        _tensor("rows", rows, torch.float32, (tokens * k, hidden))
        _tensor("weights", weights, torch.float32, (tokens, k))
        out = torch.empty((tokens, hidden), dtype=dtype)
        _check(
            self._c.retinue_sum(
                rows.data_ptr(), weights.data_ptr(), tokens, k, hidden, _type(dtype), out.data_ptr()
            )
        )
        return out

    def evaluate(self, instructions: int, count: int) -> int:
        """Run the instructions at that address, which `memory/evaluator.py` describes.

        Returns how many ran: fewer than `count` before experts that are not to be run there, or
        were only begun.
        """
        done = ctypes.c_int64()
        _check(self._c.retinue_evaluate(instructions, count, ctypes.byref(done)))
        return done.value

    def encode(self, x: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales, as bytes, of x [rows, columns] whose columns are neighbours."""
        rows, columns = x.shape
        if x.stride(1) != 1 or format is Format.BF16:
            raise ValueError(f"{x.stride() = }, {format = }: rows of numbers to INT8 or INT4")
        codes = torch.empty(codes_bytes(format, rows, columns), dtype=torch.uint8)
        scales = torch.empty(scales_bytes(format, rows, columns), dtype=torch.uint8)
        _check(
            self._c.retinue_encode(
                x.data_ptr(),
                x.stride(0),
                _type(x.dtype),
                format,
                rows,
                columns,
                codes.data_ptr(),
                scales.data_ptr(),
            )
        )
        return codes, scales

    def decode(self, encoded: Matrix, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers [rows, columns] that an INT8 or INT4 matrix stands for."""
        out = torch.empty((encoded.rows, encoded.columns), dtype=dtype)
        _check(self._c.retinue_decode(encoded, _type(dtype), out.data_ptr()))
        return out

    def unnest(
        self, scales: torch.Tensor, planes: Sequence[torch.Tensor], bits: int, out: torch.Tensor
    ) -> None:
        """Write `out` [groups * 32], contiguous, from as many planes as `bits` take.

        `scales` are bfloat16 [groups], planes bytes, as `memory/nested.py` has them.
        """
        groups = len(scales)
        _tensor("scales", scales, torch.bfloat16, (groups,))
        _tensor("out", out, out.dtype, (groups * GROUP,))
        widths = (2, 2, 4)[: {2: 1, 4: 2, 8: 3}[bits]]
        for plane, width in zip(planes, widths, strict=True):
            _tensor("plane", plane, torch.uint8, (groups * GROUP * width // 8,))
        addresses = [plane.data_ptr() for plane in planes] + [None, None]
        _check(
            self._c.retinue_unnest(
                scales.data_ptr(), *addresses[:3], bits, groups, _type(out.dtype), out.data_ptr()
            )
        )


@cache
def library() -> Native | None:
    """The kernels, or None where `why_not` has the reason."""
    return _load()[0]


def why_not() -> str | None:
    """Why there are no kernels, for people; None where there are."""
    return _load()[1]


@cache
def _load() -> tuple[Native | None, str | None]:
    if os.environ.get(SWITCH, "1") == "0":
        return None, f"{SWITCH}=0 turns them off"
    if not LIBRARY.exists():
        return None, f"they were not built: {_build_error()}"
    try:
        return Native(LIBRARY), None
    except (OSError, AttributeError) as error:
        return None, str(error)


def _build_error() -> str:
    """The last line of what the installation's compiler said."""
    try:
        text = LIBRARY.with_suffix(".txt").read_text(encoding="utf-8").strip()
    except OSError:
        return "the installation had no C++ compiler"
    return text.splitlines()[-1] if text else "the C++ compiler failed"


def _type(dtype: torch.dtype) -> int:
    number = _TYPES.get(dtype)
    if number is None:
        raise ValueError(f"{dtype = }: float32, bfloat16 or float16 is needed")
    return number


def _tensor(name: str, given: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if given.dtype != dtype or given.shape != shape or not given.is_contiguous():
        text = f"{list(given.shape)} of {given.dtype}"
        raise ValueError(f"{name} is {text}: contiguous {list(shape)} of {dtype} is needed")


def _check(error: int) -> None:
    if error:
        raise RuntimeError(f"the native library {_ERRORS.get(error, f'failed with {error}')}")


_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_ARGUMENTS: dict[str, list[type]] = {
    "retinue_abi": [],
    "retinue_features": [],
    "retinue_threads": [_I, _I],
    "retinue_linear": [ctypes.POINTER(Matrix), _P, _L, _I, _L, _P, _P],
    "retinue_experts": [ctypes.POINTER(_Shape), _I, _P, _P, _P, _P, _P],
    "retinue_end_experts": [],
    "retinue_sum": [_P, _P, _L, _I, _I, _I, _P],
    "retinue_encode": [_P, _L, _I, _I, _I, _I, _P, _P],
    "retinue_evaluate": [_P, _L, ctypes.POINTER(_L)],
    "retinue_decode": [ctypes.POINTER(Matrix), _I, _P],
    "retinue_unnest": [_P, _P, _P, _P, _I, _L, _I, _P],
}
