// C <- decay C + scale S and S <- 0, over the flat buffers in equal chunks. Limit: memory.
#include "convert.h"
#include "kernels.h"
#include "support.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {
namespace {

constexpr int64_t kChunk = 1 << 15;  // elements

template <typename T>
void commit_range(T* c, T* s, int64_t count, T decay, T scale, bool open) {
  if (open && decay == T(0)) {  // as in BLAS, nothing of the old C survives, NaNs included
    for (int64_t i = 0; i < count; ++i) c[i] = scale * s[i];
  } else if (open) {
    for (int64_t i = 0; i < count; ++i) c[i] = decay * c[i] + scale * s[i];
  }
  for (int64_t i = 0; i < count; ++i) s[i] = T(0);
}

// The last block that starts at or before `element`.
int block_at(const Plan& plan, int64_t element) {
  int low = 0, high = plan.count() - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (plan.offset(middle) <= element) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename T>
void run(const Commit& op, const Context& ctx) {
  const Plan& plan = op.plan;
  T* factors = static_cast<T*>(op.factors);
  T* pending = static_cast<T*>(op.pending);
  const bool open = *op.gate != 0;
  const int threads = usable_threads(ctx.threads);
  parallel_for(threads, ceil_div(plan.numel(), kChunk), [&](int64_t chunk, int) {
    const int64_t begin = chunk * kChunk;
    const int64_t end = min(begin + kChunk, plan.numel());
    for (int block = block_at(plan, begin); block < plan.count() && plan.offset(block) < end; ++block) {
      const int64_t n = plan.size(block);
      const int64_t first = max(begin, plan.offset(block));
      const int64_t last = min(end, plan.offset(block) + n * n);
      if (first >= last) continue;  // nothing but padding
      commit_range(factors + first, pending + first, last - first, static_cast<const T*>(op.decay)[block],
                   static_cast<const T*>(op.scale)[block], open);
    }
  });
  for (int block = 0; block < plan.count(); ++block) {
    const int64_t n = plan.size(block);
    const T* c = factors + plan.offset(block);
    T trace = T(0);
    for (int64_t i = 0; i < n; ++i) trace += c[i * n + i];
    static_cast<T*>(op.trace)[block] = trace;
  }
}

}  // namespace

WorkspaceSize commit_workspace(const Commit&, const Context&) { return {}; }

const char* commit(const Commit& op, const Context& ctx) {
  with_factor_type(op.dtype, [&](auto element) { run<decltype(element)>(op, ctx); });
  return nullptr;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
