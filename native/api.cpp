// The C interface: checks arguments, lets no exception out, chooses the instruction set.
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <new>

#include "kernels.h"
#include "pool.h"
#include "run.h"

namespace retinue {
namespace {

const Kernels& choose() {
    const Kernels* const found[] = {amx_kernels(), avx512_kernels(), avx2_kernels(),
                                    portable_kernels()};
    const char* wish = getenv("RETINUE_ISA");
    for (const Kernels* table : found) {
        if (table && wish && strcmp(table->name, wish) == 0) return *table;
    }
    for (const Kernels* table : found) {
        if (table) return *table;
    }
    return *portable_kernels();
}

bool is_format(int32_t format) { return format >= RETINUE_BF16 && format <= RETINUE_INT4; }
bool is_type(int32_t type) { return type >= RETINUE_TYPE_F32 && type <= RETINUE_TYPE_F16; }

bool is_matrix(const retinue_matrix* matrix) {
    return matrix && is_format(matrix->format) && matrix->rows > 0 && matrix->columns > 0 &&
           matrix->codes && (matrix->format == RETINUE_BF16 || matrix->scales);
}

bool is_shape(const retinue_experts_shape* shape) {
    return shape && is_format(shape->format) && is_type(shape->type) &&
           shape->activation >= RETINUE_SILU && shape->activation <= RETINUE_RELU &&
           shape->hidden > 0 && shape->inner > 0 && shape->k > 0;
}

bool are_parts(int32_t format, int32_t count, const int64_t* parts) {
    for (int32_t i = 0; i < 6 * count; i++) {
        const bool optional = format == RETINUE_BF16 && i % 2 == 1;
        if (!optional && parts[i] == 0) return false;
    }
    return true;
}

template <typename Function>
int32_t guarded(Function function) noexcept {
    try {
        function();
        return RETINUE_OK;
    } catch (...) {  // nothing else is thrown than what says that memory or threads are lacking
        return RETINUE_OUT_OF_MEMORY;
    }
}

void encode_rows(const void* x, int64_t x_stride, int32_t type, int32_t format, int32_t rows,
                 int32_t columns, uint8_t* codes, uint16_t* scales) {
    const int64_t element = type == RETINUE_TYPE_F32 ? 4 : 2;
    for (int32_t row = 0; row < rows; row += kLanes) {
        const int lanes = std::min(kLanes, rows - row);
        for (int32_t column = 0; column < columns; column += kGroup) {
            const int valid = std::min(kGroup, columns - column);
            float tile[kGroup * kLanes] = {};
            for (int lane = 0; lane < lanes; lane++) {
                float numbers[kGroup] = {};
                const int64_t first = (row + lane) * x_stride + column;
                kernels().load(static_cast<const uint8_t*>(x) + first * element, type, valid,
                               numbers);
                for (int c = 0; c < valid; c++) tile[c * kLanes + lane] = numbers[c];
            }
            kernels().encode(tile, format, codes, scales);
            codes += format == RETINUE_INT4 ? kLanes * kGroup / 2 : kLanes * kGroup;
            scales += kLanes;
        }
    }
}

void decode_rows(const retinue_matrix& matrix, int32_t type, uint8_t* out) {
    const int64_t element = type == RETINUE_TYPE_F32 ? 4 : 2;
    const auto* codes = static_cast<const uint8_t*>(matrix.codes);
    const auto* scales = static_cast<const uint16_t*>(matrix.scales);
    for (int32_t row = 0; row < matrix.rows; row += kLanes) {
        const int lanes = std::min(kLanes, matrix.rows - row);
        for (int32_t column = 0; column < matrix.columns; column += kGroup) {
            const int valid = std::min(kGroup, matrix.columns - column);
            float tile[kGroup * kLanes];
            kernels().decode(codes, scales, matrix.format, tile);
            for (int lane = 0; lane < lanes; lane++) {
                float numbers[kGroup];
                for (int c = 0; c < kGroup; c++) numbers[c] = tile[c * kLanes + lane];
                const int64_t first = static_cast<int64_t>(row + lane) * matrix.columns + column;
                kernels().store(numbers, type, valid, out + first * element);
            }
            codes += matrix.format == RETINUE_INT4 ? kLanes * kGroup / 2 : kLanes * kGroup;
            scales += kLanes;
        }
    }
}

// So many groups at a time: what stays in a core's cache.
constexpr int64_t kGroups = 32;

void unnest_groups(const uint16_t* scales, const uint8_t* const* given, int32_t bits,
                   int64_t groups, int32_t type, uint8_t* out) {
    const int64_t element = type == RETINUE_TYPE_F32 ? 4 : 2;
    const uint8_t* planes[3] = {given[0], given[1], given[2]};
    float numbers[kGroups * kGroup], own[kGroups];
    alignas(float) uint8_t rounded[kGroups * sizeof(float)];
    for (int64_t start = 0; start < groups; start += kGroups) {
        const int64_t count = std::min(kGroups, groups - start);
        kernels().load(scales + start, RETINUE_TYPE_BF16, count, own);
        kernels().store(own, type, count, rounded);
        kernels().load(rounded, type, count, own);
        kernels().unnest(planes, bits, own, count, numbers);
        planes[0] += count * kGroup * 2 / 8;
        if (bits > 2) planes[1] += count * kGroup * 2 / 8;
        if (bits > 4) planes[2] += count * kGroup * 4 / 8;
        kernels().store(numbers, type, count * kGroup, out + start * kGroup * element);
    }
}

}  // namespace

const Kernels& kernels() {
    static const Kernels& chosen = choose();
    return chosen;
}

}  // namespace retinue

