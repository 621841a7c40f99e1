// Spreads a call over the threads in units of 32 rows: so one unit of gate and up is one group of
// columns for down, and whoever computed it also prepares it.
#include "run.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "pool.h"
#include "scratch.h"

namespace retinue {
namespace {

constexpr int kUnitRows = kGroup;
// Tokens that are worked on at once, which bounds the scratch; more go in turns.
constexpr int64_t kTurn = 2048, kMostOfOne = 512;

// Where a call works: what all of its threads see, and what each has to itself.
struct Workspace {
    Scratch call;
    std::vector<Scratch> threads;

    void reserve_threads(size_t bytes) {
        threads.resize(std::max<size_t>(threads.size(), pool_threads()));
        for (Scratch& scratch : threads) scratch.reserve(bytes);
    }
};

// Never freed: a thread that still computes while the process ends must not lose them. What was
// begun has one of its own, as other calls come before its end.
Workspace& workspace = *new Workspace;
Workspace& begun_workspace = *new Workspace;

int64_t element_bytes(int32_t type) { return type == RETINUE_TYPE_F32 ? 4 : 2; }

const uint8_t* at(const void* base, int64_t element, int32_t type) {
    return static_cast<const uint8_t*>(base) + element * element_bytes(type);
}

Tile tile_of(const retinue_matrix& matrix, int64_t index) {
    const int64_t first = index * kLanes;
    const int32_t rows = static_cast<int32_t>(std::min<int64_t>(kLanes, matrix.rows - first));
    const int64_t numbers = ceil_div(matrix.columns, kGroup) * kGroup * kLanes;
    const auto* codes = static_cast<const uint8_t*>(matrix.codes);
    const auto* scales = static_cast<const uint16_t*>(matrix.scales);
    if (matrix.format == RETINUE_BF16) {
        return {matrix.format, rows, matrix.columns, codes + first * matrix.columns * 2, nullptr};
    }
    const int64_t bytes = matrix.format == RETINUE_INT4 ? numbers / 2 : numbers;
    return {matrix.format, rows, matrix.columns, codes + index * bytes,
            scales + index * (numbers / kGroup)};
}

// out[t][32] = rows 32 * unit .. of the matrix times all tokens; rows that do not exist get 0.
void multiply_unit(const retinue_matrix& matrix, int64_t unit, const Block* blocks, int32_t count,
                   int32_t tokens, float* out) {
    if ((unit + 1) * kUnitRows > matrix.rows) {
        memset(out, 0, static_cast<size_t>(tokens) * kUnitRows * sizeof(float));
    }
    for (int half = 0; half < 2; half++) {
        const int64_t index = unit * 2 + half;
        if (index * kLanes >= matrix.rows) break;
        kernels().multiply(tile_of(matrix, index), blocks, count, kUnitRows, out + half * kLanes);
    }
    const int64_t rows = std::min<int64_t>(kUnitRows, matrix.rows - unit * kUnitRows);
    if (rows == kUnitRows) return;
    for (int32_t t = 0; t < tokens; t++) {
        std::fill(out + t * kUnitRows + rows, out + (t + 1) * kUnitRows, 0.0f);
    }
}

// One token's numbers to fp32, zeros up to a whole group, and into its block.
void prepare_token(const void* x, int32_t type, int32_t format, int32_t columns,
                   const Block& block, int32_t token, Scratch& scratch) {
    const int32_t groups = static_cast<int32_t>(ceil_div(columns, kGroup));
    const int64_t padded = static_cast<int64_t>(groups) * kGroup;
    scratch.reserve(Scratch::size<float>(padded));
    float* row = scratch.take<float>(padded);
    std::fill(row + columns, row + padded, 0.0f);
    kernels().load(x, type, columns, row);
    kernels().prepare(row, format, groups, block, token, 0);
}

// Some tokens of one expert, and where they are worked on.
struct Turn {
    int32_t tokens;
    const int64_t* pairs;
    retinue_matrix gate, up, down;
    std::vector<Block> x, hidden;
};

std::vector<Block> take_blocks(Scratch& scratch, Form form, int32_t columns, int32_t tokens) {
    std::vector<Block> blocks;
    const int32_t groups = static_cast<int32_t>(ceil_div(columns, kGroup));
    for (int32_t first = 0; first < tokens; first += kTokens) {
        const int32_t count = std::min<int32_t>(kTokens, tokens - first);
        blocks.push_back(take_block(scratch, form, groups, count));
    }
    return blocks;
}

size_t blocks_bytes(Form form, int32_t columns, int64_t tokens) {
    const int32_t groups = static_cast<int32_t>(ceil_div(columns, kGroup));
    const int32_t rest = static_cast<int32_t>(tokens % kTokens);
    return tokens / kTokens * block_bytes(form, groups, kTokens) +
           (rest ? block_bytes(form, groups, rest) : 0);
}

class Experts {
  public:
    Experts(const retinue_experts_shape& shape, const void* x, float* rows, Workspace& workspace)
        : shape_(shape), x_(x), rows_(rows), workspace_(workspace),
          rounding_(shape.format == RETINUE_BF16 ? shape.type : RETINUE_TYPE_F32) {}

