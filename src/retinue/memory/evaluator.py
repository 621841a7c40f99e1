"""The native library's small instructions as arrays of numbers, and how they are run.

The numbers and the layouts are those of `native/step.h`.
"""

import numpy as np

F32, BF16, F16, I64, BOOL = range(5)
COPY, NEG, ABS, EXP, LOG, SQRT, RSQRT, RECIPROCAL, SIGMOID, TANH = range(10)
SILU_OF, GELU_OF, GELU_TANH_OF, RELU_OF, SOFTPLUS, SIN, COS, NOT, CLAMP = range(10, 19)
ADD, SUB, MUL, DIV, POW, MAXIMUM, MINIMUM = range(32, 39)
EQUAL, UNEQUAL, LESS, AT_MOST, GREATER, AT_LEAST, AND, OR = range(39, 47)
WHERE = 64
SUM_OF, MEAN_OF, MAX_OF, MIN_OF, SOFTMAX, TOPK, ROWS, PICK, PUT = range(96, 105)
PRODUCT, ATTEND, EXPERTS = 128, 129, 130
OFF, WHOLE, BEGIN = range(3)  # what may happen to a layer, and what has:
IDLE, BEGUN, ATTENDED = range(3)

OPERAND = np.dtype([("at", "u8"), ("strides", "i8", 4), ("type", "i8")])
INSTRUCTION = np.dtype(
    [
        ("operation", "i4"),
        ("dimensions", "i4"),
        ("sizes", "i8", 4),
        ("scalars", "f8", 2),
        ("out", OPERAND),
        ("a", OPERAND),
        ("b", OPERAND),
        ("c", OPERAND),
    ]
)
SEQUENCES = np.dtype([("count", "i8"), ("places", "u8"), ("starts", "u8"), ("stops", "u8")])
ATTENTION = np.dtype(
    [
        ("type", "i4"),
        ("heads", "i4"),
        ("key_heads", "i4"),
        ("width", "i4"),
        ("value_width", "i4"),
        ("reserved", "i4"),
        ("scale", "f4"),
        ("cap", "f4"),
        ("sequences", "u8"),
        ("query", "u8"),
        ("key", "u8"),
        ("value", "u8"),
        ("sinks", "u8"),
        ("query_strides", "i8", 3),
        ("key_strides", "i8", 3),
        ("value_strides", "i8", 3),
        ("keys", "u8"),
        ("values", "u8"),
        ("out", "u8"),
    ]
)
LAYER = np.dtype(
    [
        ("shape", "i4", 6),
        ("tokens", "i4"),
        ("experts", "i4"),
        ("weights_type", "i4"),
        ("reserved", "i4"),
        ("enabled", "u8"),
        ("slots", "u8"),
        ("offsets", "u8"),
        ("slab", "u8"),
        ("slot_bytes", "i8"),
        ("hidden", "u8"),
        ("index", "u8"),
        ("weights", "u8"),
        ("out", "u8"),
        ("noted", "u8"),
        ("ran", "u8"),
        ("seconds", "u8"),
        ("state", "u8"),
        ("given", "u8"),
        ("rows", "u8"),
    ]
)
