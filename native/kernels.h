// What the parts of the library know of each other: the forms of the data, and one table of
// functions for each instruction set.
#ifndef RETINUE_KERNELS_H
#define RETINUE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "retinue.h"

namespace retinue {

constexpr int kLanes = 16;   // rows of a tile
constexpr int kGroup = 32;   // columns that share a scale
constexpr int kTokens = 16;  // tokens of a block at most

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Inputs of some tokens as the kernels read them: written once, read for every tile of rows. A
// kernel may read on behind each array, up to what 16 tokens would have in the last group.
struct Block {
    int32_t tokens;
    int8_t* codes;     // [groups][tokens][32]
    float* scales;     // [groups][tokens]
    int32_t* offsets;  // [groups][tokens]: -zero * sum of the codes, where a dot product starts
    // Of RETINUE_BF16 one of the two, the others are null:
    float* values;    // [groups][tokens][32], even columns before odd ones
    uint16_t* pairs;  // [groups][16][tokens][2]: bfloat16, two neighbouring columns together
};

// Sixteen rows of a matrix, or those that are left at its end.
struct Tile {
    int32_t format, rows, columns;
    const uint8_t* codes;
    const uint16_t* scales;  // [groups][16]

    int32_t groups() const { return static_cast<int32_t>(ceil_div(columns, kGroup)); }
};

// What one key head has of some tokens in a pool, F32 or BF16: row t lies `places[t] * pitch`
// numbers behind `at`.
struct Rows {
    const void* at;
    const int64_t* places;
    int64_t pitch, count;
    int32_t type, width;
};

struct Kernels {
    const char* name;
    bool pairs;  // whether bfloat16 times bfloat16 reads `pairs`
    // Numbers of a type to fp32 and back, rounded to nearest even.
    void (*load)(const void* x, int32_t type, int64_t count, float* out);
    void (*store)(const float* x, int32_t type, int64_t count, void* out);
    void (*round_to)(int32_t type, int64_t count, float* x);
    // Write groups `group`.. of `token`: x [groups][32], to the form of `format`.
    void (*prepare)(const float* x, int32_t format, int32_t groups, const Block& block,
                    int32_t token, int32_t group);
    // gate = activation(gate) * up, each step rounded to `type`.
    void (*activate)(int32_t activation, int32_t type, int64_t count, float* gate, float* up);
    // out[t * stride + lane] = the tile's rows times the tokens of all blocks.
    void (*multiply)(const Tile& tile, const Block* blocks, int32_t count, int32_t stride,
                     float* out);
    void (*sum)(const float* rows, const float* weights, int32_t k, int32_t hidden, float* out);
    // scores[g * stride + t] = query g of queries [group][width] times row t.
    void (*score)(const float* queries, int32_t group, const Rows& rows, int64_t stride,
                  float* scores);
    // out [group][width] += all rows by weights[g * stride + t].
    void (*mix)(const float* weights, int32_t group, const Rows& rows, int64_t stride, float* out);
    // A group of sixteen rows: x [32][16] to codes and scales, and back.
    void (*encode)(const float* x, int32_t format, uint8_t* codes, uint16_t* scales);
    void (*decode)(const uint8_t* codes, const uint16_t* scales, int32_t format, float* out);
    // Nested bits times their groups' scales: out [groups][32].
    void (*unnest)(const uint8_t* const* planes, int32_t bits, const float* scales, int64_t groups,
                   float* out);
};

// Null where the machine, or the compiler's target, has not the instructions.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels& kernels();

}  // namespace retinue
#endif