    void add(const int64_t* parts, const int64_t* pairs, int32_t tokens) {
        const auto matrix = [&](int i, int32_t rows, int32_t columns) {
            return retinue_matrix{reinterpret_cast<const void*>(parts[2 * i]),
                                  reinterpret_cast<const void*>(parts[2 * i + 1]),
                                  shape_.format, rows, columns, 0};
        };
        turns_.push_back({tokens, pairs, matrix(0, shape_.inner, shape_.hidden),
                          matrix(1, shape_.inner, shape_.hidden),
                          matrix(2, shape_.hidden, shape_.inner), {}, {}});
        tokens_ += tokens;
    }

    int64_t tokens() const { return tokens_; }

    void run() {
        const auto stages = prepared();
        pool_run(stages.data(), kMostStages);
        turns_.clear();
        tokens_ = 0;
    }

    // Until `pool_end`, this has to last.
    void begin() {
        const auto stages = prepared();
        pool_begin(stages.data(), kMostStages);
    }

  private:
    int64_t turns() const { return static_cast<int64_t>(turns_.size()); }

    // What is left to do when the inputs have been prepared: gate and up, then down.
    std::array<Stage, kMostStages> prepared() {
        take_memory();
        prepare();
        const Step gate_up = [](void* context, int32_t thread, int64_t unit) {
            Experts& all = *static_cast<Experts*>(context);
            const int64_t units = all.inner_units();
            all.gate_up(all.turns_[unit / units], unit % units, all.workspace_.threads[thread]);
        };
        const Step down = [](void* context, int32_t thread, int64_t unit) {
            Experts& all = *static_cast<Experts*>(context);
            const int64_t units = all.hidden_units();
            all.down(all.turns_[unit / units], unit % units, all.workspace_.threads[thread]);
        };
        return {Stage{turns() * inner_units(), gate_up, this},
                Stage{turns() * hidden_units(), down, this}};
    }

    int64_t inner_units() const { return ceil_div(shape_.inner, kUnitRows); }
    int64_t hidden_units() const { return ceil_div(shape_.hidden, kUnitRows); }

    Form form(const Turn& turn) const { return form_of(shape_.format, shape_.type, turn.tokens); }

    void take_memory() {
        size_t bytes = 0;
        int32_t most = 0;
        for (const Turn& turn : turns_) {
            bytes += blocks_bytes(form(turn), shape_.hidden, turn.tokens);
            bytes += blocks_bytes(form(turn), shape_.inner, turn.tokens);
            most = std::max(most, turn.tokens);
        }
        workspace_.call.reserve(bytes);
        const int64_t widest = std::max<int64_t>(shape_.hidden, 2 * kUnitRows * most) + kGroup;
        workspace_.reserve_threads(2 * Scratch::size<float>(widest));
        const Turn* before = nullptr;
        for (Turn& turn : turns_) {
            // One token's experts share its prepared input.
            const bool same = before && turn.tokens == 1 && before->tokens == 1 &&
                              token(turn, 0) == token(*before, 0);
            turn.x = same ? before->x : blocks(turn, shape_.hidden);
            turn.hidden = blocks(turn, shape_.inner);
            before = &turn;
        }
    }

