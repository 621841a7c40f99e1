// Calls every function of the library with memory that ends where the header says that it ends,
// for a sanitizer to watch. Prints the instructions in use; a wrong answer is an exit code.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "../native/retinue.h"
#include "../native/step.h"

namespace {

uint32_t state = 1;

uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }

// Exactly `bytes` bytes of noise, `shift` bytes behind an aligned address.
struct Memory {
    Memory(size_t bytes, size_t shift) : whole(new uint8_t[bytes + shift]), data(&whole[shift]) {
        for (size_t i = 0; i < bytes; i++) data[i] = static_cast<uint8_t>(1 + draw() % 255);
    }
    // Small finite numbers instead of noise.
    void numbers(int32_t type, size_t count) {
        for (size_t i = 0; i < count; i++) {
            const float number = static_cast<float>(draw() % 2001) / 1000.0f - 1.0f;
            uint32_t bits;
            memcpy(&bits, &number, 4);
            const uint16_t half = type == RETINUE_TYPE_F16 ? 0x3800 | (draw() & 0x3ff) : bits >> 16;
            if (type == RETINUE_TYPE_F32) {
                memcpy(data + 4 * i, &bits, 4);
            } else {
                memcpy(data + 2 * i, &half, 2);
            }
        }
    }
    std::unique_ptr<uint8_t[]> whole;
    uint8_t* data;
};

size_t size_of(int32_t type) { return type == RETINUE_TYPE_F32 ? 4 : 2; }

void require(bool condition, const char* what) {
    if (condition) return;
    fprintf(stderr, "failed: %s\n", what);
    exit(1);
}

struct Matrix {
    Matrix(int32_t format, int32_t rows, int32_t columns)
        : tiles(static_cast<size_t>((rows + 15) / 16) * ((columns + 31) / 32)),
          codes(format == RETINUE_BF16 ? 2ul * rows * columns
                                       : tiles * (format == RETINUE_INT4 ? 256 : 512),
                2),
          scales(tiles * 32, 2) {
        if (format == RETINUE_BF16) codes.numbers(RETINUE_TYPE_BF16, 1ul * rows * columns);
        scales.numbers(RETINUE_TYPE_BF16, tiles * 16);
        matrix = {codes.data, format == RETINUE_BF16 ? nullptr : scales.data, format, rows,
                  columns, 0};
    }
    size_t tiles;
    Memory codes, scales;
    retinue_matrix matrix;
};

void linear(int32_t format, int32_t type, int32_t rows, int32_t columns, int32_t tokens) {
    const Matrix weight(format, rows, columns);
    const int32_t stride = columns + 3;
    const size_t held = 1ul * (tokens - 1) * stride + columns;
    Memory x(held * size_of(type), 2 * size_of(type)), bias(rows * size_of(type), 0);
    x.numbers(type, held);
    bias.numbers(type, rows);
    Memory out(1ul * tokens * rows * size_of(type), 0);
    require(retinue_linear(&weight.matrix, x.data, stride, type, tokens, bias.data, out.data) == 0,
            "linear");
    if (format == RETINUE_BF16) return;
    Memory numbers(1ul * rows * columns * size_of(type), 0);
    require(retinue_decode(&weight.matrix, type, numbers.data) == 0, "decode");
    require(retinue_encode(numbers.data, columns, type, format, rows, columns, weight.codes.data,
                           weight.scales.data) == 0,
            "encode");
}

void nested(int32_t bits, int32_t type, int64_t groups) {
    const Memory scales(2 * groups, 2), first(8 * groups, 1), second(8 * groups, 3);
    const Memory third(16 * groups, 0), out(groups * 32 * size_of(type), 0);
    require(retinue_unnest(scales.data, first.data, bits > 2 ? second.data : nullptr,
                           bits > 4 ? third.data : nullptr, bits, groups, type, out.data) == 0,
            "unnest");
}

