// Numbers in memory as fp32, and back, with the rounding of torch.
#ifndef RETINUE_NUMBERS_H
#define RETINUE_NUMBERS_H

#include <cmath>
#include <cstring>

#include "step.h"

#define RETINUE_INLINE inline __attribute__((always_inline))
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
// The compiler makes the function for several processors, and the loader takes the best.
#define RETINUE_CLONES \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define RETINUE_CLONES
#endif

namespace {

RETINUE_INLINE float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float number;
    std::memcpy(&number, &wide, 4);
    return number;
}

RETINUE_INLINE uint16_t to_bf16(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// e^x to one unit in the last place; 0 below -87.
RETINUE_INLINE float exponential(float x) {
    const float clamped = x > 88.72284f ? 88.72284f : x;
    constexpr float whole = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
    const float n = (clamped * 1.44269504f + whole) - whole;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const float bounded = n < -126.0f ? -126.0f : n > 127.0f ? 127.0f : n;
    const int32_t bits = (static_cast<int32_t>(bounded) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    const float doubled = n > 127.0f ? 2.0f * (p * power) : p * power;
    const float inside = x < -87.0f ? 0.0f : x > 88.72284f ? x * 1e38f * 10.0f : doubled;
    return x != x ? x : inside;
}

// Sums in 16 lanes, then the lanes: always in the same order.
RETINUE_INLINE float sum_of(const float* a, int64_t n) {
    float lanes[16] = {};
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int64_t l = 0; l < 16; ++l) lanes[l] += a[i + l];
    for (int64_t l = 0; i + l < n; ++l) lanes[l] += a[i + l];
    for (int64_t width = 8; width > 0; width /= 2)
        for (int64_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
    return lanes[0];
}

template <class T, class F>
RETINUE_INLINE void load_as(const T* from, int64_t stride, int64_t n, float* to, F convert) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
    else if (stride == 0)
        for (int64_t i = 0; i < n; ++i) to[i] = convert(*from);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i * stride]);
}

template <class T, class F>
RETINUE_INLINE void store_as(T* to, int64_t stride, int64_t n, const float* from, F convert) {
    if (stride == 1)
        for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i * stride] = convert(from[i]);
}

// n numbers of the operand, `offset` elements from its begin.
RETINUE_INLINE void load(const retinue_operand& o, int64_t offset, int64_t stride, int64_t n,
                         float* to) {
    switch (o.type) {
        case RETINUE_TYPE_F32:
            load_as(static_cast<const float*>(o.at) + offset, stride, n, to,
                    [](float x) { return x; });
            break;
        case RETINUE_TYPE_BF16:
            load_as(static_cast<const uint16_t*>(o.at) + offset, stride, n, to, from_bf16);
            break;
        case RETINUE_TYPE_I64:
            load_as(static_cast<const int64_t*>(o.at) + offset, stride, n, to,
                    [](int64_t x) { return static_cast<float>(x); });
            break;
        default:
            load_as(static_cast<const uint8_t*>(o.at) + offset, stride, n, to,
                    [](uint8_t x) { return x ? 1.0f : 0.0f; });
    }
}

RETINUE_INLINE void store(const retinue_operand& o, int64_t offset, int64_t stride, int64_t n,
                          const float* from) {
    switch (o.type) {
        case RETINUE_TYPE_F32:
            store_as(static_cast<float*>(o.at) + offset, stride, n, from,
                     [](float x) { return x; });
            break;
        case RETINUE_TYPE_BF16:
            store_as(static_cast<uint16_t*>(o.at) + offset, stride, n, from, to_bf16);
            break;
        case RETINUE_TYPE_I64:
            store_as(static_cast<int64_t*>(o.at) + offset, stride, n, from,
                     [](float x) { return static_cast<int64_t>(x); });
            break;
        default:
            store_as(static_cast<uint8_t*>(o.at) + offset, stride, n, from,
                     [](float x) { return static_cast<uint8_t>(x != 0); });
    }
}

}  // namespace
#endif
