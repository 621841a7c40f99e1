// Kernels for AVX-512 with VNNI: sixteen rows in the lanes of a register, so that no sum ever goes
// across lanes, and one instruction multiplies four columns.
#include "attend.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

namespace retinue {
namespace {

// How far ahead of the weights that are read the memory is asked for, in bytes.
constexpr int kAhead = 16384;

template <int FORMAT>
inline void unpack(const uint8_t* codes, __m512i* weights) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int q = 0; q < 8; q += FORMAT == RETINUE_INT4 ? 2 : 1) {
        if (FORMAT == RETINUE_INT4) {
            const __m512i pair = _mm512_loadu_si512(codes + q * 32);
            weights[q] = _mm512_and_si512(pair, low);
            weights[q + 1] = _mm512_and_si512(_mm512_srli_epi16(pair, 4), low);
        } else {
            weights[q] = _mm512_loadu_si512(codes + q * 64);
        }
    }
}

inline __m512 load_scales(const uint16_t* scales) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline __m512i four_codes(const int8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm512_set1_epi32(four);
}

template <int FORMAT, int TOKENS>
void multiply_codes(const Tile& tile, const Block& block, int32_t first, int32_t stride,
                    float* out) {
    constexpr int kBytes = kLanes * kGroup / (FORMAT == RETINUE_INT4 ? 2 : 1);
    __m512 sums[TOKENS];
    for (__m512& sum : sums) sum = _mm512_setzero_ps();
    const uint8_t* codes = tile.codes;
    const uint16_t* scales = tile.scales;
    const int32_t groups = tile.groups();
    for (int32_t g = 0; g < groups; g++, codes += kBytes, scales += kLanes) {
        for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(codes + kAhead + i, 0, 2);
        __m512i weights[8];
        unpack<FORMAT>(codes, weights);
        const __m512 scale = load_scales(scales);
        for (int t = 0; t < TOKENS; t++) {
            const int64_t at = static_cast<int64_t>(g) * block.tokens + first + t;
            __m512i dot = _mm512_set1_epi32(block.offsets[at]);
            for (int q = 0; q < 8; q++) {
                dot = _mm512_dpbusd_epi32(dot, weights[q],
                                          four_codes(block.codes + at * kGroup + q * 4));
            }
            sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot),
                                      _mm512_mul_ps(scale, _mm512_set1_ps(block.scales[at])),
                                      sums[t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) {
        _mm512_storeu_ps(out + static_cast<int64_t>(first + t) * stride, sums[t]);
    }
}

// Sums of products of ROWS rows; bfloat16 is the upper half of fp32, so even columns are shifted
// there and odd ones masked.
template <int ROWS, int TOKENS>
void multiply_bf16(const Tile& tile, const Block& block, int32_t row, int32_t first,
                   int32_t stride, float* out) {
    const int64_t row_bytes = static_cast<int64_t>(tile.columns) * 2;
    const uint8_t* weights = tile.codes + row * row_bytes;
    const __m512i odd = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000));
    __m512 sums[2][ROWS][TOKENS];
    for (auto& half : sums) {
        for (auto& of_row : half) {
            for (__m512& sum : of_row) sum = _mm512_setzero_ps();
        }
    }
    const int32_t groups = tile.groups();
    for (int32_t g = 0; g < groups; g++) {
        const int left = tile.columns - g * kGroup;
        const __mmask32 valid = left >= kGroup ? ~0u : (1u << left) - 1;
        const float* values =
            block.values + (static_cast<int64_t>(g) * block.tokens + first) * kGroup;
        for (int r = 0; r < ROWS; r++) {
            const uint8_t* at = weights + r * row_bytes + g * 64;
            __builtin_prefetch(at + kAhead, 0, 2);
            const __m512i pairs = _mm512_maskz_loadu_epi16(valid, at);
            const __m512 w0 = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 w1 = _mm512_castsi512_ps(_mm512_and_si512(pairs, odd));
            for (int t = 0; t < TOKENS; t++) {
                const float* x = values + t * kGroup;
                sums[0][r][t] = _mm512_fmadd_ps(w0, _mm512_loadu_ps(x), sums[0][r][t]);
                sums[1][r][t] = _mm512_fmadd_ps(w1, _mm512_loadu_ps(x + 16), sums[1][r][t]);
            }
        }
    }
    for (int r = 0; r < ROWS; r++) {
        for (int t = 0; t < TOKENS; t++) {
            out[static_cast<int64_t>(first + t) * stride + row + r] =
                _mm512_reduce_add_ps(_mm512_add_ps(sums[0][r][t], sums[1][r][t]));
        }
    }
}

template <int FORMAT>
void multiply_block(const Tile& tile, const Block& block, int32_t stride, float* out) {
    int32_t t = 0;
    for (; t + 4 <= block.tokens; t += 4) multiply_codes<FORMAT, 4>(tile, block, t, stride, out);
    for (; t + 2 <= block.tokens; t += 2) multiply_codes<FORMAT, 2>(tile, block, t, stride, out);
    for (; t < block.tokens; t++) multiply_codes<FORMAT, 1>(tile, block, t, stride, out);
}

template <int TOKENS>
void multiply_rows(const Tile& tile, const Block& block, int32_t t, int32_t stride, float* out) {
    // Several tokens share what is read of two rows. One token waits for memory alone, which
    // brings a row after the other a third faster than rows side by side.
    constexpr int kRows = TOKENS == 1 ? 1 : 2;
    int32_t row = 0;
    for (; row + kRows <= tile.rows; row += kRows) {
        multiply_bf16<kRows, TOKENS>(tile, block, row, t, stride, out);
    }
    for (; row < tile.rows; row++) multiply_bf16<1, TOKENS>(tile, block, row, t, stride, out);
}

void multiply(const Tile& tile, const Block* blocks, int32_t count, int32_t stride, float* out) {
    for (const Block* block = blocks; block < blocks + count; block++) {
        if (tile.format == RETINUE_INT4) {
            multiply_block<RETINUE_INT4>(tile, *block, stride, out);
        } else if (tile.format == RETINUE_INT8) {
            multiply_block<RETINUE_INT8>(tile, *block, stride, out);
        } else {
            int32_t t = 0;
            for (; t + 4 <= block->tokens; t += 4) multiply_rows<4>(tile, *block, t, stride, out);
            for (; t < block->tokens; t++) multiply_rows<1>(tile, *block, t, stride, out);
        }
        out += static_cast<int64_t>(block->tokens) * stride;
    }
}

}  // namespace

const Kernels* avx512_kernels() {
    static const Kernels table = {"avx512-vnni", false, load, store, round_to, prepare, activate,
                                  multiply, sum, score, mix, encode, decode, unnest};
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") ? &table
                                                                                      : nullptr;
}

}  // namespace retinue

#else
namespace retinue {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace retinue
#endif