using namespace retinue;

int32_t retinue_abi(void) { return RETINUE_ABI; }

const char* retinue_features(void) { return kernels().name; }

int32_t retinue_threads(int32_t threads, int32_t spin_us) {
    if (threads < 1 || spin_us < 0 || pool_begun()) return RETINUE_BAD_ARGUMENT;
    return guarded([&] { pool_resize(threads, spin_us); });
}

int32_t retinue_linear(const retinue_matrix* matrix, const void* x, int64_t x_stride, int32_t type,
                       int64_t tokens, const void* bias, void* out) {
    if (!is_matrix(matrix) || !is_type(type) || tokens < 0) return RETINUE_BAD_ARGUMENT;
    if (tokens == 0) return RETINUE_OK;
    if (!x || !out || x_stride < 0) return RETINUE_BAD_ARGUMENT;
    return guarded([&] { run_linear(*matrix, x, x_stride, type, tokens, bias, out); });
}

int32_t retinue_experts(const retinue_experts_shape* shape, int32_t count, const int64_t* parts,
                        const int64_t* starts, const int64_t* pairs, const void* x, float* rows) {
    if (!is_shape(shape) || count < 0) return RETINUE_BAD_ARGUMENT;
    if (count == 0) return RETINUE_OK;
    if (!parts || !starts || !pairs || !x || !rows || !are_parts(shape->format, count, parts)) {
        return RETINUE_BAD_ARGUMENT;
    }
    return guarded([&] { run_experts(*shape, count, parts, starts, pairs, x, rows); });
}

int32_t retinue_end_experts(void) {
    if (!pool_begun()) return RETINUE_BAD_ARGUMENT;
    return guarded([] { end_experts(); });
}

int32_t retinue_sum(const float* rows, const float* weights, int64_t tokens, int32_t k,
                    int32_t hidden, int32_t type, void* out) {
    if (tokens < 0 || k <= 0 || hidden <= 0 || !is_type(type)) return RETINUE_BAD_ARGUMENT;
    if (tokens == 0) return RETINUE_OK;
    if (!rows || !weights || !out) return RETINUE_BAD_ARGUMENT;
    return guarded([&] { run_sum(rows, weights, tokens, k, hidden, type, out); });
}

int32_t retinue_encode(const void* x, int64_t x_stride, int32_t type, int32_t format, int32_t rows,
                       int32_t columns, void* codes, void* scales) {
    const bool quantised = format == RETINUE_INT8 || format == RETINUE_INT4;
    if (!quantised || !is_type(type) || rows <= 0 || columns <= 0 || !x || !codes || !scales) {
        return RETINUE_BAD_ARGUMENT;
    }
    encode_rows(x, x_stride, type, format, rows, columns, static_cast<uint8_t*>(codes),
                static_cast<uint16_t*>(scales));
    return RETINUE_OK;
}

int32_t retinue_decode(const retinue_matrix* matrix, int32_t type, void* out) {
    if (!is_matrix(matrix) || matrix->format == RETINUE_BF16 || !is_type(type) || !out) {
        return RETINUE_BAD_ARGUMENT;
    }
    decode_rows(*matrix, type, static_cast<uint8_t*>(out));
    return RETINUE_OK;
}

int32_t retinue_unnest(const void* scales, const void* first, const void* second,
                       const void* third, int32_t bits, int64_t groups, int32_t type, void* out) {
    const bool known = bits == 2 || bits == 4 || bits == 8;
    if (!known || !is_type(type) || groups < 0) return RETINUE_BAD_ARGUMENT;
    if (groups == 0) return RETINUE_OK;
    if (!scales || !first || (bits > 2 && !second) || (bits > 4 && !third) || !out) {
        return RETINUE_BAD_ARGUMENT;
    }
    const uint8_t* const planes[3] = {static_cast<const uint8_t*>(first),
                                      static_cast<const uint8_t*>(second),
                                      static_cast<const uint8_t*>(third)};
    unnest_groups(static_cast<const uint16_t*>(scales), planes, bits, groups, type,
                  static_cast<uint8_t*>(out));
    return RETINUE_OK;
}