void experts(int32_t format, int32_t type, int32_t hidden, int32_t inner, int32_t tokens) {
    const int32_t count = 3, k = 2;
    std::vector<std::unique_ptr<Matrix>> matrices;
    std::vector<int64_t> parts, starts = {0}, pairs;
    for (int32_t e = 0; e < count; e++) {
        for (int part = 0; part < 3; part++) {
            const bool down = part == 2;
            matrices.push_back(std::make_unique<Matrix>(format, down ? hidden : inner,
                                                        down ? inner : hidden));
            parts.push_back(reinterpret_cast<int64_t>(matrices.back()->matrix.codes));
            parts.push_back(reinterpret_cast<int64_t>(matrices.back()->matrix.scales));
        }
        for (int32_t pair = e; pair < tokens * k; pair += count + 1) pairs.push_back(pair);
        starts.push_back(static_cast<int64_t>(pairs.size()));
    }
    Memory x(1ul * tokens * hidden * size_of(type), 0);
    x.numbers(type, 1ul * tokens * hidden);
    std::vector<float> rows(1ul * tokens * k * hidden, 7.0f), weights(tokens * k, 0.5f);
    for (int32_t activation = RETINUE_SILU; activation <= RETINUE_RELU; activation++) {
        const retinue_experts_shape shape = {format, type, activation, hidden, inner, k};
        require(retinue_experts(&shape, count, parts.data(), starts.data(), pairs.data(), x.data,
                                rows.data()) == 0,
                "experts");
    }
    if (tokens > 1) require(rows[3ul * hidden] == 7.0f, "a pair of no expert kept its row");
    Memory out(1ul * tokens * hidden * size_of(type), 0);
    require(retinue_sum(rows.data(), weights.data(), tokens, k, hidden, type, out.data) == 0,
            "sum");
}

// A layer of a step whose tokens chose some of three experts in slots, or none.
void layer(int32_t format, int32_t type, int32_t hidden, int32_t inner, int32_t tokens) {
    const int32_t count = 3, k = 2;
    std::vector<int64_t> offsets, index;
    size_t slot_bytes = 0;
    for (int part = 0; part < 3; part++) {
        const int32_t rows = part == 2 ? hidden : inner, columns = part == 2 ? inner : hidden;
        const size_t tiles = static_cast<size_t>((rows + 15) / 16) * ((columns + 31) / 32);
        const size_t codes = format == RETINUE_BF16 ? 2ul * rows * columns
                                                    : tiles * (format == RETINUE_INT4 ? 256 : 512);
        offsets.push_back(static_cast<int64_t>(slot_bytes));
        offsets.push_back(static_cast<int64_t>(slot_bytes + codes));
        slot_bytes += codes + (format == RETINUE_BF16 ? 0 : tiles * 32);
    }
    for (int32_t i = 6; i < 6 * count; i++) offsets.push_back(offsets[i % 6]);
    Memory slab(slot_bytes * count, 0);
    slab.numbers(RETINUE_TYPE_BF16, slot_bytes * count / 2);
    for (int32_t pair = 0; pair < tokens * k; pair++) index.push_back(draw() % (count + 1));
    Memory x(1ul * tokens * hidden * size_of(type), 0);
    Memory out(1ul * tokens * hidden * size_of(type), 0);
    Memory weights(1ul * tokens * k * size_of(type), 0);
    x.numbers(type, 1ul * tokens * hidden);
    weights.numbers(type, 1ul * tokens * k);
    std::vector<int64_t> noted(index.size());
    int32_t enabled = RETINUE_WHOLE, state = RETINUE_IDLE, slots[3] = {2, 0, 1};
    std::vector<float> given(k), rows(1ul * k * hidden);
    int64_t ran = 0;
    double seconds = 0;
    const retinue_layer made = {{format, type, RETINUE_SILU, hidden, inner, k}, tokens, count, type,
                                &enabled, slots, offsets.data(), slab.data,
                                static_cast<int64_t>(slot_bytes), x.data, index.data(),
                                weights.data, out.data, noted.data(), &ran, &seconds,
                                &state, given.data(), rows.data()};
    require(retinue_run_layer(&made) == 0 && ran == 1 && noted == index, "layer");
    enabled = RETINUE_OFF;
    require(retinue_run_layer(&made) == RETINUE_ABSENT, "a layer that may not run");
    enabled = RETINUE_BEGIN;
    if (tokens > 1) {
        require(retinue_run_layer(&made) == RETINUE_ABSENT && state == RETINUE_IDLE, "several");
        return;
    }
    for (int64_t there = 0; there <= k; there++) {  // beside other calls
        index = {2, 0};
        slots[0] = there > 1 ? 2 : -1;
        slots[2] = there > 0 ? 1 : -1;
        require(retinue_run_layer(&made) == RETINUE_ABSENT && state == RETINUE_BEGUN, "begin");
        linear(format, type, 33, 70, 3);
        require(retinue_end_experts() == (there > 0 ? RETINUE_OK : RETINUE_BAD_ARGUMENT), "end");
        state = RETINUE_ATTENDED;
        require(retinue_run_layer(&made) == RETINUE_OK && state == RETINUE_IDLE, "finish");
    }
    require(retinue_run_layer(&made) == RETINUE_ABSENT, "begin");
    require(retinue_run_layer(&made) == RETINUE_ABSENT && state == RETINUE_BEGUN,
            "what was begun and not ended is ended first");
    require(retinue_end_experts() == RETINUE_OK, "end");
}

