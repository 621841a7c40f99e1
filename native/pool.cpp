#include "pool.h"

#include <pthread.h>

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
    Pool(int32_t threads, int32_t spin_us) : ranges_(threads), spin_us_(spin_us) {
        try {
            for (int32_t i = 1; i < threads; i++) workers_.emplace_back([this, i] { work(i); });
        } catch (...) {
            stop();
            throw;
        }
    }

    ~Pool() { stop(); }

    int32_t threads() const { return static_cast<int32_t>(ranges_.size()); }

    void run(int64_t units, Step step, void* context) {
        if (units <= 1 || workers_.empty()) {
            for (int64_t unit = 0; unit < units; unit++) step(context, 0, unit);
            return;
        }
        step_ = step;
        context_ = context;
        for (int32_t i = 0; i < threads(); i++) {
            ranges_[i].next.store(units * i / threads(), std::memory_order_relaxed);
            ranges_[i].end = units * (i + 1) / threads();
        }
        open_ = true;
        job_++;
        if (sleepers_ > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
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

    // Its own units first, then what is left of the others'.
    void take(int32_t thread) {
        for (int32_t i = 0; i < threads(); i++) {
            Range& range = ranges_[(thread + i) % threads()];
            while (range.next.load(std::memory_order_relaxed) < range.end) {
                const int64_t unit = range.next.fetch_add(1, std::memory_order_relaxed);
                if (unit >= range.end) break;
                step_(context_, thread, unit);
            }
        }
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

    std::vector<Range> ranges_;
    const int32_t spin_us_;
    Step step_ = nullptr;
    void* context_ = nullptr;
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

// A forked child has none of the threads: it forgets them, and computes alone until told otherwise.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });

}  // namespace

void pool_resize(int32_t threads, int32_t spin_us) {
    delete pool;
    pool = nullptr;
    if (threads > 1) pool = new Pool(threads, spin_us);
}

int32_t pool_threads() { return pool ? pool->threads() : 1; }

void pool_run(int64_t units, Step step, void* context) {
    if (pool) return pool->run(units, step, context);
    for (int64_t unit = 0; unit < units; unit++) step(context, 0, unit);
}

}  // namespace retinue
