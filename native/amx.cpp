// Kernels for AMX: a product of 16 tokens with 16 rows in one instruction. Each sum is made as in
// avx512.cpp, of the same groups in the same order, so that int8 and int4 give the same bits.
#include "attend.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace retinue {
namespace {

constexpr int kLeastTokens = 10;  // of a block; with fewer VNNI is faster
constexpr int kChunk = 64;       // groups of a tile that are unpacked at a time: 32 KiB
constexpr int kCodes = kLanes * kGroup;

// GCC 12 knows that few bytes, or none, are read by the instructions that load tiles and their
// shapes: before them, whatever was written must be in memory.
template <typename T>
inline void settle(const T& memory) {
    __asm__ volatile("" : : "r"(&memory) : "memory");
}

// The shapes of the eight tile registers, as the processor reads them.
struct alignas(64) Shapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int count, int bytes) {
        rows[tile] = static_cast<uint8_t>(count);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

// A tile's codes less their zero, [groups][8][16][4].
template <int FORMAT>
void unpack(const uint8_t* codes, int groups, int8_t* out) {
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i zero = _mm512_set1_epi8(FORMAT == RETINUE_INT4 ? 8 : -128);
    constexpr int kStep = FORMAT == RETINUE_INT4 ? 128 : 64;
    for (int i = 0; i < groups * kCodes; i += kStep, codes += 64) {
        const __m512i bytes = _mm512_loadu_si512(codes);
        if (FORMAT == RETINUE_INT4) {
            const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
            const __m512i lower = _mm512_and_si512(bytes, low);
            _mm512_store_si512(out + i, _mm512_sub_epi8(lower, zero));
            _mm512_store_si512(out + i + 64, _mm512_sub_epi8(upper, zero));
        } else {
            _mm512_store_si512(out + i, _mm512_sub_epi8(bytes, zero));
        }
    }
}

inline __m512 load_scales(const uint16_t* scales) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void add_scaled(const int32_t* dots, const uint16_t* scales, const float* x_scales,
                       __m512 (&sums)[kTokens]) {
    const __m512 scale = load_scales(scales);
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++) {
        const __m512 dot = _mm512_cvtepi32_ps(_mm512_load_si512(dots + t * kLanes));
        sums[t] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t])), sums[t]);
    }
}

// Some groups of a tile, unpacked.
struct Chunk {
    int first, groups;
    const uint16_t* scales;
    alignas(64) int8_t weights[kChunk * kCodes];
};

