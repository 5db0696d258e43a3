// The one place where kernels meet threads.
#pragma once

#include <cstdint>

namespace kfac_fast::cpu {

// Threads that a call may really use: one inside somebody else's parallel region (no oversubscription) and one in a
// forked child (OpenMP's pool does not survive a fork), otherwise `requested`.
int usable_threads(int requested);

// Runs body(self, task, thread) for task = 0 .. tasks - 1, handed out in this order to whichever thread is free.
void run_tasks(int threads, int64_t tasks, void (*body)(void* self, int64_t task, int thread), void* self);

}  // namespace kfac_fast::cpu
