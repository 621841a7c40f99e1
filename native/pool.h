// The threads that compute. The caller works too; what a late thread has not begun, others take.
#ifndef RETINUE_POOL_H
#define RETINUE_POOL_H

#include <stdint.h>

namespace retinue {

using Step = void (*)(void* context, int32_t thread, int64_t unit);

void pool_resize(int32_t threads, int32_t spin_us);
int32_t pool_threads();

// step(context, thread, unit) for every unit in 0 .. units - 1; returns when all are done.
void pool_run(int64_t units, Step step, void* context);

template <typename Function>
void parallel(int64_t units, const Function& function) {
    const Step step = [](void* context, int32_t thread, int64_t unit) {
        (*static_cast<const Function*>(context))(thread, unit);
    };
    pool_run(units, step, const_cast<Function*>(&function));
}

}  // namespace retinue
#endif
