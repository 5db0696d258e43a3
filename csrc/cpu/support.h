// Workspace and threads as the kernels of one instruction set see them.
#pragma once

#include <type_traits>

#include "../ops.h"
#include "isa.h"
#include "parallel.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Hands out aligned pieces of the workspace. Started from null it only counts, so that the same code says how much an
// op needs and where everything lies.
class Arena {
 public:
  explicit Arena(void* base) : base_(reinterpret_cast<uintptr_t>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    const uintptr_t place = base_ + used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), kAlignment));
    return reinterpret_cast<T*>(place);
  }

  size_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 64;
  uintptr_t base_;
  size_t used_ = 0;
};

// body(task, thread) for every task, in order of their numbers, on up to `threads` threads.
template <typename Body>
inline void parallel_for(int threads, int64_t tasks, Body&& body) {
  if (threads <= 1 || tasks <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
    return;
  }
  using Callable = std::remove_reference_t<Body>;
  run_tasks(
      threads, tasks, [](void* self, int64_t task, int thread) { (*static_cast<Callable*>(self))(task, thread); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// body(T{}) with the dtype of factors and inverses.
template <typename Body>
inline auto with_factor_type(DType dtype, Body&& body) {
  return dtype == DType::f64 ? body(double{}) : body(float{});
}

// Workspace of an op: bytes_for(T{}, threads) must also hold when the call finds itself alone (usable_threads).
template <typename Bytes>
inline WorkspaceSize workspace_for(DType dtype, int threads, Bytes&& bytes_for) {
  return with_factor_type(dtype, [&](auto element) {
    const size_t alone = bytes_for(element, 1);
    const size_t together = bytes_for(element, threads > 1 ? threads : 1);
    return WorkspaceSize{alone > together ? alone : together, 0};
  });
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
