// Kernels in plain C++, for any machine.
#include "attend.h"

namespace retinue {
namespace {

// A group's codes less their zero, as integers [8][16][4].
void unpack(const uint8_t* codes, int32_t format, int8_t* out) {
    for (int q = 0; q < 8; q++) {
        for (int i = 0; i < 4 * kLanes; i++) {
            const int pair = format == RETINUE_INT4 ? codes[q / 2 * 4 * kLanes + i] : 0;
            const int four = (q % 2 ? pair >> 4 : pair & 15) - 8;
            const int at = q * 4 * kLanes + i;
            out[at] = static_cast<int8_t>(format == RETINUE_INT4 ? four : codes[at] - 128);
        }
    }
}

void add_group(const int8_t* weights, const uint16_t* scales, const int8_t* x, float x_scale,
               float* out) {
    for (int lane = 0; lane < kLanes; lane++) {
        int32_t dot = 0;
        for (int c = 0; c < kGroup; c++) {
            dot += weights[(c / 4 * kLanes + lane) * 4 + c % 4] * x[c];
        }
        const float scale = bf16_to_float(scales[lane]) * x_scale;
        out[lane] = __builtin_fmaf(static_cast<float>(dot), scale, out[lane]);
    }
}

void multiply_codes(const Tile& tile, const Block& block, int32_t stride, float* out) {
    const int code_bytes = kLanes * kGroup / (tile.format == RETINUE_INT4 ? 2 : 1);
    for (int32_t g = 0; g < tile.groups(); g++) {
        int8_t weights[kGroup * kLanes];
        unpack(tile.codes + static_cast<int64_t>(g) * code_bytes, tile.format, weights);
        for (int32_t t = 0; t < block.tokens; t++) {
            const int64_t at = static_cast<int64_t>(g) * block.tokens + t;
            add_group(weights, tile.scales + g * kLanes, block.codes + at * kGroup,
                      block.scales[at], out + static_cast<int64_t>(t) * stride);
        }
    }
}

void multiply_bf16(const Tile& tile, const Block& block, int32_t stride, float* out) {
    for (int32_t row = 0; row < tile.rows; row++) {
        const uint8_t* weights = tile.codes + static_cast<int64_t>(row) * tile.columns * 2;
        for (int32_t t = 0; t < block.tokens; t++) {
            float sums[2] = {};
            for (int32_t c = 0; c < tile.columns; c++) {
                uint16_t weight;
                memcpy(&weight, weights + 2 * c, sizeof weight);
                const int64_t at = static_cast<int64_t>(c / kGroup) * block.tokens + t;
                const int half = c % 2 * (kGroup / 2);
                sums[c % 2] += bf16_to_float(weight) *
                               block.values[at * kGroup + half + c % kGroup / 2];
            }
            out[static_cast<int64_t>(t) * stride + row] = sums[0] + sums[1];
        }
    }
}

void multiply(const Tile& tile, const Block* blocks, int32_t count, int32_t stride, float* out) {
    for (const Block* block = blocks; block < blocks + count; block++) {
        for (int32_t t = 0; t < block->tokens; t++) {
            memset(out + static_cast<int64_t>(t) * stride, 0, kLanes * sizeof(float));
        }
        if (tile.format == RETINUE_BF16) {
            multiply_bf16(tile, *block, stride, out);
        } else {
            multiply_codes(tile, *block, stride, out);
        }
        out += static_cast<int64_t>(block->tokens) * stride;
    }
}

}  // namespace

const Kernels* portable_kernels() {
    static const Kernels table = {"portable", false, load, store, round_to, prepare, activate,
                                  multiply, sum, score, mix, encode, decode, unnest};
    return &table;
}

}  // namespace retinue
