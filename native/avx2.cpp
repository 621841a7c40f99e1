// Kernels for AVX2: as avx512.cpp, with the sixteen rows of a tile in two registers.
#include "attend.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace retinue {
namespace {

constexpr int kAhead = 4096;

// Sums of two neighbouring products as int16. Two of int8 could exceed it when one factor is
// unsigned; magnitudes, with the signs moved to x, cannot.
template <int FORMAT>
inline __m256i pair_products(__m256i weights, __m256i x) {
    if (FORMAT == RETINUE_INT4) return _mm256_maddubs_epi16(weights, x);
    const __m256i codes = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    return _mm256_maddubs_epi16(_mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes));
}

inline __m256i four_codes(const int8_t* codes) {
    int32_t four;
    memcpy(&four, codes, sizeof four);
    return _mm256_set1_epi32(four);
}

// The dot products of eight rows, `half` 0 or 1 of the tile, with one token's group.
template <int FORMAT>
inline __m256i dot_products(const uint8_t* codes, int half, const int8_t* x, int32_t offset) {
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
    if (FORMAT == RETINUE_INT4) {
        __m256i sum = _mm256_setzero_si256();  // of int16: eight times 2 * 15 * 127 fit
        for (int q = 0; q < 8; q += 2) {
            const __m256i pair = _mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(codes + q / 2 * 64 + half * 32));
            const __m256i lower = _mm256_and_si256(pair, low);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(pair, 4), low);
            sum = _mm256_add_epi16(sum, pair_products<FORMAT>(lower, four_codes(x + q * 4)));
            sum = _mm256_add_epi16(sum, pair_products<FORMAT>(upper, four_codes(x + q * 4 + 4)));
        }
        return _mm256_add_epi32(_mm256_madd_epi16(sum, ones), _mm256_set1_epi32(offset));
    }
    __m256i sum = _mm256_setzero_si256();
    for (int q = 0; q < 8; q++) {
        const __m256i weights =
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + q * 64 + half * 32));
        const __m256i pairs = pair_products<FORMAT>(weights, four_codes(x + q * 4));
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
    }
    return sum;
}

inline __m256 load_scales(const uint16_t* scales) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

template <int FORMAT>
void multiply_codes(const Tile& tile, const Block& block, int32_t token, float* out) {
    constexpr int kBytes = kLanes * kGroup / (FORMAT == RETINUE_INT4 ? 2 : 1);
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int32_t g = 0; g < tile.groups(); g++) {
        const uint8_t* codes = tile.codes + static_cast<int64_t>(g) * kBytes;
        for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(codes + kAhead + i, 0, 2);
        const int64_t at = static_cast<int64_t>(g) * block.tokens + token;
        for (int half = 0; half < 2; half++) {
            const __m256i dot = dot_products<FORMAT>(codes, half, block.codes + at * kGroup,
                                                     block.offsets[at]);
            const __m256 scale = load_scales(tile.scales + g * kLanes + half * 8);
            sums[half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot),
                                         _mm256_mul_ps(scale, _mm256_set1_ps(block.scales[at])),
                                         sums[half]);
        }
    }
    _mm256_storeu_ps(out, sums[0]);
    _mm256_storeu_ps(out + 8, sums[1]);
}

inline float total(__m256 sums) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// bfloat16 is the upper half of fp32: even columns are shifted there and odd ones masked.
float multiply_row(const uint8_t* weights, int32_t columns, const float* values, int64_t step) {
    const __m256i odd = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
    __m256 sums[4] = {};
    for (int32_t column = 0; column < columns; column += kGroup, values += step) {
        const uint8_t* from = weights + 2 * static_cast<int64_t>(column);
        uint8_t end[2 * kGroup] = {};
        if (columns - column < kGroup) {
            memcpy(end, from, 2 * static_cast<size_t>(columns - column));
            from = end;
        }
        __builtin_prefetch(from + kAhead, 0, 2);
        for (int half = 0; half < 2; half++) {
            const __m256i pairs =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half * 32));
            const __m256 w0 = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
            const __m256 w1 = _mm256_castsi256_ps(_mm256_and_si256(pairs, odd));
            const float* x = values + half * 8;
            sums[half] = _mm256_fmadd_ps(w0, _mm256_loadu_ps(x), sums[half]);
            sums[2 + half] = _mm256_fmadd_ps(w1, _mm256_loadu_ps(x + 16), sums[2 + half]);
        }
    }
    return total(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), _mm256_add_ps(sums[2], sums[3])));
}

void multiply_bf16(const Tile& tile, const Block& block, int32_t stride, float* out) {
    for (int32_t row = 0; row < tile.rows; row++) {
        const uint8_t* weights = tile.codes + static_cast<int64_t>(row) * tile.columns * 2;
        for (int32_t t = 0; t < block.tokens; t++) {
            out[static_cast<int64_t>(t) * stride + row] =
                multiply_row(weights, tile.columns, block.values + t * kGroup,
                             static_cast<int64_t>(block.tokens) * kGroup);
        }
    }
}

void multiply(const Tile& tile, const Block* blocks, int32_t count, int32_t stride, float* out) {
    for (const Block* block = blocks; block < blocks + count; block++) {
        if (tile.format == RETINUE_BF16) multiply_bf16(tile, *block, stride, out);
        for (int32_t t = 0; t < block->tokens; t++, out += stride) {
            if (tile.format == RETINUE_INT4) multiply_codes<RETINUE_INT4>(tile, *block, t, out);
            if (tile.format == RETINUE_INT8) multiply_codes<RETINUE_INT8>(tile, *block, t, out);
        }
    }
}

}  // namespace

const Kernels* avx2_kernels() {
    static const Kernels table = {"avx2",   false,    load, store, round_to, prepare,
                                  activate, multiply, sum,  score, mix,   encode,
                                  decode,   unnest};
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &table : nullptr;
}

}  // namespace retinue

#else
namespace retinue {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace retinue
#endif
