// Runs the instructions of a step. Each reads chunks of its inputs as fp32, computes, and writes.
#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "numbers.h"

namespace {

constexpr int64_t CHUNK = 512;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

template <class F>
RETINUE_INLINE void map(float* out, const float* a, int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i]);
}

template <class F>
RETINUE_INLINE void map(float* out, const float* a, const float* b, int64_t n, F f) {
    for (int64_t i = 0; i < n; ++i) out[i] = f(a[i], b[i]);
}

RETINUE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// One input.
RETINUE_INLINE bool unary(const retinue_instruction& i, float* out, const float* a, int64_t n) {
    const float low = static_cast<float>(i.scalars[0]), high = static_cast<float>(i.scalars[1]);
    switch (i.operation) {
        case RETINUE_COPY: map(out, a, n, [](float x) { return x; }); break;
        case RETINUE_NEG: map(out, a, n, [](float x) { return -x; }); break;
        case RETINUE_ABS: map(out, a, n, [](float x) { return std::fabs(x); }); break;
        case RETINUE_EXP: map(out, a, n, exponential); break;
        case RETINUE_LOG: map(out, a, n, [](float x) { return std::log(x); }); break;
        case RETINUE_SQRT: map(out, a, n, [](float x) { return std::sqrt(x); }); break;
        case RETINUE_RSQRT: map(out, a, n, [](float x) { return 1.0f / std::sqrt(x); }); break;
        case RETINUE_RECIPROCAL: map(out, a, n, [](float x) { return 1.0f / x; }); break;
        case RETINUE_SIGMOID: map(out, a, n, sigmoid); break;
        case RETINUE_TANH: map(out, a, n, [](float x) { return std::tanh(x); }); break;
        case RETINUE_SILU_OF:
            map(out, a, n, [](float x) { return x / (1.0f + exponential(-x)); });
            break;
        case RETINUE_GELU_OF:
            map(out, a, n, [](float x) { return x * 0.5f * (1.0f + std::erf(x * 0.70710678f)); });
            break;
        case RETINUE_GELU_TANH_OF:
            map(out, a, n, [](float x) {
                const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
                return 0.5f * x * (1.0f + std::tanh(inner));
            });
            break;
        case RETINUE_RELU_OF: map(out, a, n, [](float x) { return x < 0 ? 0.0f : x; }); break;
        case RETINUE_SOFTPLUS:
            map(out, a, n, [](float x) { return x > 20 ? x : std::log1p(std::exp(x)); });
            break;
        case RETINUE_SIN: map(out, a, n, [](float x) { return std::sin(x); }); break;
        case RETINUE_COS: map(out, a, n, [](float x) { return std::cos(x); }); break;
        case RETINUE_NOT: map(out, a, n, [](float x) { return x == 0 ? 1.0f : 0.0f; }); break;
        case RETINUE_CLAMP:
            map(out, a, n, [=](float x) { return x < low ? low : x > high ? high : x; });
            break;
        default: return false;
    }
    return true;
}

// Two inputs.
RETINUE_INLINE bool binary(const retinue_instruction& i, float* out, const float* a, const float* b,
                           int64_t n) {
    const float alpha = static_cast<float>(i.scalars[0]);
    switch (i.operation) {
        case RETINUE_ADD:
            if (alpha == 1) map(out, a, b, n, [](float x, float y) { return x + y; });
            else map(out, a, b, n, [=](float x, float y) { return x + alpha * y; });
            break;
        case RETINUE_SUB:
            if (alpha == 1) map(out, a, b, n, [](float x, float y) { return x - y; });
            else map(out, a, b, n, [=](float x, float y) { return x - alpha * y; });
            break;
        case RETINUE_MUL: map(out, a, b, n, [](float x, float y) { return x * y; }); break;
        case RETINUE_DIV: map(out, a, b, n, [](float x, float y) { return x / y; }); break;
        case RETINUE_POW: map(out, a, b, n, [](float x, float y) { return std::pow(x, y); }); break;
        case RETINUE_MAXIMUM:
            map(out, a, b, n, [](float x, float y) { return x > y ? x : y; });
            break;
        case RETINUE_MINIMUM:
            map(out, a, b, n, [](float x, float y) { return x < y ? x : y; });
            break;
        case RETINUE_EQUAL:
            map(out, a, b, n, [](float x, float y) { return float(x == y); });
            break;
        case RETINUE_UNEQUAL:
            map(out, a, b, n, [](float x, float y) { return float(x != y); });
            break;
        case RETINUE_LESS: map(out, a, b, n, [](float x, float y) { return float(x < y); }); break;
        case RETINUE_AT_MOST:
            map(out, a, b, n, [](float x, float y) { return float(x <= y); });
            break;
        case RETINUE_GREATER:
            map(out, a, b, n, [](float x, float y) { return float(x > y); });
            break;
        case RETINUE_AT_LEAST:
            map(out, a, b, n, [](float x, float y) { return float(x >= y); });
            break;
        case RETINUE_AND:
            map(out, a, b, n, [](float x, float y) { return float(x != 0 && y != 0); });
            break;
        case RETINUE_OR:
            map(out, a, b, n, [](float x, float y) { return float(x != 0 || y != 0); });
            break;
        default: return false;
    }
    return true;
}

