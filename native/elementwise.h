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
            const int64_t first = static_cast<int64_t>(group + g) * block.tokens * kGroup;
            for (int i = 0; i < kGroup; i++) {
                const int64_t pair = static_cast<int64_t>(i / 2) * block.tokens + token;
                block.pairs[first + pair * 2 + i % 2] = float_to_bf16(x[i]);
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

// Divisors of the largest number, sign and all: with 8 codes below zero and 7 above, the sign of
// the scale decides which side has one more.
constexpr float kDivisors4[] = {-8.0f, -7.5f, -7.0f, -8.5f, 8.0f, 7.5f, 7.0f, 6.5f};
constexpr float kDivisors8[] = {127.0f};

template <int LOW, int HIGH>
inline float nearest(float x, float inverse) {
    float code = (x * inverse + kRounder) - kRounder;
    code = code < LOW ? static_cast<float>(LOW) : code;
    return code > HIGH ? static_cast<float>(HIGH) : code;
}

// The best scale of each lane, among those that bfloat16 has.
template <int LOW, int HIGH, int COUNT>
void choose_scales(const float* x, const float (&divisors)[COUNT], float* scales) {
    float largest[kLanes] = {}, least[kLanes];
    for (int c = 0; c < kGroup; c++) {
        for (int i = 0; i < kLanes; i++) {
            const float number = x[c * kLanes + i];
            largest[i] = __builtin_fabsf(number) > __builtin_fabsf(largest[i]) ? number : largest[i];
        }
    }
    for (int i = 0; i < kLanes; i++) {
        least[i] = float_of(0x7f800000);
        scales[i] = float_of(0x7fc00000);  // stays where a number is not finite
    }
    for (const float divisor : divisors) {
        float scale[kLanes], inverse[kLanes], error[kLanes] = {};
        for (int i = 0; i < kLanes; i++) {
            scale[i] = bf16_to_float(float_to_bf16(largest[i] / divisor));
            inverse[i] = __builtin_fabsf(scale[i]) < 1e-30f ? 0.0f : 1.0f / scale[i];
        }
        for (int c = 0; c < kGroup; c++) {
            for (int i = 0; i < kLanes; i++) {
                const float number = x[c * kLanes + i];
                const float miss = nearest<LOW, HIGH>(number, inverse[i]) * scale[i] - number;
                error[i] += miss * miss;
            }
        }
        for (int i = 0; i < kLanes; i++) {
            scales[i] = error[i] < least[i] ? scale[i] : scales[i];
            least[i] = error[i] < least[i] ? error[i] : least[i];
        }
    }
}

void encode(const float* x, int32_t format, uint8_t* codes, uint16_t* scales) {
    const bool four = format == RETINUE_INT4;
    float scale[kLanes], inverse[kLanes];
    if (four) {
        choose_scales<-8, 7>(x, kDivisors4, scale);
    } else {
        choose_scales<-127, 127>(x, kDivisors8, scale);
    }
    for (int i = 0; i < kLanes; i++) {
        scales[i] = float_to_bf16(scale[i]);
        inverse[i] = __builtin_fabsf(scale[i]) < 1e-30f ? 0.0f : 1.0f / scale[i];
    }
    uint8_t plain[kGroup][kLanes];
    for (int c = 0; c < kGroup; c++) {
        for (int i = 0; i < kLanes; i++) {
            const float number = x[c * kLanes + i];
            const float code = four ? nearest<-8, 7>(number, inverse[i]) + 8.0f
                                    : nearest<-127, 127>(number, inverse[i]) + 128.0f;
            plain[c][i] = static_cast<uint8_t>(bits_of(code + kRounder));
        }
    }
    for (int c = 0; c < kGroup; c++) {
        const int j = c % 4, q = c / 4;
        for (int i = 0; i < kLanes; i++) {
            if (!four) {
                codes[(q * kLanes + i) * 4 + j] = plain[c][i];
            } else if (q % 2 == 0) {
                codes[(q / 2 * kLanes + i) * 4 + j] =
                    static_cast<uint8_t>(plain[c][i] | plain[c + 4][i] << 4);
            }
        }
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

}  // namespace
}  // namespace retinue
#endif
