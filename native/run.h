// What is spread over the threads.
#ifndef RETINUE_RUN_H
#define RETINUE_RUN_H

#include "kernels.h"

namespace retinue {

// As in retinue.h, with arguments that were checked; may throw std::bad_alloc.
void run_linear(const retinue_matrix& matrix, const void* x, int64_t x_stride, int32_t type,
                int64_t tokens, const void* bias, void* out);
void run_experts(const retinue_experts_shape& shape, int32_t count, const int64_t* parts,
                 const int64_t* starts, const int64_t* pairs, const void* x, float* rows);
// A pair each, 2048 at most. What it is given has to last until the end, before which nobody begins.
void begin_experts(const retinue_experts_shape& shape, int32_t count, const int64_t* parts,
                   const int64_t* pairs, const void* x, float* rows);
void end_experts();

void run_sum(const float* rows, const float* weights, int64_t tokens, int32_t k, int32_t hidden,
             int32_t type, void* out);

}  // namespace retinue
#endif
