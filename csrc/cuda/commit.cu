// commit: C <- decay C + scale S, S <- 0, for all blocks at once.
#include "tile.cuh"

namespace kfac_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;
constexpr int kPerItem = kThreads * kPerThread;

struct Tables {
  const BlockEntry* blocks;  // [b]
  const int32_t* first;      // [b + 1] items before each block
};

// Elementwise C <- decay C + scale S and S <- 0; with *gate == 0 only the latter.
// One CTA per 4096 consecutive elements of a block, neighbouring threads on neighbouring elements.
// Memory: 4 n^2 elements moved per block and nothing else.
template <typename T>
__global__ void __launch_bounds__(kThreads) commit_kernel(Tables tables, int count,
                                                          T* factors,             // [numel]
                                                          T* pending,             // [numel]
                                                          const T* decay,         // [b]
                                                          const T* scale,         // [b]
                                                          const int32_t* gate) {  // [1]
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const BlockEntry block = tables.blocks[owner];
  const int64_t numel = static_cast<int64_t>(block.size) * block.size;
  const int64_t begin = static_cast<int64_t>(item - tables.first[owner]) * kPerItem + threadIdx.x;
  const bool open = *gate != 0;
  const T keep = decay[block.index], add = scale[block.index];
#pragma unroll 4
  for (int i = 0; i < kPerThread; ++i) {
    const int64_t at = begin + i * kThreads;
    if (at >= numel) break;
    T* const c = factors + block.offset + at;
    T* const s = pending + block.offset + at;
    if (open) {
      // decay == 0 starts afresh whatever C held, NaN included (the BLAS convention for beta).
      const T added = add * *s;
      *c = keep == T(0) ? added : keep * *c + added;
    }
    *s = T(0);
  }
}

constexpr int kTraceThreads = 128;

// Traces of blocks, one CTA per block in a fixed order of summation.
// Thread t sums the diagonal elements t, t + 128, ..., then the CTA adds up.
// Latency: n strided loads per block, as little as there is to do.
template <typename T>
__global__ void __launch_bounds__(kTraceThreads) trace_kernel(const BlockEntry* blocks,  // [gridDim.x]
                                                              const T* factors,          // [numel]
                                                              T* trace) {                // [b]
  const BlockEntry block = blocks[blockIdx.x];
  T sum = 0;
  for (int64_t i = threadIdx.x; i < block.size; i += kTraceThreads) sum += factors[block.offset + i * (block.size + 1)];
  sum = sum_over_threads(sum, shared_memory<T>());
  if (threadIdx.x == 0) trace[block.index] = sum;
}

struct Layout {
  BlockEntry* blocks;
  int32_t* first;
  Arena arena;

  Layout(const Commit& op, const Context& ctx) : arena(ctx) {
    blocks = arena.table<BlockEntry>(op.plan.count());
    first = arena.table<int32_t>(op.plan.count() + 1);
  }
};

template <typename T>
cudaError_t run(const Commit& op, const Context& ctx) {
  Layout layout(op, ctx);
  const int count = op.plan.count();
  int32_t items = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t n = op.plan.size(i);
    layout.blocks[i] = {op.plan.offset(i), op.plan.size(i), i};
    layout.first[i] = items;
    items += static_cast<int32_t>(ceil_div(n * n, kPerItem));
  }
  layout.first[count] = items;
  cudaError_t error = layout.arena.upload(ctx.stream);
  if (error != cudaSuccess) return error;
  const BlockEntry* blocks = layout.arena.on_device(layout.blocks);
  T* const factors = static_cast<T*>(op.factors);
  error = launch(commit_kernel<T>, items, kThreads, 0, ctx.stream, Tables{blocks, layout.arena.on_device(layout.first)},
                 count, factors, static_cast<T*>(op.pending), static_cast<const T*>(op.decay),
                 static_cast<const T*>(op.scale), op.gate);
  if (error != cudaSuccess) return error;
  return launch(trace_kernel<T>, count, kTraceThreads, sizeof(T) * (kTraceThreads / kWarpSize), ctx.stream, blocks,
                factors, static_cast<T*>(op.trace));
}

}  // namespace

WorkspaceSize cuda_commit_workspace(const Commit& op, const Context&) { return Layout(op, Context()).arena.size(); }

const char* cuda_commit(const Commit& op, const Context& ctx) {
  if (op.plan.count() == 0) return nullptr;
  const DeviceGuard guard(ctx);
  if (guard.error() != cudaSuccess) return message(guard.error());
  return message(op.dtype == DType::f64 ? run<double>(op, ctx) : run<float>(op, ctx));
}

}  // namespace kfac_fast
