// What is the same for every instruction set: plain loops that the compiler makes into vectors.
// Included once by each file of kernels, which is compiled for its own instructions; all is local
// to that file, lest the linker keep the copy that needs the most.
#ifndef RETINUE_ELEMENTWISE_H
#define RETINUE_ELEMENTWISE_H

#include <string.h>

#include "kernels.h"

namespace retinue {
namespace {

inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

inline float bf16_to_float(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = bits_of(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return static_cast<uint16_t>(nan ? bits >> 16 | 0x40 : rounded);
}

// 2^112 moves the exponent of fp16 to that of fp32, and denormals to where they belong.
inline float f16_to_float(uint16_t x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
    const float scaled = float_of(magnitude) * 0x1p112f;
    const uint32_t bits = (x & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : bits_of(scaled);
    return float_of(bits | static_cast<uint32_t>(x & 0x8000) << 16);
}

inline uint16_t float_to_f16(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
    // Adding a power of two lets the addition round at the last bit that fp16 has there.
    const uint32_t exponent = magnitude < 0x38800000 ? 0x38800000 : magnitude & 0x7f800000;
    const float magic = float_of(exponent + 0x06800000);
    const uint32_t rounded = bits_of((float_of(magnitude) + magic) - magic);
    const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    uint32_t half = magnitude < 0x38800000 ? denormal : (rounded - 0x38000000) >> 13;
    half = magnitude >= 0x477ff000 ? 0x7c00 : half;
    half = magnitude > 0x7f800000 ? 0x7e00 : half;
    return static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

void load(const void* x, int32_t type, int64_t count, float* out) {
    const auto* halves = static_cast<const uint16_t*>(x);
    if (type == RETINUE_TYPE_F32) {
        memcpy(out, x, count * sizeof(float));
    } else if (type == RETINUE_TYPE_BF16) {
        for (int64_t i = 0; i < count; i++) out[i] = bf16_to_float(halves[i]);
    } else {
        for (int64_t i = 0; i < count; i++) out[i] = f16_to_float(halves[i]);
    }
}

void store(const float* x, int32_t type, int64_t count, void* out) {
    auto* halves = static_cast<uint16_t*>(out);
    if (type == RETINUE_TYPE_F32) {
        memcpy(out, x, count * sizeof(float));
    } else if (type == RETINUE_TYPE_BF16) {
        for (int64_t i = 0; i < count; i++) halves[i] = float_to_bf16(x[i]);
    } else {
        for (int64_t i = 0; i < count; i++) halves[i] = float_to_f16(x[i]);
    }
}

void round_to(int32_t type, int64_t count, float* x) {
    if (type == RETINUE_TYPE_BF16) {
        for (int64_t i = 0; i < count; i++) x[i] = bf16_to_float(float_to_bf16(x[i]));
    } else if (type == RETINUE_TYPE_F16) {
        for (int64_t i = 0; i < count; i++) x[i] = f16_to_float(float_to_f16(x[i]));
    }
}

// The largest magnitude as bits: so a NaN is larger than all, and shows in the scale.
inline uint32_t largest_bits(const float* x) {
    uint32_t largest = 0;
    for (int i = 0; i < kGroup; i++) {
        const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    return largest;
}

constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: added and taken away, rounds to an integer

void quantise(const float* x, int32_t zero, int8_t* codes, float* scale, int32_t* offset) {
    const float largest = float_of(largest_bits(x));
    // Smaller ones would have an inverse that is infinite.
    const bool none = largest < 1e-30f;
    const float inverse = none ? 0.0f : 127.0f / largest;
    int32_t sum = 0;
    for (int i = 0; i < kGroup; i++) {
        // From the bits, not by a cast: of a NaN that would be undefined.
        const uint32_t bits = bits_of(x[i] * inverse + kRounder);
        const int32_t code = static_cast<int8_t>(static_cast<uint8_t>(bits));
        codes[i] = static_cast<int8_t>(code);
        sum += code;
    }
    *scale = none ? 0.0f : largest / 127.0f;
    *offset = -zero * sum;
}

void prepare(const float* x, int32_t format, int32_t groups, const Block& block, int32_t token,
             int32_t group) {
    const int32_t zero = format == RETINUE_INT4 ? 8 : 128;
    for (int32_t g = 0; g < groups; g++, x += kGroup) {
        const int64_t at = static_cast<int64_t>(group + g) * block.tokens + token;
        if (format != RETINUE_BF16) {
            quantise(x, zero, block.codes + at * kGroup, block.scales + at, block.offsets + at);
            continue;
        }
        if (block.pairs) {
            uint32_t pairs[kGroup / 2];
            for (int i = 0; i < kGroup / 2; i++) {
                pairs[i] = float_to_bf16(x[2 * i]) |
                           static_cast<uint32_t>(float_to_bf16(x[2 * i + 1])) << 16;
            }
            uint16_t* first = block.pairs + (at - token) * kGroup + 2 * token;
            for (int i = 0; i < kGroup / 2; i++) {
                memcpy(first + static_cast<int64_t>(i) * block.tokens * 2, pairs + i, 4);
            }
            continue;
        }
        float* values = block.values + at * kGroup;
        for (int i = 0; i < kGroup / 2; i++) {
            values[i] = x[2 * i];
            values[kGroup / 2 + i] = x[2 * i + 1];
        }
    }
}

// Good to two units in the last place; x above 88 counts as 88.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float n = (x * 1.44269504f + kRounder) - kRounder;
    float r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const uint32_t power = (bits_of(n + kRounder) + 127) << 23;
    return p * float_of(power);
}

// x times the normal distribution up to x, by the complementary error function's approximation
// as a fraction within 1.2e-7 (Numerical Recipes, section 6.2).
inline float gelu(float x) {
    const float z = __builtin_fabsf(x) * 0.707106781f;
    const float t = 1.0f / (1.0f + 0.5f * z);
    float p = 0.17087277f;
    p = p * t - 0.82215223f;
    p = p * t + 1.48851587f;
    p = p * t - 1.13520398f;
    p = p * t + 0.27886807f;
    p = p * t - 0.18628806f;
    p = p * t + 0.09678418f;
    p = p * t + 0.37409196f;
    p = p * t + 1.00002368f;
    p = p * t - 1.26551223f;
    const float tail = 0.5f * t * exponential(p - z * z);
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

void activate(int32_t activation, int32_t type, int64_t count, float* gate, float* up) {
    round_to(type, count, gate);
    round_to(type, count, up);
    if (activation == RETINUE_SILU) {
        for (int64_t i = 0; i < count; i++) gate[i] = gate[i] * sigmoid(gate[i]);
    } else if (activation == RETINUE_GELU) {
        for (int64_t i = 0; i < count; i++) gate[i] = gelu(gate[i]);
    } else if (activation == RETINUE_GELU_TANH) {
        for (int64_t i = 0; i < count; i++) {
            const float x = gate[i];
            gate[i] = x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));
        }
    } else {
        for (int64_t i = 0; i < count; i++) gate[i] = gate[i] < 0.0f ? 0.0f : gate[i];
    }
    round_to(type, count, gate);
    for (int64_t i = 0; i < count; i++) gate[i] *= up[i];
    round_to(type, count, gate);
}

void sum(const float* rows, const float* weights, int32_t k, int32_t hidden, float* out) {
    for (int32_t i = 0; i < hidden; i++) out[i] = 0.0f;
    for (int32_t rank = 0; rank < k; rank++, rows += hidden) {
        for (int32_t i = 0; i < hidden; i++) out[i] += weights[rank] * rows[i];
    }
}

// The largest magnitude of a group of int4 comes to lie on -8 times one of these. A larger scale
// than 1 leaves room for the largest of the other sign, a smaller one cuts the largest off.
constexpr float kStretches[] = {1.14f, 1.07f, 1.03f, 1.0f, 0.97f, 0.93f, 0.89f, 0.84f};

// Rows that are encoded at once.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Bits = uint32_t __attribute__((vector_size(4 * kWidth)));

inline Bits bits_of(Floats x) { return reinterpret_cast<Bits>(x); }
inline Floats floats_of(Bits bits) { return reinterpret_cast<Floats>(bits); }
inline Floats all(float x) { return x - Floats{}; }  // + would have to mind -0

// A group of these rows.
struct Numbers {
    Floats columns[kGroup];
};

inline Floats inverse_of(Floats scale) {
    const Floats magnitude = floats_of(bits_of(scale) & 0x7fffffffu);
    return magnitude < 1e-30f ? Floats{} : 1.0f / scale;
}

inline Floats nearest(Floats x, Floats inverse, float low, float high) {
    const Floats code = (x * inverse + kRounder) - kRounder;
    const Floats above = code < low ? all(low) : code;
    return above > high ? all(high) : above;
}

inline Floats to_bf16(Floats x) {
    const Bits bits = bits_of(x), magnitude = bits & 0x7fffffffu;
    const Bits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    return floats_of(magnitude > 0x7f800000u ? bits | 0x400000u : rounded);
}

// In each row the number of the largest magnitude; a NaN is larger than all.
Floats largest_numbers(const Numbers& x) {
    Bits largest = {};
    for (const Floats& column : x.columns) {
        const Bits number = bits_of(column);
        largest = (number & 0x7fffffffu) > (largest & 0x7fffffffu) ? number : largest;
    }
    return floats_of(largest);
}

// The scale that is the best for the codes that `scale` gives: the sum of x * code over that of
// code * code.
Floats fit_scale(const Numbers& x, Floats scale) {
    const Floats inverse = inverse_of(scale);
    Floats products = {}, squares = {};
    for (const Floats& column : x.columns) {
        const Floats code = nearest(column, inverse, -8.0f, 7.0f);
        products += column * code;
        squares += code * code;
    }
    const Floats fitted = products / squares;
    const auto finite = fitted - fitted == 0.0f;
    const auto usable = finite & (fitted != 0.0f);
    return to_bf16(usable ? fitted : scale);
}

Floats squared_error(const Numbers& x, Floats scale) {
    const Floats inverse = inverse_of(scale);
    Floats error = {};
    for (const Floats& column : x.columns) {
        const Floats miss = column - nearest(column, inverse, -8.0f, 7.0f) * scale;
        error += miss * miss;
    }
    return error;
}

// NaN where a number is not finite: then no error is less than another.
Floats choose_scale(const Numbers& x, Floats largest) {
    Floats least = all(float_of(0x7f800000)), chosen = all(float_of(0x7fc00000));
    for (const float stretch : kStretches) {
        const Floats scale = fit_scale(x, to_bf16(largest / -8.0f * stretch));
        const Floats error = squared_error(x, scale);
        chosen = error < least ? scale : chosen;
        least = error < least ? error : least;
    }
    return chosen;
}

// `numbers`, `codes` and `scales` begin with the first of the rows; the others lie between.
void encode_rows(const float* numbers, int32_t format, uint8_t* codes, uint16_t* scales) {
    const bool four = format == RETINUE_INT4;
    const float low = four ? -8.0f : -127.0f, high = four ? 7.0f : 127.0f;
    const float zero = four ? 8.0f : 128.0f;
    Numbers x;
    for (int c = 0; c < kGroup; c++) {
        memcpy(&x.columns[c], numbers + c * kLanes, sizeof(Floats));
    }
    const Floats largest = largest_numbers(x);
    const Floats magnitude = floats_of(bits_of(largest) & 0x7fffffffu);
    const Floats scale = four ? choose_scale(x, largest) : to_bf16(magnitude / 127.0f);
    const Floats inverse = inverse_of(scale);
    Bits plain[kGroup];
    for (int c = 0; c < kGroup; c++) {
        plain[c] = bits_of(nearest(x.columns[c], inverse, low, high) + (kRounder + zero)) & 0xffu;
    }
    // Four columns are the bytes of one number for each row.
    for (int q = 0; q < kGroup / 4; q++) {
        const Bits* column = plain + 4 * q;
        plain[q] = column[0] | column[1] << 8 | column[2] << 16 | column[3] << 24;
    }
    for (int q = 0; q < (four ? 4 : 8); q++) {
        const Bits bytes = four ? plain[2 * q] | plain[2 * q + 1] << 4 : plain[q];
        memcpy(codes + q * 4 * kLanes, &bytes, sizeof bytes);
    }
    for (int i = 0; i < kWidth; i++) {
        scales[i] = static_cast<uint16_t>(bits_of(scale)[i] >> 16);
    }
}

void encode(const float* x, int32_t format, uint8_t* codes, uint16_t* scales) {
    for (int row = 0; row < kLanes; row += kWidth) {
        encode_rows(x + row, format, codes + 4 * row, scales + row);
    }
}

void decode(const uint8_t* codes, const uint16_t* scales, int32_t format, float* out) {
    for (int c = 0; c < kGroup; c++) {
        const int j = c % 4, q = c / 4;
        for (int i = 0; i < kLanes; i++) {
            const int eight = format == RETINUE_INT8 ? codes[(q * kLanes + i) * 4 + j] - 128 : 0;
            const int pair = format == RETINUE_INT4 ? codes[(q / 2 * kLanes + i) * 4 + j] : 0;
            const int four = (q % 2 ? pair >> 4 : pair & 15) - 8;
            const int code = format == RETINUE_INT8 ? eight : four;
            out[c * kLanes + i] = static_cast<float>(code) * bf16_to_float(scales[i]);
        }
    }
}

// Of 32 weights in a plane of `kBits` bits each, those from `start` on, one a lane.
template <int kBits>
inline Bits fields_of(const uint8_t* plane, int start) {
    constexpr int kEach = 32 / kBits;  // weights of a word
    uint32_t low, high;
    memcpy(&low, plane + start / kEach * 4, 4);
    memcpy(&high, plane + (start + kWidth - 1) / kEach * 4, 4);
    Bits number = {};
    for (int i = 0; i < kWidth; i++) number[i] = static_cast<uint32_t>(start % kEach + i);
    const Bits words = number < static_cast<uint32_t>(kEach) ? Bits{} + low : Bits{} + high;
    return words >> number % kEach * kBits & ((1u << kBits) - 1u);
}

template <int kBits>
inline void unnest_groups(const uint8_t* const* planes, const float* scales, int64_t groups,
                          float* out) {
    constexpr float kHalf = 1.0f / (1 << (kBits - 1)), kPull = kBits == 2 ? 0.9375f : 1.0f;
    for (int64_t group = 0; group < groups; group++, out += kGroup) {
#pragma GCC unroll 8
        for (int start = 0; start < kGroup; start += kWidth) {
            Bits code = fields_of<2>(planes[0] + group * 8, start);
            if (kBits > 2) code = code << 2u | fields_of<2>(planes[1] + group * 8, start);
            if (kBits > 4) code = code << 4u | fields_of<4>(planes[2] + group * 16, start);
            // An integer below 2^23 in the lowest bits of 2^23.
            const Floats number = floats_of(code | 0x4b000000u) - 8388608.0f;
            const Floats value = ((number + 0.5f) * kHalf - 1.0f) * kPull * scales[group];
            memcpy(out + start, &value, sizeof value);
        }
    }
}

void unnest(const uint8_t* const* planes, int32_t bits, const float* scales, int64_t groups,
            float* out) {
    if (bits == 2) unnest_groups<2>(planes, scales, groups, out);
    if (bits == 4) unnest_groups<4>(planes, scales, groups, out);
    if (bits == 8) unnest_groups<8>(planes, scales, groups, out);
}

}  // namespace
}  // namespace retinue
#endif
