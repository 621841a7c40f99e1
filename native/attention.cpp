// Attention of one new token a sequence over keys and values in a pool.
#include <algorithm>
#include <cmath>
#include <memory>

#include "kernels.h"
#include "numbers.h"
#include "pool.h"

namespace {

constexpr int64_t SMALL = 1 << 15;  // numbers of keys that are not worth waking a thread for
constexpr int64_t TILE = 16;        // tokens that all heads attend to before the next ones

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

// Ask for the rows of tokens to come: no processor guesses them, as each lies in a page of its own.
RETINUE_INLINE void fetch(const retinue::Rows& rows, int64_t first, int64_t stop) {
    const int64_t bytes = rows.type == RETINUE_TYPE_F32 ? 4 : 2;
    for (int64_t t = first; t < stop; ++t) {
        const char* at = static_cast<const char*>(rows.at) + rows.places[t] * rows.pitch * bytes;
        for (int64_t i = 0; i < rows.width * bytes; i += 64) __builtin_prefetch(at + i);
    }
}

// The largest of `least` and n numbers; in 16 lanes, as one would wait for each number.
RETINUE_INLINE float largest_of(const float* a, int64_t n, float least) {
    float lanes[16];
    std::fill(lanes, lanes + 16, least);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t l = 0; l < 16; ++l) lanes[l] = a[i + l] > lanes[l] ? a[i + l] : lanes[l];
    for (int64_t l = 0; i + l < n; ++l) lanes[l] = a[i + l] > lanes[l] ? a[i + l] : lanes[l];
    return *std::max_element(lanes, lanes + 16);
}

// Turn scores into weights; returns nothing, as they sum to at most 1.
RETINUE_INLINE void weigh(float* scores, int64_t n, const float* sink) {
    const float top = largest_of(scores, n, sink ? *sink : scores[0]);
    for (int64_t t = 0; t < n; ++t) scores[t] = exponential(scores[t] - top);
    const float total = sum_of(scores, n) + (sink ? exponential(*sink - top) : 0.0f);
    for (int64_t t = 0; t < n; ++t) scores[t] /= total;
}

// From one query's scores to the next one's: an odd number of cache lines, as with a power of two
// all of them would fight for the same few places of the cache.
int64_t stride_of(int64_t n) { return (retinue::ceil_div(n, 16) | 1) * 16; }

// Numbers that a key head of a sequence of n tokens needs.
int64_t memory_of(const retinue_attention& a, int64_t n) {
    return a.heads / a.key_heads * (a.width + a.value_width + stride_of(n));
}

// What a thread does at once: neighbouring key heads of one sequence, whose rows follow one another
// in memory. For each of them there are queries, answers and scores in `memory`.
struct Unit {
    const retinue_attention& a;
    const int64_t sequence, first, stop;  // heads
    float* const memory;
    const int64_t group = a.heads / a.key_heads, start = a.sequences->starts[sequence];
    const int64_t tokens = a.sequences->stops[sequence] - start, stride = stride_of(tokens);

    float* queries(int64_t head) const { return memory + (head - first) * memory_of(a, tokens); }
    float* answers(int64_t head) const { return queries(head) + group * a.width; }
    float* scores(int64_t head) const { return answers(head) + group * a.value_width; }

    // Of the tokens from `from` on, a tile's rows of a head.
    retinue::Rows rows(void* pool, int32_t width, int64_t head, int64_t from) const {
        const int64_t bytes = a.type == RETINUE_TYPE_F32 ? 4 : 2;
        return {static_cast<char*>(pool) + head * width * bytes,
                a.sequences->places[sequence] + start + from,
                static_cast<int64_t>(a.key_heads) * width, std::min(TILE, tokens - from), a.type,
                width};
    }

    // Put the new token's key or value of a head where it belongs.
    RETINUE_INLINE void keep(const void* from, const int64_t* strides, void* pool, int64_t width,
                             int64_t head, float* between) const {
        const int64_t place = a.sequences->places[sequence][start + tokens - 1];
        States{operand(from, a.type), strides}.read(sequence, head, width, between);
        store(operand(pool, a.type), row(place, head, a.key_heads, width), 1, width, between);
    }