// The products of a group are scaled while those of the next two are made.
// Meanwhile memory is asked for `ahead`, some lines with each group; returns what comes then.
const uint8_t* multiply_codes(const Chunk& chunk, const Block& block, const uint8_t* ahead,
                              int lines, int32_t stride, float* out) {
    constexpr int kLag = 2;
    alignas(64) int32_t dots[2 * kLag][kTokens * kLanes];
    __m512 sums[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++) {
        const bool goes_on = chunk.first > 0 && t < block.tokens;
        sums[t] = goes_on ? _mm512_loadu_ps(out + static_cast<int64_t>(t) * stride)
                          : _mm512_setzero_ps();
    }
    const int64_t before = static_cast<int64_t>(chunk.first) * block.tokens;
    const int8_t* x = block.codes + before * kGroup;
    const float* x_scales = block.scales + before;
    for (int g = 0; g < chunk.groups + kLag; g++) {
        if (g < chunk.groups) {
            for (int i = 0; i < lines; i++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
            _tile_zero(0);
            _tile_loadd(1, x + g * block.tokens * kGroup, kGroup);
            _tile_loadd(2, chunk.weights + g * kCodes, 64);
            _tile_dpbssd(0, 1, 2);
            _tile_stored(0, dots[g % (2 * kLag)], 64);
        }
        if (g >= kLag) {
            const int done = g - kLag;
            add_scaled(dots[done % (2 * kLag)], chunk.scales + done * kLanes,
                       x_scales + done * block.tokens, sums);
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++) {
        if (t < block.tokens) _mm512_storeu_ps(out + static_cast<int64_t>(t) * stride, sums[t]);
    }
    return ahead;
}

template <int FORMAT>
void multiply_tile(const Tile& tile, const Block* blocks, int32_t count, int32_t stride,
                   float* out) {
    Chunk chunk;
    Shapes shapes;
    shapes.set(0, kTokens, 64);
    shapes.set(1, kTokens, kGroup);
    shapes.set(2, kGroup / 4, 64);
    settle(shapes);
    _tile_loadconfig(&shapes);
    constexpr int kBytes = FORMAT == RETINUE_INT4 ? kCodes / 2 : kCodes;
    for (int first = 0; first < tile.groups(); first += kChunk) {
        const int left = tile.groups() - first;
        const uint8_t* codes = tile.codes + static_cast<int64_t>(first) * kBytes;
        chunk.first = first;
        chunk.groups = left < kChunk ? left : kChunk;
        chunk.scales = tile.scales + first * kLanes;
        unpack<FORMAT>(codes, chunk.groups, chunk.weights);
        settle(chunk);
        // What is unpacked next is asked for while this is multiplied, evenly.
        const uint8_t* ahead = codes + chunk.groups * kBytes;
        const int lines = (kBytes / 64 + count - 1) / count;
        for (int32_t i = 0; i < count; i++) {
            ahead = multiply_codes(chunk, blocks[i], ahead, lines, stride,
                                   out + static_cast<int64_t>(i) * kTokens * stride);
        }
    }
    _tile_release();
}

// Rows to columns: at each step what differs in one bit of row and column changes places.
void transpose(float (&square)[kLanes][kLanes]) {
    __m512 rows[kLanes];
    for (int i = 0; i < kLanes; i++) rows[i] = _mm512_load_ps(square[i]);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int bit = 1; bit < kLanes; bit *= 2) {
        const __m512i step = _mm512_set1_epi32(bit);
        const __mmask16 set = _mm512_test_epi32_mask(lane, step);
        const __m512i other = _mm512_xor_si512(lane, step);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) {
            if (i & bit) continue;
            const __m512 upper = rows[i], lower = rows[i + bit];
            rows[i] = _mm512_mask_permutexvar_ps(upper, set, other, lower);
            rows[i + bit] = _mm512_mask_permutexvar_ps(lower, _knot_mask16(set), other, upper);
        }
    }
    for (int i = 0; i < kLanes; i++) _mm512_store_ps(square[i], rows[i]);
}

void store_sums(float (&square)[kLanes][kLanes], const Block& block, int32_t rows, int32_t stride,
                float* out) {
    transpose(square);
    const __mmask16 valid = static_cast<__mmask16>((1u << rows) - 1);
    for (int32_t t = 0; t < block.tokens; t++) {
        float* row = out + static_cast<int64_t>(t) * stride;
        _mm512_mask_storeu_ps(row, valid, _mm512_load_ps(square[t]));
    }
}

inline const uint16_t* pairs_of(const Block& block, int32_t group) {
    return block.pairs + static_cast<int64_t>(group) * block.tokens * kGroup;
}