    std::vector<Block> blocks(const Turn& turn, int32_t columns) {
        return take_blocks(workspace_.call, form(turn), columns, turn.tokens);
    }

    int64_t token(const Turn& turn, int32_t i) const { return turn.pairs[i] / shape_.k; }

    void prepare_turn(const Turn& turn, Scratch& scratch) {
        for (int32_t i = 0; i < turn.tokens; i++) {
            prepare_token(at(x_, token(turn, i) * shape_.hidden, shape_.type), shape_.type,
                          shape_.format, shape_.hidden, turn.x[i / kTokens], i % kTokens, scratch);
        }
    }

    void prepare() {
        const auto unit = [&](int32_t thread, int64_t i) {
            const bool shared = i > 0 && same_input(turns_[i - 1], turns_[i]);
            if (!shared) prepare_turn(turns_[i], workspace_.threads[thread]);
        };
        if (tokens_ > kTokens) return parallel(turns(), unit);
        for (int64_t i = 0; i < turns(); i++) unit(0, i);
    }

    static bool same_input(const Turn& a, const Turn& b) {
        const Block &one = a.x[0], &other = b.x[0];
        return one.codes == other.codes && one.values == other.values && one.pairs == other.pairs;
    }

    void gate_up(const Turn& turn, int64_t unit, Scratch& scratch) {
        const int64_t numbers = static_cast<int64_t>(turn.tokens) * kUnitRows;
        scratch.reserve(0);
        float* gate = scratch.take<float>(numbers);
        float* up = scratch.take<float>(numbers);
        const int32_t blocks = static_cast<int32_t>(turn.x.size());
        multiply_unit(turn.gate, unit, turn.x.data(), blocks, turn.tokens, gate);
        multiply_unit(turn.up, unit, turn.x.data(), blocks, turn.tokens, up);
        kernels().activate(shape_.activation, rounding_, numbers, gate, up);
        const auto prepare = kernels().prepare;
        for (int32_t i = 0; i < turn.tokens; i++) {
            prepare(gate + i * kUnitRows, shape_.format, 1, turn.hidden[i / kTokens], i % kTokens,
                    static_cast<int32_t>(unit));
        }
    }

    void down(const Turn& turn, int64_t unit, Scratch& scratch) {
        scratch.reserve(0);
        float* out = scratch.take<float>(static_cast<int64_t>(turn.tokens) * kUnitRows);
        multiply_unit(turn.down, unit, turn.hidden.data(),
                      static_cast<int32_t>(turn.hidden.size()), turn.tokens, out);
        kernels().round_to(rounding_, static_cast<int64_t>(turn.tokens) * kUnitRows, out);
        const int64_t first = unit * kUnitRows;
        const int64_t count = std::min<int64_t>(kUnitRows, shape_.hidden - first);
        for (int32_t i = 0; i < turn.tokens; i++) {
            float* row = rows_ + turn.pairs[i] * shape_.hidden + first;
            memcpy(row, out + i * kUnitRows, static_cast<size_t>(count) * sizeof(float));
        }
    }

