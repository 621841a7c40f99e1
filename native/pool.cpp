#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace retinue {
namespace {

using Clock = std::chrono::steady_clock;

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether `done` came true while spinning; asks the clock now and then only.
template <typename Condition>
bool spin(int32_t spin_us, Condition done) {
    const auto end = Clock::now() + std::chrono::microseconds(spin_us);
    do {
        for (int i = 0; i < 64; i++) {
            if (done()) return true;
            pause();
        }
    } while (Clock::now() < end);
    return done();
}

// The units that a thread takes first: neighbours, so that it reads memory in order.
struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
};

class Pool {
  public:
    Pool(int32_t threads, int32_t spin_us) : spin_us_(spin_us) {
        for (auto& ranges : ranges_) ranges = std::vector<Range>(threads);
        try {
            for (int32_t i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int32_t threads() const { return static_cast<int32_t>(ranges_[0].size()); }

    void begin(const Stage* stages, int32_t count) {
        count_ = count;
        for (int32_t s = 0; s < count; s++) {
            stages_[s] = stages[s];
            done_[s] = 0;
            for (int32_t i = 0; i < threads(); i++) {
                Range& range = ranges_[s][i];
                range.next.store(stages[s].units * i / threads(), std::memory_order_relaxed);
                range.end = stages[s].units * (i + 1) / threads();
            }
        }
        open_ = true;
        job_++;
        if (sleepers_ > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
    }

    void end() {
        take(0);
        // Nothing is left to begin: wait for threads amid a unit, not for those that never came.
        open_ = false;
        const auto left = [this] { return inside_ == 0; };
        if (spin(kJoinSpinUs, left)) return;
        std::unique_lock<std::mutex> lock(mutex_);
        joining_ = true;
        left_.wait(lock, left);
        joining_ = false;
    }

  private:
    // Longer than a unit; a thread that has lost its core keeps us no longer than this awake.
    static constexpr int32_t kJoinSpinUs = 100;

    void take(int32_t thread) {
        for (int32_t s = 0; s < count_; s++) {
            const int64_t units = stages_[s].units;
            done_[s] += take_of(stages_[s], ranges_[s], thread);
            if (s + 1 == count_) return;
            const auto all_done = [&] { return done_[s] == units; };
            while (!spin(kJoinSpinUs, all_done)) std::this_thread::yield();
        }
    }

    // Its own units first, then what is left of the others'; returns how many.
    int64_t take_of(const Stage& stage, std::vector<Range>& ranges, int32_t thread) {
        int64_t taken = 0;
        for (int32_t i = 0; i < threads(); i++) {
            Range& range = ranges[(thread + i) % threads()];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const int64_t unit = range.next.fetch_add(1, std::memory_order_relaxed);
                if (unit >= range.end) break;
                stage.step(stage.context, thread, unit);
                taken++;
            }
        }
        return taken;
    }

    void work(int32_t thread) {
        uint32_t seen = 0;
        const auto called = [&] { return job_ != seen; };
        while (true) {
            if (!spin(spin_us_, called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleepers_++;
                wake_.wait(lock, called);
                sleepers_--;
            }
            if (ending_) return;
            seen = job_;
            // Enter before asking whether the job is open: the caller closes it, then asks who is
            // inside, so that one of the two notices the other.
            inside_++;
            if (open_) take(thread);
            if (--inside_ == 0 && !open_) {
                std::lock_guard<std::mutex> lock(mutex_);
                if (joining_) left_.notify_one();
            }
        }
    }

    void stop() {
        ending_ = true;
        job_++;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        for (std::thread& worker : workers_) worker.join();
    }

    const int32_t spin_us_;
    Stage stages_[kMostStages] = {};
    int32_t count_ = 0;
    std::vector<Range> ranges_[kMostStages];
    std::atomic<int64_t> done_[kMostStages] = {};  // units
    std::atomic<uint32_t> job_{0};
    std::atomic<int32_t> inside_{0}, sleepers_{0};
    std::atomic<bool> open_{false}, ending_{false};
    std::mutex mutex_;
    std::condition_variable wake_, left_;
    bool joining_ = false;
    std::vector<std::thread> workers_;  // last: they use the others
};

// Left as it is when the process ends: some thread may still be computing.
Pool* pool = nullptr;

// What was begun, for who has no pool.
Stage begun_stages[kMostStages];
int32_t begun_count = 0;

// A forked child has none of the threads: it forgets them, and computes alone until told otherwise.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
    pool = nullptr;
    begun_count = 0;
});

void run_alone(const Stage* stages, int32_t count) {
    for (int32_t s = 0; s < count; s++) {
        for (int64_t unit = 0; unit < stages[s].units; unit++) {
            stages[s].step(stages[s].context, 0, unit);
        }
    }
}

}  // namespace

void pool_resize(int32_t threads, int32_t spin_us) {
    delete pool;
    pool = nullptr;
    if (threads > 1) pool = new Pool(threads, spin_us);
}

int32_t pool_threads() { return pool ? pool->threads() : 1; }

void pool_run(const Stage* stages, int32_t count) {
    const bool small = count == 1 && stages[0].units <= 1;
    if (!pool || small || pool_begun()) return run_alone(stages, count);
    pool->begin(stages, count);
    pool->end();
}

void pool_begin(const Stage* stages, int32_t count) {
    std::copy(stages, stages + count, begun_stages);
    begun_count = count;
    if (pool) pool->begin(stages, count);
}

void pool_end() {
    if (pool) {
        pool->end();
    } else {
        run_alone(begun_stages, begun_count);
    }
    begun_count = 0;
}

bool pool_begun() { return begun_count > 0; }

}  // namespace retinue
