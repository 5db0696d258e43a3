#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

// ThreadSanitizer does not understand libgomp's futexes and reports races that are none. With KFAC_FAST_STD_THREADS
// the same tasks run on threads it does understand; everything above this file stays the same.
#if defined(KFAC_FAST_STD_THREADS)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace kfac_fast::cpu {
namespace {

std::atomic<bool> forked{false};

}  // namespace

int usable_threads(int requested) {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });
  (void)registered;
  if (forked) return 1;
#if defined(KFAC_FAST_STD_THREADS)
  return std::max(requested, 1);
#elif defined(_OPENMP)
  return omp_in_parallel() ? 1 : std::max(requested, 1);
#else
  return 1;
#endif
}

void run_tasks(int threads, int64_t tasks, void (*body)(void* self, int64_t task, int thread), void* self) {
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(self, task, 0);
    return;
  }
  // Thousands of tasks are taken several at a time: neighbours lie side by side in memory, and the counter is shared.
  const int64_t chunk = std::max<int64_t>(1, tasks / (64 * threads));
  std::atomic<int64_t> next{0};
  const auto work = [&](int thread) {
    for (int64_t begin; (begin = next.fetch_add(chunk, std::memory_order_relaxed)) < tasks;) {
      for (int64_t task = begin; task < std::min(begin + chunk, tasks); ++task) body(self, task, thread);
    }
  };
#if defined(KFAC_FAST_STD_THREADS)
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
#elif defined(_OPENMP)
#pragma omp parallel num_threads(threads)
  work(omp_get_thread_num());
#else
  work(0);
#endif
}

}  // namespace kfac_fast::cpu