// Up to four blocks: sixteen rows of weights as they lie, times pairs of columns of 16 tokens.
void multiply_pairs(const Tile& tile, const Block* blocks, int32_t count, int32_t stride,
                    float* out) {
    const int64_t row_bytes = static_cast<int64_t>(tile.columns) * 2;
    const int32_t groups = tile.groups();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int32_t g = 0; g < groups; g++) {
        const uint8_t* weights = tile.codes + g * 64;
        const int left = tile.columns - g * kGroup;
        alignas(64) uint8_t end[kLanes][64];
        if (left < kGroup) {  // what follows in memory is another row, or nothing at all
            const __mmask32 valid = (1u << left) - 1;
            for (int row = 0; row < tile.rows; row++) {
                _mm512_store_si512(end[row],
                                   _mm512_maskz_loadu_epi16(valid, weights + row * row_bytes));
            }
            settle(end);
        }
        // The next sixteen rows lie behind these: ask for them in the order of memory.
        const uint8_t* ahead = tile.codes + tile.rows * row_bytes + g * kLanes * 64;
        for (int i = 0; i < kLanes; i++) __builtin_prefetch(ahead + i * 64, 0, 2);
        const bool whole = left >= kGroup;
        _tile_loadd(4, whole ? weights : end[0], whole ? row_bytes : 64);
        _tile_loadd(5, pairs_of(blocks[0], g), blocks[0].tokens * 4);
        _tile_dpbf16ps(0, 4, 5);
        if (count > 1) {
            _tile_loadd(6, pairs_of(blocks[1], g), blocks[1].tokens * 4);
            _tile_dpbf16ps(1, 4, 6);
        }
        if (count > 2) {
            _tile_loadd(5, pairs_of(blocks[2], g), blocks[2].tokens * 4);
            _tile_dpbf16ps(2, 4, 5);
        }
        if (count > 3) {
            _tile_loadd(6, pairs_of(blocks[3], g), blocks[3].tokens * 4);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    alignas(64) float squares[4][kLanes][kLanes] = {};
    _tile_stored(0, squares[0], 64);
    _tile_stored(1, squares[1], 64);
    _tile_stored(2, squares[2], 64);
    _tile_stored(3, squares[3], 64);
    for (int32_t i = 0; i < count; i++, out += static_cast<int64_t>(kTokens) * stride) {
        store_sums(squares[i], blocks[i], tile.rows, stride, out);
    }
}

void multiply_bf16(const Tile& tile, const Block* blocks, int32_t count, int32_t stride,
                   float* out) {
    Shapes shapes;
    for (int i = 0; i < 5; i++) shapes.set(i, tile.rows, 64);
    for (int i = 5; i < 7; i++) shapes.set(i, kGroup / 2, 64);
    settle(shapes);
    _tile_loadconfig(&shapes);
    for (int32_t first = 0; first < count; first += 4) {
        const int32_t four = count - first < 4 ? count - first : 4;
        multiply_pairs(tile, blocks + first, four, stride,
                       out + static_cast<int64_t>(first) * kTokens * stride);
    }
    _tile_release();
}

void multiply(const Tile& tile, const Block* blocks, int32_t count, int32_t stride, float* out) {
    const bool pairs = tile.format == RETINUE_BF16 && blocks[0].pairs;
    if (pairs) return multiply_bf16(tile, blocks, count, stride, out);
    // All blocks but the last one have sixteen tokens.
    const bool last_too = blocks[count - 1].tokens >= kLeastTokens;
    const int32_t large = tile.format == RETINUE_BF16 ? 0 : last_too ? count : count - 1;
    if (large && tile.format == RETINUE_INT4) {
        multiply_tile<RETINUE_INT4>(tile, blocks, large, stride, out);
    } else if (large) {
        multiply_tile<RETINUE_INT8>(tile, blocks, large, stride, out);
    }
    if (large == count) return;
    avx512_kernels()->multiply(tile, blocks + large, count - large, stride,
                               out + static_cast<int64_t>(large) * kTokens * stride);
}

// The kernel lends the tiles' registers to processes that ask; a sandbox may refuse.
bool granted() {
    constexpr long kRequest = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool has_tiles() {
    unsigned a, b, c, d;
    if (!avx512_kernels()) return false;
    __asm__("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    return (d & wanted) == wanted && granted();
}

}  // namespace

const Kernels* amx_kernels() {
    static const Kernels table = {"avx512-amx", true,     load, store, round_to, prepare,
                                  activate,     multiply, sum,  score, mix,   encode,
                                  decode,       unnest};
    static const bool usable = has_tiles();
    return usable ? &table : nullptr;
}

}  // namespace retinue

#else
namespace retinue {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace retinue
#endif