// Calls f(index) with every index of the first `dimensions` dimensions.
template <class F>
RETINUE_INLINE bool each(const int64_t* sizes, int dimensions, F f) {
    int64_t at[4] = {0, 0, 0, 0};
    for (int d = 0; d < dimensions; ++d)
        if (sizes[d] == 0) return true;
    for (;;) {
        if (!f(at)) return false;
        int d = dimensions - 1;
        while (d >= 0 && ++at[d] == sizes[d]) at[d--] = 0;
        if (d < 0) return true;
    }
}

RETINUE_INLINE int64_t place(const retinue_operand& o, const int64_t* at, int dimensions) {
    int64_t offset = 0;
    for (int d = 0; d < dimensions; ++d) offset += at[d] * o.strides[d];
    return offset;
}

RETINUE_INLINE bool pointwise(const retinue_instruction& i) {
    const int outer = i.dimensions - 1;
    const int64_t length = i.sizes[outer];
    alignas(64) float a[CHUNK], b[CHUNK], c[CHUNK], out[CHUNK];
    return each(i.sizes, outer, [&](const int64_t* at) {
        for (int64_t first = 0; first < length; first += CHUNK) {
            const int64_t n = std::min(CHUNK, length - first);
            auto read = [&](const retinue_operand& o, float* to) {
                load(o, place(o, at, outer) + first * o.strides[outer], o.strides[outer], n, to);
            };
            read(i.a, a);
            if (i.operation >= RETINUE_ADD) read(i.b, b);
            bool known = true;
            if (i.operation == RETINUE_WHERE) {
                read(i.c, c);
                for (int64_t k = 0; k < n; ++k) out[k] = a[k] != 0 ? b[k] : c[k];
            } else {
                known = i.operation >= RETINUE_ADD ? binary(i, out, a, b, n) : unary(i, out, a, n);
            }
            if (!known) return false;
            store(i.out, place(i.out, at, outer) + first * i.out.strides[outer],
                  i.out.strides[outer], n, out);
        }
        return true;
    });
}

RETINUE_INLINE bool reduce(const retinue_instruction& i) {
    const int outer = i.dimensions - 1;
    const int64_t length = i.sizes[outer];
    alignas(64) float a[CHUNK];
    return each(i.sizes, outer, [&](const int64_t* at) {
        const bool smallest = i.operation == RETINUE_MIN_OF;
        const bool largest = i.operation == RETINUE_MAX_OF;
        float total = largest ? -INFINITE : smallest ? INFINITE : 0.0f;
        for (int64_t first = 0; first < length; first += CHUNK) {
            const int64_t n = std::min(CHUNK, length - first);
            load(i.a, place(i.a, at, outer) + first * i.a.strides[outer], i.a.strides[outer], n, a);
            if (largest)
                for (int64_t k = 0; k < n; ++k) total = a[k] > total ? a[k] : total;
            else if (smallest)
                for (int64_t k = 0; k < n; ++k) total = a[k] < total ? a[k] : total;
            else
                total += sum_of(a, n);
        }
        if (i.operation == RETINUE_MEAN_OF) total /= static_cast<float>(length);
        store(i.out, place(i.out, at, outer), 1, 1, &total);
        return true;
    });
}

// A whole row at a time.
struct Rows {
    const retinue_instruction& i;
    int outer;
    std::vector<float> a;

    explicit Rows(const retinue_instruction& from)
        : i(from), outer(from.dimensions - 1), a(static_cast<size_t>(from.sizes[outer])) {}
    RETINUE_INLINE const float* read(const int64_t* at) {
        load(i.a, place(i.a, at, outer), i.a.strides[outer], i.sizes[outer], a.data());
        return a.data();
    }
};

RETINUE_INLINE bool softmax(const retinue_instruction& i) {
    Rows rows(i);
    const int64_t n = i.sizes[rows.outer];
    return each(i.sizes, rows.outer, [&](const int64_t* at) {
        rows.read(at);
        float* a = rows.a.data();
        const float top = *std::max_element(a, a + n);
        for (int64_t k = 0; k < n; ++k) a[k] = exponential(a[k] - top);
        const float total = sum_of(a, n);
        for (int64_t k = 0; k < n; ++k) a[k] /= total;
        store(i.out, place(i.out, at, rows.outer), i.out.strides[rows.outer], n, a);
        return true;
    });
}

