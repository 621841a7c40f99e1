// Memory that a call works in, kept and grown between calls.
#ifndef RETINUE_SCRATCH_H
#define RETINUE_SCRATCH_H

#include <memory>
#include <new>
#include <vector>

#include "kernels.h"

namespace retinue {

// One allocation, handed out from its start in pieces of whole cache lines.
class Scratch {
  public:
    // Room for the pieces of one call; what was handed out before is lost.
    void reserve(size_t bytes) {
        if (bytes > bytes_) {
            memory_.reset();
            bytes_ = 0;
            memory_.reset(static_cast<uint8_t*>(operator new(bytes, kLine)));
            bytes_ = bytes;
        }
        used_ = 0;
    }

    template <typename T>
    T* take(int64_t count) {
        uint8_t* piece = memory_.get() + used_;
        used_ += size<T>(count);
        return reinterpret_cast<T*>(piece);
    }

    template <typename T>
    static size_t size(int64_t count) {
        return (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Free {
        void operator()(uint8_t* memory) const { operator delete(memory, kLine); }
    };
    std::unique_ptr<uint8_t, Free> memory_;
    size_t bytes_ = 0, used_ = 0;
};

// What a block's numbers are stored as.
enum class Form { kCodes, kValues, kPairs };

// A lone token waits for memory, which reads in fewer streams are better at than products of tiles.
inline Form form_of(int32_t format, int32_t type, int64_t tokens) {
    if (format != RETINUE_BF16) return Form::kCodes;
    const bool pairs = type == RETINUE_TYPE_BF16 && tokens > 1 && kernels().pairs;
    return pairs ? Form::kPairs : Form::kValues;
}

inline size_t block_bytes(Form form, int32_t groups, int32_t tokens) {
    const int64_t count = static_cast<int64_t>(groups) * tokens + kTokens;
    if (form == Form::kValues) return Scratch::size<float>(count * kGroup);
    if (form == Form::kPairs) return Scratch::size<uint16_t>(count * kGroup);
    return Scratch::size<int8_t>(count * kGroup) + Scratch::size<float>(count) +
           Scratch::size<int32_t>(count);
}

inline Block take_block(Scratch& scratch, Form form, int32_t groups, int32_t tokens) {
    const int64_t count = static_cast<int64_t>(groups) * tokens + kTokens;
    Block block = {tokens, nullptr, nullptr, nullptr, nullptr, nullptr};
    if (form == Form::kValues) {
        block.values = scratch.take<float>(count * kGroup);
    } else if (form == Form::kPairs) {
        block.pairs = scratch.take<uint16_t>(count * kGroup);
    } else {
        block.codes = scratch.take<int8_t>(count * kGroup);
        block.scales = scratch.take<float>(count);
        block.offsets = scratch.take<int32_t>(count);
    }
    return block;
}

}  // namespace retinue
#endif