// Two sequences whose tokens lie anywhere in pools that end with the last of them.
void attend(int32_t type, int32_t key_heads, int32_t group, int32_t width, int32_t wide) {
    const int64_t lengths[] = {1, 53}, starts[] = {0, 4};
    std::vector<int64_t> first = {7}, second;
    for (int64_t t = 0; t < lengths[1]; t++) second.push_back((t * 29 + 8) % 54);
    const int64_t* places[] = {first.data(), second.data()};
    const int32_t heads = key_heads * group;
    const auto made = [&](size_t count) {
        auto memory = std::make_unique<Memory>(count * size_of(type), 0);
        memory->numbers(type, count);
        return memory;
    };
    const auto query = made(2ul * heads * width), key = made(2ul * key_heads * width);
    const auto value = made(2ul * key_heads * wide), sinks = made(heads);
    const auto keys = made(54ul * key_heads * width), values = made(54ul * key_heads * wide);
    const Memory out(2ul * heads * wide * size_of(type), 0);
    const retinue_sequences sequences = {2, places, starts, lengths};
    const retinue_attention made_of = {
        type, heads, key_heads, width, wide, 0, 0.5f, 3.0f, &sequences, query->data, key->data,
        value->data, sinks->data, {1l * heads * width, width, 1}, {1l * key_heads * width, width, 1},
        {1l * key_heads * wide, wide, 1}, keys->data, values->data, out.data};
    require(retinue_attend(&made_of) == 0, "attend");
}

}  // namespace

int main() {
    const int32_t sizes[][3] = {{1, 1, 1}, {16, 32, 2}, {33, 70, 17}, {50, 2081, 12}, {40, 96, 67}};
    for (int32_t threads = 1; threads <= 3; threads += 2) {
        require(retinue_threads(threads, 20) == 0, "threads");
        for (int32_t format = RETINUE_BF16; format <= RETINUE_INT4; format++) {
            for (int32_t type = RETINUE_TYPE_F32; type <= RETINUE_TYPE_F16; type++) {
                for (const auto& size : sizes) {
                    linear(format, type, size[0], size[1], size[2]);
                    experts(format, type, size[0], size[1] > 100 ? 100 : size[1], size[2]);
                    layer(format, type, size[0], size[1] > 100 ? 100 : size[1], size[2]);
                }
            }
        }
        experts(RETINUE_INT4, RETINUE_TYPE_F32, 24, 40, 1500);
        for (int32_t type = RETINUE_TYPE_F32; type <= RETINUE_TYPE_BF16; type++) {
            attend(type, 3, 1, 7, 5);
            attend(type, 2, 13, 24, 40);
            attend(type, 8, 2, 128, 128);
        }
    }
    for (int32_t bits = 2; bits <= 8; bits *= 2) {
        for (int32_t type = RETINUE_TYPE_F32; type <= RETINUE_TYPE_F16; type++) {
            for (int64_t groups : {0, 1, 33}) nested(bits, type, groups);
        }
    }
    require(retinue_unnest(&state, &state, nullptr, nullptr, 4, 1, 0, &state) != RETINUE_OK,
            "a plane that lacks is refused");
    const retinue_matrix wrong = {nullptr, nullptr, RETINUE_INT4, 1, 1, 0};
    require(retinue_linear(&wrong, &wrong, 1, 0, 1, nullptr, nullptr) == RETINUE_BAD_ARGUMENT,
            "a wrong argument is refused");
    require(retinue_threads(0, 0) == RETINUE_BAD_ARGUMENT, "no threads are refused");
    puts(retinue_features());
    return 0;
}
