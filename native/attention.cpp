// Attention of one new token a sequence over keys and values in a pool.
#include <algorithm>
#include <cmath>
#include <memory>

#include "numbers.h"
#include "pool.h"

namespace {

constexpr int64_t SMALL = 1 << 15;  // numbers of keys that are not worth waking a thread for
constexpr int64_t AHEAD = 12;       // tokens; each one lies in a page of its own

retinue_operand operand(const void* at, int32_t type) {
    return {const_cast<void*>(at), {1, 1, 1, 1}, type};
}

// One of the three: [sequences, heads, width] by strides.
struct States {
    retinue_operand numbers;
    const int64_t* strides;

    RETINUE_INLINE void read(int64_t sequence, int64_t head, int64_t width, float* to) const {
        load(numbers, sequence * strides[0] + head * strides[1], strides[2], width, to);
    }
};

// Where a head of a token lies in a pool.
RETINUE_INLINE int64_t row(int64_t place, int64_t head, int64_t heads, int64_t width) {
    return (place * heads + head) * width;
}

// Ask for the row of a token to come: no processor guesses it, as the other heads lie between.
RETINUE_INLINE void fetch(const retinue_operand& states, int64_t from, int64_t numbers) {
    const int64_t bytes = states.type == RETINUE_TYPE_F32 ? 4 : 2;
    const char* at = static_cast<const char*>(states.at) + from * bytes;
    for (int64_t i = 0; i < numbers * bytes; i += 64) __builtin_prefetch(at + i);
}

RETINUE_INLINE float dot(const float* a, const float* b, int64_t n) {
    float lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t l = 0; l < 16; ++l) lanes[l] += a[i + l] * b[i + l];
    for (int64_t l = 0; i + l < n; ++l) lanes[l] += a[i + l] * b[i + l];
    return sum_of(lanes, 16);
}

// Turn scores into weights; returns nothing, as they sum to at most 1.
RETINUE_INLINE void weigh(float* scores, int64_t n, const float* sink) {
    float top = sink ? *sink : scores[0];
    for (int64_t t = 0; t < n; ++t) top = scores[t] > top ? scores[t] : top;
    for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - top);
    const float total = sum_of(scores, n) + (sink ? exponential(*sink - top) : 0.0f);
    for (int64_t t = 0; t < n; ++t) scores[t] /= total;
}

// Numbers that the heads of one key head need for a sequence of n tokens.
int64_t memory_of(const retinue_attention& a, int64_t n) {
    const int64_t group = a.heads / a.key_heads;
    return group * (a.width + a.value_width + n) + a.width + a.value_width;
}

// One sequence's heads that share a key head.
RETINUE_CLONES void attend(const retinue_attention& a, int64_t sequence, int64_t head,
                           float* memory) {
    const int64_t group = a.heads / a.key_heads, width = a.width, wide = a.value_width;
    const int64_t first = a.sequences->starts[sequence], stop = a.sequences->stops[sequence];
    const int64_t* places = a.sequences->places[sequence];
    const int64_t n = stop - first;
    float *query = memory, *out = query + group * width, *scores = out + group * wide;
    float *key = scores + group * n, *value = key + width;
    const retinue_operand keys = operand(a.keys, a.type), values = operand(a.values, a.type);

    States{operand(a.key, a.type), a.key_strides}.read(sequence, head, width, key);
    store(keys, row(places[stop - 1], head, a.key_heads, width), 1, width, key);
    States{operand(a.value, a.type), a.value_strides}.read(sequence, head, wide, value);
    store(values, row(places[stop - 1], head, a.key_heads, wide), 1, wide, value);

    const States queries{operand(a.query, a.type), a.query_strides};
    for (int64_t g = 0; g < group; ++g)
        queries.read(sequence, head * group + g, width, query + g * width);
    for (int64_t t = 0; t < n; ++t) {
        if (t + AHEAD < n)
            fetch(keys, row(places[first + t + AHEAD], head, a.key_heads, width), width);
        load(keys, row(places[first + t], head, a.key_heads, width), 1, width, key);
        for (int64_t g = 0; g < group; ++g) {
            const float score = dot(query + g * width, key, width) * a.scale;
            scores[g * n + t] = a.cap == 0 ? score : a.cap * std::tanh(score / a.cap);
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        float sink = 0;
        if (a.sinks) load(operand(a.sinks, a.type), head * group + g, 1, 1, &sink);
        weigh(scores + g * n, n, a.sinks ? &sink : nullptr);
    }
    std::fill(out, out + group * wide, 0.0f);
    for (int64_t t = 0; t < n; ++t) {
        if (t + AHEAD < n)
            fetch(values, row(places[first + t + AHEAD], head, a.key_heads, wide), wide);
        load(values, row(places[first + t], head, a.key_heads, wide), 1, wide, value);
        for (int64_t g = 0; g < group; ++g) {
            const float weight = scores[g * n + t];
            for (int64_t w = 0; w < wide; ++w) out[g * wide + w] += weight * value[w];
        }
    }
    const int64_t at = row(sequence, head * group, a.heads, wide);
    store(operand(a.out, a.type), at, 1, group * wide, out);
}

}  // namespace

extern "C" int32_t retinue_attend(const retinue_attention* attention) {
    const retinue_attention& a = *attention;
    const bool known = a.type == RETINUE_TYPE_F32 || a.type == RETINUE_TYPE_BF16;
    if (!known || a.key_heads < 1 || a.heads % a.key_heads) return RETINUE_BAD_ARGUMENT;
    const int64_t units = a.sequences->count * a.key_heads;
    int64_t numbers = 0, longest = 0;
    for (int64_t s = 0; s < a.sequences->count; ++s) {
        const int64_t n = a.sequences->stops[s] - a.sequences->starts[s];
        numbers += n * a.key_heads * a.width;
        longest = std::max(longest, n);
    }
    try {
        const int64_t each = memory_of(a, longest);
        const std::unique_ptr<float[]> memory(
            new float[static_cast<size_t>(each * retinue::pool_threads())]);
        auto unit = [&](int32_t thread, int64_t u) {
            attend(a, u / a.key_heads, u % a.key_heads, memory.get() + thread * each);
        };
        if (numbers < SMALL)
            for (int64_t u = 0; u < units; ++u) unit(0, u);
        else
            retinue::parallel(units, unit);
        return RETINUE_OK;
    } catch (...) {
        return RETINUE_OUT_OF_MEMORY;
    }
}