// The same algorithms as in torch, so that equal numbers are chosen in the same order.
RETINUE_INLINE bool topk(const retinue_instruction& i) {
    Rows rows(i);
    const int64_t n = i.sizes[rows.outer], k = static_cast<int64_t>(i.scalars[0]);
    using Entry = std::pair<float, int64_t>;
    std::vector<Entry> queue(static_cast<size_t>(n));
    auto before = [](const Entry& x, const Entry& y) {
        return (std::isnan(x.first) && !std::isnan(y.first)) || x.first > y.first;
    };
    return each(i.sizes, rows.outer, [&](const int64_t* at) {
        const float* a = rows.read(at);
        for (int64_t e = 0; e < n; ++e) queue[static_cast<size_t>(e)] = {a[e], e};
        if (k * 64 <= n) {
            std::partial_sort(queue.begin(), queue.begin() + k, queue.end(), before);
        } else {
            std::nth_element(queue.begin(), queue.begin() + k - 1, queue.end(), before);
            if (i.scalars[1] != 0) std::sort(queue.begin(), queue.begin() + k - 1, before);
        }
        for (int64_t e = 0; e < k; ++e) {
            const Entry& entry = queue[static_cast<size_t>(e)];
            const int64_t value = place(i.out, at, rows.outer) + e * i.out.strides[rows.outer];
            const int64_t index = place(i.b, at, rows.outer) + e * i.b.strides[rows.outer];
            store(i.out, value, 1, 1, &entry.first);
            static_cast<int64_t*>(i.b.at)[index] = entry.second;
        }
        return true;
    });
}

// Rows, or single numbers, that integers point to.
RETINUE_INLINE bool gather(const retinue_instruction& i) {
    const int64_t* index = static_cast<const int64_t*>(i.b.at);
    alignas(64) float a[CHUNK];
    for (int64_t row = 0; row < i.sizes[0]; ++row) {
        for (int64_t first = 0; first < i.sizes[1]; first += CHUNK) {
            const int64_t n = std::min(CHUNK, i.sizes[1] - first);
            if (i.operation == RETINUE_ROWS) {
                const int64_t from = index[row * i.b.strides[0]] * i.a.strides[0];
                load(i.a, from + first * i.a.strides[1], i.a.strides[1], n, a);
            } else {
                for (int64_t k = 0; k < n; ++k) {
                    const int64_t at = index[row * i.b.strides[0] + (first + k) * i.b.strides[1]];
                    load(i.a, row * i.a.strides[0] + at * i.a.strides[1], 1, 1, a + k);
                }
            }
            store(i.out, row * i.out.strides[0] + first * i.out.strides[1], i.out.strides[1], n, a);
        }
    }
    return true;
}

RETINUE_INLINE bool put(const retinue_instruction& i) {
    const int64_t* index = static_cast<const int64_t*>(i.b.at);
    for (int64_t row = 0; row < i.sizes[0]; ++row) {
        for (int64_t k = 0; k < i.sizes[1]; ++k) {
            float a;
            load(i.a, row * i.a.strides[0] + k * i.a.strides[1], 1, 1, &a);
            const int64_t at = index[row * i.b.strides[0] + k * i.b.strides[1]];
            store(i.out, row * i.out.strides[0] + at * i.out.strides[1], 1, 1, &a);
        }
    }
    return true;
}

RETINUE_CLONES bool compute(const retinue_instruction& i) {
    if (i.operation < RETINUE_SUM_OF) return pointwise(i);
    switch (i.operation) {
        case RETINUE_SUM_OF:
        case RETINUE_MEAN_OF:
        case RETINUE_MAX_OF:
        case RETINUE_MIN_OF: return reduce(i);
        case RETINUE_SOFTMAX: return softmax(i);
        case RETINUE_TOPK: return topk(i);
        case RETINUE_ROWS:
        case RETINUE_PICK: return gather(i);
        case RETINUE_PUT: return put(i);
        default: return false;
    }
}

int32_t run(const retinue_instruction& i) {
    if (i.operation == RETINUE_PRODUCT)
        return retinue_linear(static_cast<const retinue_matrix*>(i.b.at), i.a.at, i.a.strides[0],
                              static_cast<int32_t>(i.a.type), i.sizes[0], i.c.at, i.out.at);
    if (i.operation == RETINUE_ATTEND)
        return retinue_attend(static_cast<const retinue_attention*>(i.b.at));
    if (i.operation == RETINUE_EXPERTS)
        return retinue_run_layer(static_cast<const retinue_layer*>(i.b.at));
    return compute(i) ? RETINUE_OK : RETINUE_BAD_ARGUMENT;
}

}  // namespace

extern "C" int32_t retinue_evaluate(const retinue_instruction* instructions, int64_t count,
                                    int64_t* done) {
    try {
        for (*done = 0; *done < count; ++*done) {
            const int32_t error = run(instructions[*done]);
            if (error == RETINUE_ABSENT) return RETINUE_OK;
            if (error != RETINUE_OK) return error;
        }
        return RETINUE_OK;
    } catch (...) {  // nothing else is thrown than what says that memory is lacking
        return RETINUE_OUT_OF_MEMORY;
    }
}
