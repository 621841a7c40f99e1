// Attention's two loops over stored keys and values, for any instruction set.
// Included once by each file of kernels, as `elementwise.h` is, and after it.
#ifndef RETINUE_ATTEND_H
#define RETINUE_ATTEND_H

#include "elementwise.h"

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace retinue {
namespace {

// What an instruction set has of its own: a * b + c rounded once, bfloat16 as fp32, and the totals
// of `kSums` registers, which are enough that none waits for the one before it.
#if defined(__AVX512F__)
constexpr int kSums = 16;

inline Floats fused(Floats a, Floats b, Floats c) {
    return Floats(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
}

inline Floats some(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return Floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// Sums and transposes by turns: each step halves the registers, and what is left to sum.
inline void totals(const Floats* sums, float* out) {
    __m512 x[kSums];
    for (int i = 0; i < 8; i++) {
        const __m512 a = __m512(sums[2 * i]), b = __m512(sums[2 * i + 1]);
        x[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    }
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(x[2 * i]), b = _mm512_castps_pd(x[2 * i + 1]);
        x[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int left = 2; left > 0; left /= 2) {
        for (int i = 0; i < left; i++) {
            const __m512 a = x[2 * i], b = x[2 * i + 1];
            x[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88),
                                 _mm512_shuffle_f32x4(a, b, 0xdd));
        }
    }
    _mm512_storeu_ps(out, x[0]);
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kSums = 8;

inline Floats fused(Floats a, Floats b, Floats c) {
    return Floats(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
}

inline Floats some(const uint16_t* from) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return Floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

inline void totals(const Floats* sums, float* out) {
    __m256 x[kSums];
    for (int left = 4; left > 1; left /= 2) {
        for (int i = 0; i < left; i++) {
            const bool first = left == 4;
            x[i] = _mm256_hadd_ps(first ? __m256(sums[2 * i]) : x[2 * i],
                                  first ? __m256(sums[2 * i + 1]) : x[2 * i + 1]);
        }
    }
    _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(x[0], x[1], 0x20),
                                        _mm256_permute2f128_ps(x[0], x[1], 0x31)));
}
#else
constexpr int kSums = 8;

inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }

inline Floats some(const uint16_t* from) {
    uint16_t halves __attribute__((vector_size(2 * kWidth)));
    memcpy(&halves, from, sizeof halves);
    return floats_of(__builtin_convertvector(halves, Bits) << 16);
}

inline void totals(const Floats* sums, float* out) {
    for (int i = 0; i < kSums; i++) {
        out[i] = (sums[i][0] + sums[i][2]) + (sums[i][1] + sums[i][3]);
    }
}
#endif

inline Floats some(const float* from) {
    Floats numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

inline float one(float number) { return number; }
inline float one(uint16_t half) { return bf16_to_float(half); }

template <class T>
inline const T* row_of(const Rows& rows, int64_t token) {
    return static_cast<const T*>(rows.at) + rows.places[token] * rows.pitch;
}

// The products of GROUP queries with the next rows, as many as there are registers for. Where there
// are fewer rows, the last one stands in for those that lack.
template <class T, int GROUP>
void score_some(const float* queries, const Rows& rows, int64_t token, int64_t stride,
                float* scores) {
    constexpr int kTogether = kSums / GROUP;
    const int64_t width = rows.width, whole = width / kWidth * kWidth;
    const int64_t count = rows.count - token < kTogether ? rows.count - token : kTogether;
    const T* row[kTogether];
    Floats sums[kSums];
#pragma GCC unroll 16
    for (int at = 0; at < kSums; at++) sums[at] = Floats{};
    for (int t = 0; t < kTogether; t++) {
        row[t] = row_of<T>(rows, token + (t < count ? t : count - 1));
    }
    for (int64_t i = 0; i < whole; i += kWidth) {
        for (int t = 0; t < kTogether; t++) {
            const Floats key = some(row[t] + i);
            for (int g = 0; g < GROUP; g++) {
                Floats& sum = sums[g * kTogether + t];
                sum = fused(some(queries + g * width + i), key, sum);
            }
        }
    }
    float products[kSums];
    totals(sums, products);
    for (int64_t i = whole; i < width; i++) {
        for (int at = 0; at < kSums; at++) {
            products[at] += queries[at / kTogether * width + i] * one(row[at % kTogether][i]);
        }
    }
    for (int g = 0; g < GROUP; g++) {
        float* out = scores + g * stride + token;
        if (count == kTogether) {
            memcpy(out, products + g * kTogether, sizeof(float) * kTogether);
        } else {
            memcpy(out, products + g * kTogether, sizeof(float) * count);
        }
    }
}

template <class T, int GROUP>
void score_group(const float* queries, const Rows& rows, int64_t stride, float* scores) {
    for (int64_t token = 0; token < rows.count; token += kSums / GROUP) {
        score_some<T, GROUP>(queries, rows, token, stride, scores);
    }
}

// Numbers `first`.. of all rows by their weights, in as many registers for each of the queries.
template <class T, int GROUP, int REGISTERS>
void mix_some(const float* weights, const Rows& rows, int64_t first, int64_t stride, float* out) {
    Floats sums[GROUP][REGISTERS];
    for (int g = 0; g < GROUP; g++) {
        for (int r = 0; r < REGISTERS; r++) {
            sums[g][r] = some(out + g * rows.width + first + r * kWidth);
        }
    }
    for (int64_t token = 0; token < rows.count; token++) {
        const T* row = row_of<T>(rows, token) + first;
        for (int r = 0; r < REGISTERS; r++) {
            const Floats value = some(row + r * kWidth);
            for (int g = 0; g < GROUP; g++) {
                sums[g][r] = fused(all(weights[g * stride + token]), value, sums[g][r]);
            }
        }
    }
    for (int g = 0; g < GROUP; g++) {
        for (int r = 0; r < REGISTERS; r++) {
            memcpy(out + g * rows.width + first + r * kWidth, &sums[g][r], sizeof(Floats));
        }
    }
}

template <class T, int GROUP>
void mix_group(const float* weights, const Rows& rows, int64_t stride, float* out) {
    constexpr int kRegisters = kSums / GROUP;
    const int64_t width = rows.width;
    int64_t i = 0;
    for (; i + kRegisters * kWidth <= width; i += kRegisters * kWidth) {
        mix_some<T, GROUP, kRegisters>(weights, rows, i, stride, out);
    }
    for (; i + kWidth <= width; i += kWidth) {
        mix_some<T, GROUP, 1>(weights, rows, i, stride, out);
    }
    for (; i < width; i++) {
        for (int64_t token = 0; token < rows.count; token++) {
            const float value = one(row_of<T>(rows, token)[i]);
            for (int g = 0; g < GROUP; g++) out[g * width + i] += weights[g * stride + token] * value;
        }
    }
}

// As many queries at once as there are registers for.
template <class T>
void score_as(const float* queries, int32_t group, const Rows& rows, int64_t stride,
              float* scores) {
    int32_t g = 0;
    for (; g + 8 <= group; g += 8) {
        score_group<T, 8>(queries + g * rows.width, rows, stride, scores + g * stride);
    }
    for (; g + 4 <= group; g += 4) {
        score_group<T, 4>(queries + g * rows.width, rows, stride, scores + g * stride);
    }
    for (; g < group; g++) {
        score_group<T, 1>(queries + g * rows.width, rows, stride, scores + g * stride);
    }
}

template <class T>
void mix_as(const float* weights, int32_t group, const Rows& rows, int64_t stride, float* out) {
    int32_t g = 0;
    for (; g + 8 <= group; g += 8) {
        mix_group<T, 8>(weights + g * stride, rows, stride, out + g * rows.width);
    }
    for (; g + 4 <= group; g += 4) {
        mix_group<T, 4>(weights + g * stride, rows, stride, out + g * rows.width);
    }
    for (; g < group; g++) {
        mix_group<T, 1>(weights + g * stride, rows, stride, out + g * rows.width);
    }
}

void score(const float* queries, int32_t group, const Rows& rows, int64_t stride, float* scores) {
    if (rows.type == RETINUE_TYPE_F32) return score_as<float>(queries, group, rows, stride, scores);
    score_as<uint16_t>(queries, group, rows, stride, scores);
}

void mix(const float* weights, int32_t group, const Rows& rows, int64_t stride, float* out) {
    if (rows.type == RETINUE_TYPE_F32) return mix_as<float>(weights, group, rows, stride, out);
    mix_as<uint16_t>(weights, group, rows, stride, out);
}

}  // namespace
}  // namespace retinue
#endif