    RETINUE_INLINE void begin(int64_t head) const {
        keep(a.key, a.key_strides, a.keys, a.width, head, queries(head));
        keep(a.value, a.value_strides, a.values, a.value_width, head, answers(head));
        const States given{operand(a.query, a.type), a.query_strides};
        for (int64_t g = 0; g < group; ++g)
            given.read(sequence, head * group + g, a.width, queries(head) + g * a.width);
        std::fill(answers(head), scores(head), 0.0f);
    }

    // work(head, token, rows) for the rows of all tokens in `pool`, of all heads before the next.
    template <class F>
    void each(void* pool, int32_t width, F work) const {
        for (int64_t t = 0; t < tokens; t += TILE)
            for (int64_t head = first; head < stop; ++head) {
                const retinue::Rows rows = this->rows(pool, width, head, t);
                fetch(rows, rows.count, std::min(rows.count + TILE, tokens - t));
                work(head, t, rows);
            }
    }

    RETINUE_INLINE void weigh_all(int64_t head) const {
        for (int64_t g = 0; g < group; ++g) {
            float* of_query = scores(head) + g * stride;
            for (int64_t t = 0; t < tokens; ++t) of_query[t] *= a.scale;
            for (int64_t t = 0; a.cap != 0 && t < tokens; ++t)
                of_query[t] = a.cap * std::tanh(of_query[t] / a.cap);
            float sink = 0;
            if (a.sinks) load(operand(a.sinks, a.type), head * group + g, 1, 1, &sink);
            weigh(of_query, tokens, a.sinks ? &sink : nullptr);
        }
    }

    RETINUE_INLINE void end(int64_t head) const {
        const int64_t at = row(sequence, head * group, a.heads, a.value_width);
        store(operand(a.out, a.type), at, 1, group * a.value_width, answers(head));
    }
};

RETINUE_CLONES void attend(const Unit& unit) {
    const retinue_attention& a = unit.a;
    const retinue::Kernels& kernels = retinue::kernels();
    const int32_t group = static_cast<int32_t>(unit.group);
    for (int64_t head = unit.first; head < unit.stop; ++head) unit.begin(head);
    unit.each(a.keys, a.width, [&](int64_t head, int64_t token, const retinue::Rows& rows) {
        kernels.score(unit.queries(head), group, rows, unit.stride, unit.scores(head) + token);
    });
    for (int64_t head = unit.first; head < unit.stop; ++head) unit.weigh_all(head);
    unit.each(a.values, a.value_width, [&](int64_t head, int64_t token, const retinue::Rows& rows) {
        kernels.mix(unit.scores(head) + token, group, rows, unit.stride, unit.answers(head));
    });
    for (int64_t head = unit.first; head < unit.stop; ++head) unit.end(head);
}

}  // namespace

extern "C" int32_t retinue_attend(const retinue_attention* attention) {
    const retinue_attention& a = *attention;
    const bool known = a.type == RETINUE_TYPE_F32 || a.type == RETINUE_TYPE_BF16;
    if (!known || a.key_heads < 1 || a.heads % a.key_heads) return RETINUE_BAD_ARGUMENT;
    int64_t numbers = 0, longest = 0;
    for (int64_t s = 0; s < a.sequences->count; ++s) {
        const int64_t n = a.sequences->stops[s] - a.sequences->starts[s];
        numbers += n * a.key_heads * a.width;
        longest = std::max(longest, n);
    }
    // Each sequence's heads are divided among the threads.
    const int64_t heads = retinue::ceil_div(a.key_heads, retinue::pool_threads());
    const int64_t parts = retinue::ceil_div(a.key_heads, heads);
    const int64_t units = a.sequences->count * parts;
    try {
        const int64_t each = heads * memory_of(a, longest);
        const std::unique_ptr<float[]> memory(
            new float[static_cast<size_t>(each * retinue::pool_threads())]);
        auto unit = [&](int32_t thread, int64_t u) {
            const int64_t first = u % parts * heads;
            const int64_t stop = std::min<int64_t>(first + heads, a.key_heads);
            attend({a, u / parts, first, stop, memory.get() + thread * each});
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
