// A layer's routed experts within a step: who was chosen is grouped, computed and summed, in one go
// or, of a lone token, in two.
#include <string.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "pool.h"
#include "run.h"
#include "step.h"

namespace retinue {
namespace {

// Kept between calls, of which there is one at a time, and while something is begun.
struct Room {
    std::vector<int64_t> parts, starts, pairs;
    std::vector<float> rows, weights;
};
Room& room = *new Room;

bool all_there(const retinue_layer& layer, int64_t pairs) {
    return std::all_of(layer.index, layer.index + pairs, [&](int64_t id) {
        return id >= layer.experts || (id >= 0 && layer.slots[id] >= 0);
    });
}

// As a router chooses for a token. Who does not is left to the caller.
bool each_once(const retinue_layer& layer) {
    for (int32_t i = 0; i < layer.shape.k; i++) {
        const int64_t id = layer.index[i];
        if (id < 0 || id >= layer.experts) return false;
        if (std::find(layer.index, layer.index + i, id) != layer.index + i) return false;
    }
    return true;
}

// For each of the chosen experts that are there, in their order, its pairs and where its matrices
// lie.
void group(const retinue_layer& layer, int64_t pairs) {
    room.parts.clear();
    room.pairs.clear();
    room.starts.assign(1, 0);
    std::vector<int64_t>& order = room.pairs;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t id = layer.index[pair];
        if (id < layer.experts && layer.slots[id] >= 0) order.push_back(pair);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
        return layer.index[a] < layer.index[b];
    });
    const bool plain = layer.shape.format == RETINUE_BF16;
    for (size_t i = 0; i < order.size(); i++) {
        const int64_t id = layer.index[order[i]];
        // A lone token's experts are its own, as they are where the step runs in pieces.
        if (layer.tokens > 1 && i > 0 && layer.index[order[i - 1]] == id) {
            room.starts.back()++;
            continue;
        }
        const int64_t slot = reinterpret_cast<int64_t>(layer.slab) +
                             layer.slots[id] * layer.slot_bytes;
        for (int part = 0; part < 6; part++) {
            const bool none = plain && part % 2 == 1;  // plain numbers have no scales
            room.parts.push_back(none ? 0 : slot + layer.offsets[6 * id + part]);
        }
        room.starts.push_back(static_cast<int64_t>(i) + 1);
    }
}

void run_layer(const retinue_layer& layer, int64_t pairs) {
    const retinue_experts_shape& shape = layer.shape;
    group(layer, pairs);
    room.rows.resize(static_cast<size_t>(pairs * shape.hidden));
    if (static_cast<int64_t>(room.pairs.size()) < pairs) {
        std::fill(room.rows.begin(), room.rows.end(), 0.0f);
    }
    room.weights.resize(static_cast<size_t>(pairs));
    kernels().load(layer.weights, layer.weights_type, static_cast<int32_t>(pairs),
                   room.weights.data());
    run_experts(shape, static_cast<int32_t>(room.starts.size()) - 1, room.parts.data(),
                room.starts.data(), room.pairs.data(), layer.hidden, room.rows.data());
    run_sum(room.rows.data(), room.weights.data(), layer.tokens, shape.k, shape.hidden, shape.type,
            layer.out);
    memcpy(layer.noted, layer.index, static_cast<size_t>(pairs) * sizeof(int64_t));
    *layer.ran = 1;
}

// Of a lone token: note who was chosen, and begin with those that are there.
void begin(const retinue_layer& layer) {
    const int32_t k = layer.shape.k;
    memcpy(layer.noted, layer.index, static_cast<size_t>(k) * sizeof(int64_t));
    kernels().load(layer.weights, layer.weights_type, k, layer.given);
    group(layer, k);
    if (!room.pairs.empty()) {
        begin_experts(layer.shape, static_cast<int32_t>(room.pairs.size()), room.parts.data(),
                      room.pairs.data(), layer.hidden, layer.rows);
    }
    *layer.state = RETINUE_BEGUN;
}

// Whether the step goes on.
bool run(const retinue_layer& layer) {
    const int64_t pairs = static_cast<int64_t>(layer.tokens) * layer.shape.k;
    if (*layer.enabled == RETINUE_WHOLE) {
        if (!all_there(layer, pairs)) return false;
        run_layer(layer, pairs);
        return true;
    }
    if (*layer.enabled != RETINUE_BEGIN) return false;
    if (*layer.state == RETINUE_ATTENDED) {
        const retinue_experts_shape& shape = layer.shape;
        run_sum(layer.rows, layer.given, 1, shape.k, shape.hidden, shape.type, layer.out);
        *layer.state = RETINUE_IDLE;
        return true;
    }
    *layer.state = RETINUE_IDLE;  // whatever an interrupted step has left
    if (layer.tokens == 1 && each_once(layer)) begin(layer);
    return false;
}

}  // namespace
}  // namespace retinue

extern "C" int32_t retinue_run_layer(const retinue_layer* layer) {
    using Clock = std::chrono::steady_clock;
    if (retinue::pool_begun()) retinue::end_experts();
    const auto started = Clock::now();
    const bool goes_on = retinue::run(*layer);
    *layer->seconds += std::chrono::duration<double>(Clock::now() - started).count();
    return goes_on ? RETINUE_OK : RETINUE_ABSENT;
}
