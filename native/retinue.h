// Kernels for experts and linear layers on a CPU, behind a plain C interface.
//
// Every matrix is [rows, columns]: one row an output, as torch's Linear stores it.
//
// RETINUE_BF16  row after row, as in a checkpoint. Codes may lie at any even address.
// RETINUE_INT8, RETINUE_INT4  in tiles of 16 rows (lanes) by 32 columns (a group with one scale):
//     value of row r*16 + lane, column g*32 + c  =  (code - zero) * scales[r][g][lane]
//     scales  bfloat16 [R][G][16], R = ceil(rows / 16), G = ceil(columns / 32)
//     int8    zero 128, one byte a code, codes 1..255:    codes[R][G][8][16][4],
//             byte [q][lane][j] is column q*4 + j
//     int4    zero 8, two codes a byte:                   codes[R][G][4][16][4],
//             byte [q][lane][j] holds column q*8 + j in its lower half, q*8 + 4 + j in its upper
//     Where rows or columns end within a tile, the rest has codes of zero and counts for nothing.
//
// With int8 and int4 a token is quantised too, in the same groups of 32 columns: scale = largest
// magnitude / 127, code = nearest integer, ties to even. Products of codes are summed in int32 and
// the groups' sums in fp32, one after the other: sum = fma(sum_of_codes, weight_scale * x_scale,
// sum). So what a token gets depends neither on the other tokens of a call nor on the threads, nor
// on the instructions. With bf16 it does not depend on the threads; a lone token may be summed in
// another order than several, of which each gets the same whatever the others are.
//
// Every function returns 0, or a RETINUE_ error; nothing is thrown and nothing printed. Two
// threads at once may call `retinue_encode`, `retinue_decode`, `retinue_unnest` and
// `retinue_features`, no others.
#ifndef RETINUE_H
#define RETINUE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

#define RETINUE_ABI 5  // changes with anything below, or in step.h

enum { RETINUE_OK = 0, RETINUE_BAD_ARGUMENT = 1, RETINUE_OUT_OF_MEMORY = 2 };
enum { RETINUE_BF16 = 0, RETINUE_INT8 = 1, RETINUE_INT4 = 2 };               // of weights
enum { RETINUE_TYPE_F32 = 0, RETINUE_TYPE_BF16 = 1, RETINUE_TYPE_F16 = 2 };  // of activations
enum { RETINUE_SILU = 0, RETINUE_GELU = 1, RETINUE_GELU_TANH = 2, RETINUE_RELU = 3 };

int32_t retinue_abi(void);

// What runs: "avx512-amx", "avx512-vnni", "avx2", "neon" or "portable"; RETINUE_ISA in the
// environment may name a lesser one that this machine has too.
const char* retinue_features(void);

// Compute with `threads` threads, the caller among them; the others wait for work spinning for
// `spin_us` microseconds, then asleep. Called again it changes both; 1 ends the others.
int32_t retinue_threads(int32_t threads, int32_t spin_us);

typedef struct {
    const void* codes;
    const void* scales;  // null for RETINUE_BF16
    int32_t format, rows, columns, reserved;
} retinue_matrix;

// out[tokens][rows] = x[tokens][columns] times the transposed matrix, summed in fp32 and rounded
// once to the type of x and out; `bias`, of that type too, [rows] or null, is added before.
// x_stride: elements between tokens.
int32_t retinue_linear(const retinue_matrix* matrix, const void* x, int64_t x_stride, int32_t type,
                       int64_t tokens, const void* bias, void* out);

typedef struct {
    int32_t format, type, activation;
    int32_t hidden, inner;
    int32_t k;          // pairs a token
} retinue_experts_shape;

// Run `count` experts: rows[pair] = down(activation(gate(x)) * up(x)) for the pairs of each one.
// parts     [count][6] addresses: codes and scales (0 for bf16) of gate, of up [inner, hidden],
//           of down [hidden, inner]
// starts    [count + 1]: expert e has pairs[starts[e]] .. pairs[starts[e + 1] - 1]
// pairs     token * k + rank; a pair of no expert keeps its row
// x         [tokens, hidden] of `type`, contiguous
// rows      fp32 [tokens * k, hidden]
// bf16 rounds to `type` where eager torch does: gate, up, the activation, the product, the row.
// int8 and int4 keep fp32 in between. At most 2048 pairs are worked on at a time; the memory for
// it, 2048 * (hidden + inner) times 1.25 bytes (int8, int4), 2 (bf16) or 4 (bf16 times fp32 or
// fp16) and 0.3 MB a thread, is kept between calls.
int32_t retinue_experts(const retinue_experts_shape* shape, int32_t count, const int64_t* parts,
                        const int64_t* starts, const int64_t* pairs, const void* x, float* rows);

// Compute what is left of what `retinue_run_layer` has begun. Until then every other function may be
// called, and computes on the caller's thread, but for `retinue_threads`, which refuses.
int32_t retinue_end_experts(void);

// out[t] = sum over k, in order, in fp32, of weights[t][k] * rows[t * k + rank], rounded to `type`.
// weights: fp32 [tokens, k].
int32_t retinue_sum(const float* rows, const float* weights, int64_t tokens, int32_t k,
                    int32_t hidden, int32_t type, void* out);

// Quantise x [rows, columns] of `type` (row after row, `x_stride` elements apart) to the matrix's
// format: of scales near largest / 8 (largest / 127 for int8) the one with the least squared error.
// On the caller's thread alone.
int32_t retinue_encode(const void* x, int64_t x_stride, int32_t type, int32_t format, int32_t rows,
                       int32_t columns, void* codes, void* scales);

// The numbers that the matrix stands for, to out [rows, columns] of `type`. On the caller's thread.
int32_t retinue_decode(const retinue_matrix* matrix, int32_t type, void* out);

// What the first 2, 4 or 8 `bits` of weights in nested planes stand for, to out [groups][32] of
// `type`. Planes of 2, 2 and 4 bits, the upper ones first, the first weight lowest in a byte; those
// beyond `bits` may be null. scales: bfloat16 [groups], rounded to `type`; a code c stands for
// ((c + 0.5) / 2^(bits - 1) - 1) * scale, with 2 bits times 15/16. On the caller's thread.
int32_t retinue_unnest(const void* scales, const void* first, const void* second,
                       const void* third, int32_t bits, int64_t groups, int32_t type, void* out);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
