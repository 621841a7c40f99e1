// A step of single tokens as a list of small instructions, and attention over stored keys.
//
// An instruction is one operation of torch on tensors of up to four dimensions, wherever they lie.
// Numbers are computed in fp32 and rounded to the type of the output, as torch does it: operation
// by operation. Integers pass through fp32 too, so those beyond 2^24 must not occur.
#ifndef RETINUE_STEP_H
#define RETINUE_STEP_H

#include "retinue.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

enum { RETINUE_TYPE_I64 = 3, RETINUE_TYPE_BOOL = 4 };  // beside the types of activations

enum {
    RETINUE_COPY = 0,  // out = a
    RETINUE_NEG,
    RETINUE_ABS,
    RETINUE_EXP,
    RETINUE_LOG,
    RETINUE_SQRT,
    RETINUE_RSQRT,
    RETINUE_RECIPROCAL,
    RETINUE_SIGMOID,
    RETINUE_TANH,
    RETINUE_SILU_OF,
    RETINUE_GELU_OF,
    RETINUE_GELU_TANH_OF,
    RETINUE_RELU_OF,
    RETINUE_SOFTPLUS,
    RETINUE_SIN,
    RETINUE_COS,
    RETINUE_NOT,
    RETINUE_CLAMP,     // to scalars[0] .. scalars[1]
    RETINUE_ADD = 32,  // a + scalars[0] * b
    RETINUE_SUB,       // a - scalars[0] * b
    RETINUE_MUL,
    RETINUE_DIV,
    RETINUE_POW,
    RETINUE_MAXIMUM,
    RETINUE_MINIMUM,
    RETINUE_EQUAL,
    RETINUE_UNEQUAL,
    RETINUE_LESS,
    RETINUE_AT_MOST,
    RETINUE_GREATER,
    RETINUE_AT_LEAST,
    RETINUE_AND,
    RETINUE_OR,
    RETINUE_WHERE = 64,  // a ? b : c
    RETINUE_SUM_OF = 96,  // over the last dimension; the output has none there
    RETINUE_MEAN_OF,
    RETINUE_MAX_OF,
    RETINUE_MIN_OF,
    RETINUE_SOFTMAX,       // over the last dimension
    // a [n, m]: out [n, k] the largest, b int64 their places; scalars: k, and whether in order.
    RETINUE_TOPK,
    RETINUE_ROWS,          // out [n, m] = a[b [n], m]
    RETINUE_PICK,          // out [n, k] = a[n, b [n, k]]
    RETINUE_PUT,           // out[n, b [n, k]] = a [n, k]
    RETINUE_PRODUCT = 128,  // out = retinue_linear of a; b: a retinue_matrix, c: its bias or null
    RETINUE_ATTEND,         // b: a retinue_attention
    RETINUE_EXPERTS,        // b: a retinue_layer
};

typedef struct {
    void* at;
    int64_t strides[4];  // elements; 0 repeats
    int64_t type;
} retinue_operand;

typedef struct {
    int32_t operation, dimensions;
    int64_t sizes[4];  // of the output; with RETINUE_SUM_OF and the like, of a
    double scalars[2];
    retinue_operand out, a, b, c;
} retinue_instruction;

// The sequences of a step: sequence s has its tokens at places[s][0 .. stops[s] - 1] of the pool,
// the last of them new; it attends from starts[s] on.
typedef struct {
    int64_t count;
    const int64_t* const* places;
    const int64_t* starts;
    const int64_t* stops;
} retinue_sequences;

// One layer's attention. Query [sequences, heads, width], new key [sequences, key_heads, width] and
// value [sequences, key_heads, value_width] of `type`, strides in elements; keys and values are the
// pools [places, key_heads, width]. out is contiguous: [sequences, heads, value_width].
// Scores are scaled, then capped: cap * tanh(score / cap), unless cap is 0. sinks [heads] of
// `type`, or null, take part in the sum of weights and give nothing.
typedef struct {
    int32_t type, heads, key_heads, width, value_width, reserved;
    float scale, cap;
    const retinue_sequences* sequences;
    const void *query, *key, *value, *sinks;
    int64_t query_strides[3], key_strides[3], value_strides[3];
    void *keys, *values, *out;
} retinue_attention;

// Store the new keys and values, and attend. F32 and BF16.
int32_t retinue_attend(const retinue_attention* attention);

// What may happen to a layer within a step, and what has.
enum { RETINUE_OFF = 0, RETINUE_WHOLE = 1, RETINUE_BEGIN = 2 };
enum { RETINUE_IDLE = 0, RETINUE_BEGUN = 1, RETINUE_ATTENDED = 2 };

// One layer's routed experts, in slots of `slot_bytes` from `slab` on.
// RETINUE_WHOLE  It runs if all that were chosen are there; their ids are noted for who keeps the
//     books.
// RETINUE_BEGIN  Of a lone token that chose each expert once, ids and weights are noted, other
//     threads begin with those that are there, and the step stops with the state RETINUE_BEGUN.
//     Whoever called it ends that, fills the rows that are left, says RETINUE_ATTENDED, and
//     evaluates on from this layer, whose rows are then summed.
// hidden and out [tokens, shape.hidden] of shape.type, index [tokens, shape.k], weights the same of
// `weights_type`; an id of `experts` or more is none.
typedef struct {
    retinue_experts_shape shape;
    int32_t tokens, experts, weights_type;
    const int32_t* enabled;  // RETINUE_OFF, ..
    const int32_t* slots;    // [experts]; below 0: it is not there
    const int64_t* offsets;  // [experts][6]: codes and scales of gate, up and down within a slot
    const uint8_t* slab;
    int64_t slot_bytes;
    const void* hidden;
    const int64_t* index;
    const void* weights;
    void* out;
    int64_t* noted;          // [tokens, shape.k], the ids
    int64_t* ran;            // set to 1
    double* seconds;         // that it took, added
    int32_t* state;          // RETINUE_IDLE, ..; this and what follows for RETINUE_BEGIN
    float* given;            // [shape.k], the weights
    float* rows;             // [shape.k, shape.hidden]
} retinue_layer;

// Run the layer, or begin or finish it; RETINUE_ABSENT where the step has to stop before it. What an
// earlier call has begun, and nobody has ended, is ended first: so long it has to last.
enum { RETINUE_ABSENT = 3 };
int32_t retinue_run_layer(const retinue_layer* layer);

// Run the instructions one after the other. `done` is how many ran: fewer than `count` where a
// layer was not to be run here, which is no error.
int32_t retinue_evaluate(const retinue_instruction* instructions, int64_t count, int64_t* done);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif
#endif
