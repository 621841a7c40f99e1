// The threads that compute. The caller works too; what a late thread has not begun, others take.
#ifndef RETINUE_POOL_H
#define RETINUE_POOL_H

#include <stdint.h>

namespace retinue {

using Step = void (*)(void* context, int32_t thread, int64_t unit);

// step(context, thread, unit) for every unit in 0 .. units - 1.
struct Stage {
    int64_t units;
    Step step;
    void* context;
};
constexpr int32_t kMostStages = 2;

void pool_resize(int32_t threads, int32_t spin_us);
int32_t pool_threads();

// Runs stage after stage: a unit begins when all of the stage before are done. Returns when all are.
void pool_run(const Stage* stages, int32_t count);

// The same in two parts: what is begun others work on, while the caller is elsewhere, until it ends
// it. What it runs in between, it runs alone; contexts have to last until the end.
void pool_begin(const Stage* stages, int32_t count);
void pool_end();
bool pool_begun();

template <typename Function>
void parallel(int64_t units, const Function& function) {
    const Step step = [](void* context, int32_t thread, int64_t unit) {
        (*static_cast<const Function*>(context))(thread, unit);
    };
    const Stage stage = {units, step, const_cast<Function*>(&function)};
    pool_run(&stage, 1);
}

}  // namespace retinue
#endif