    const retinue_experts_shape shape_;
    const void* x_;
    float* rows_;
    Workspace& workspace_;
    const int32_t rounding_;
    std::vector<Turn> turns_;
    int64_t tokens_ = 0;
};

// Lasts until its end; memory of its own, so that the process may end amid it.
std::optional<Experts>& begun = *new std::optional<Experts>;

void linear_turn(const retinue_matrix& matrix, const void* x, int64_t x_stride, int32_t type,
                 int32_t tokens, const void* bias, void* out) {
    const Form form = form_of(matrix.format, type, tokens);
    workspace.call.reserve(blocks_bytes(form, matrix.columns, tokens));
    const int64_t widest = std::max<int64_t>(matrix.columns, kUnitRows * tokens) + kGroup;
    workspace.reserve_threads(Scratch::size<float>(widest));
    const std::vector<Block> blocks = take_blocks(workspace.call, form, matrix.columns, tokens);
    parallel(tokens, [&](int32_t thread, int64_t t) {
        prepare_token(at(x, t * x_stride, type), type, matrix.format, matrix.columns,
                      blocks[t / kTokens], static_cast<int32_t>(t % kTokens),
                      workspace.threads[thread]);
    });
    parallel(ceil_div(matrix.rows, kUnitRows), [&](int32_t thread, int64_t unit) {
        Scratch& scratch = workspace.threads[thread];
        scratch.reserve(0);
        float* sums = scratch.take<float>(static_cast<int64_t>(tokens) * kUnitRows);
        multiply_unit(matrix, unit, blocks.data(), static_cast<int32_t>(blocks.size()), tokens,
                      sums);
        const int64_t first = unit * kUnitRows;
        const int64_t count = std::min<int64_t>(kUnitRows, matrix.rows - first);
        float added[kUnitRows] = {};
        if (bias) kernels().load(at(bias, first, type), type, count, added);
        for (int32_t t = 0; t < tokens; t++) {
            float* row = sums + t * kUnitRows;
            for (int64_t i = 0; bias && i < count; i++) row[i] += added[i];
            const int64_t element = static_cast<int64_t>(t) * matrix.rows + first;
            kernels().store(row, type, count,
                            static_cast<uint8_t*>(out) + element * element_bytes(type));
        }
    });
}

}  // namespace

void run_linear(const retinue_matrix& matrix, const void* x, int64_t x_stride, int32_t type,
                int64_t tokens, const void* bias, void* out) {
    for (int64_t first = 0; first < tokens; first += kMostOfOne) {
        const int32_t count = static_cast<int32_t>(std::min(kMostOfOne, tokens - first));
        linear_turn(matrix, at(x, first * x_stride, type), x_stride, type, count, bias,
                    static_cast<uint8_t*>(out) + first * matrix.rows * element_bytes(type));
    }
}

void run_experts(const retinue_experts_shape& shape, int32_t count, const int64_t* parts,
                 const int64_t* starts, const int64_t* pairs, const void* x, float* rows) {
    Experts experts(shape, x, rows, workspace);
    for (int32_t e = 0; e < count; e++) {
        for (int64_t first = starts[e]; first < starts[e + 1]; first += kMostOfOne) {
            const int64_t tokens = std::min(kMostOfOne, starts[e + 1] - first);
            if (experts.tokens() > 0 && experts.tokens() + tokens > kTurn) experts.run();
            experts.add(parts + 6 * e, pairs + first, static_cast<int32_t>(tokens));
        }
    }
    if (experts.tokens() > 0) experts.run();
}

void begin_experts(const retinue_experts_shape& shape, int32_t count, const int64_t* parts,
                   const int64_t* pairs, const void* x, float* rows) {
    begun.emplace(shape, x, rows, begun_workspace);
    for (int32_t e = 0; e < count; e++) begun->add(parts + 6 * e, pairs + e, 1);
    begun->begin();
}

void end_experts() {
    pool_end();
    begun.reset();
}

void run_sum(const float* rows, const float* weights, int64_t tokens, int32_t k, int32_t hidden,
             int32_t type, void* out) {
    workspace.reserve_threads(Scratch::size<float>(hidden));
    parallel(tokens, [&](int32_t thread, int64_t t) {
        workspace.threads[thread].reserve(0);
        float* total = workspace.threads[thread].take<float>(hidden);
        kernels().sum(rows + t * k * hidden, weights + t * k, k, hidden, total);
        kernels().store(total, type, hidden,
                        static_cast<uint8_t*>(out) + t * hidden * element_bytes(type));
    });
}

}  // namespace retinue
