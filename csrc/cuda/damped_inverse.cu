// damped_inverse: (C + damping I)^-1 of many symmetric positive definite blocks by the symmetric sweep.
//
// Sweeping the pivots of a matrix one after the other turns it into minus its inverse in place, n^3 operations and one
// loop. With w the pivot's column divided by the square root of the pivot, a sweep is A -= w w^T for the rest of the
// matrix: the Cholesky update, as accurate as Cholesky and symmetric to the last bit because a product commutes. (The
// other usual form, with the explicit inverse of a pivot block in the update, breaks down at condition numbers 10 to
// 100 times smaller.)
//
// Classes by size: several matrices per warp in registers (n <= 32), one CTA per matrix while it fits into the device's
// shared memory, many CTAs per matrix above.
#include <vector>

#include "block_inverse.cuh"
#include "global_inverse.cuh"

namespace kfac_fast {
namespace {

constexpr int kWarpClassThreads = 128;

// Register class for blocks of up to kLanes rows.
template <typename T, int kLanes>
struct WarpClass {
  static constexpr int kMatrices = kWarpClassThreads / kLanes;  // per CTA
  static constexpr int kStride = kLanes + 1;                    // odd: rows and columns both read without conflicts
  static constexpr int kElements = 2 * kLanes + kLanes * kStride;
  static constexpr size_t kSharedBytes = sizeof(T) * kMatrices * kElements;
};

// Inverses of blocks of at most kLanes rows, 128 / kLanes blocks per CTA.
// kLanes lanes share a matrix; lane i holds row i in registers and the pivot's column passes through shared memory.
// Latency of the pivot chain (a shuffle, a root, a store and a load of shared memory each); launch-bound in practice.
template <typename T, int kLanes>
__global__ void __launch_bounds__(kWarpClassThreads)
    damped_inverse_warp_kernel(InverseArguments<T> op, const BlockEntry* table, int count) {
  using Class = WarpClass<T, kLanes>;
  const int slot = static_cast<int>(threadIdx.x) / kLanes, lane = static_cast<int>(threadIdx.x) % kLanes;
  const int matrix = static_cast<int>(blockIdx.x) * Class::kMatrices + slot;
  if (matrix >= count) return;
  const BlockEntry block = table[matrix];
  if (op.retry_failed && op.info[block.index] == 0) return;

  // The lanes of this matrix; the other matrices of the warp go their own way.
  const unsigned mates = kLanes == kWarpSize ? ~0u : ((1u << kLanes % kWarpSize) - 1) << (slot * kLanes % kWarpSize);
  T* const columns = shared_memory<T>() + slot * 2 * kLanes;  // [2][kLanes], double buffered
  T* const square = shared_memory<T>() + Class::kMatrices * 2 * kLanes + slot * kLanes * Class::kStride;
  const int n = block.size;
  const T* const in = op.blocks + block.offset;
  T* const out = op.inverse + block.offset;

#pragma unroll 8
  for (int row = 0; row < n; ++row) {
    // To the end of a sector, which comes along anyway; what lies above the diagonal is not used.
    if (lane <= (row | 7) && lane < n) square[row * Class::kStride + lane] = in[row * n + lane];
  }
  __syncwarp(mates);
  T a[kLanes];  // a[j]: row `lane`, column (k + j) mod kLanes at step k, so that the pivot's column is always a[0]
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    a[j] = T(0);
    if (lane < n && j < n) a[j] = square[max(lane, j) * Class::kStride + min(lane, j)];
    if (lane == j && lane < n) a[j] += op.damping[block.index];
  }

  int failed = 0;
  for (int k = 0; k < n; ++k) {
    const T pivot = __shfl_sync(mates, a[0], k, kLanes);
    if (!valid_pivot(pivot)) {
      failed = k + 1;
      break;
    }
    const T r = inverse_sqrt(pivot), w = a[0] * r;
    T* const column = columns + k % 2 * kLanes;
    column[(lane - k) & (kLanes - 1)] = w;
    __syncwarp(mates);
    // Row k itself becomes r w^T; the others lose their share of the rank-1 update. One formula serves both.
    const bool swept = lane == k;
    const T factor = swept ? -r : w;
#pragma unroll
    for (int j = 0; j < kLanes; j += 4) {
      T wj[4];
      load4(column + j, wj);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (j + i > 0) a[j + i - 1] = (swept ? T(0) : a[j + i]) - factor * wj[i];
      }
    }
    a[kLanes - 1] = swept ? -r * r : w * r;
  }

  if (lane == 0) op.info[block.index] = failed;
  if (failed != 0 && !op.nan_on_failure) return;
  // Symmetric to the last bit: lane i writes its row as column i, which makes the stores of a row contiguous.
#pragma unroll
  for (int j = 0; j < kLanes; ++j) {
    const int row = (n + j) & (kLanes - 1);
    if (row < n && lane < n) out[row * n + lane] = failed != 0 ? not_a_number<T>() : -a[j];
  }
}

// The blocks by decreasing size, cut into classes. The shared-memory class is cut further: a launch reserves what its
// largest matrix needs, and small matrices should not pay for large ones with their occupancy.
struct Classes {
  static constexpr int kGlobal = 0, kBlock = 1, kCount = 9;
  static constexpr int kNoLimit = 1 << 30;
  static constexpr int kLargest[kCount] = {kNoLimit, kNoLimit, 192, 128, 96, 64, 32, 16, 8};
  int begin[kCount + 1];  // in plan.by_decreasing_size()

  Classes(const Plan& plan, int largest_in_shared_memory) {
    const std::vector<int32_t>& order = plan.by_decreasing_size();
    int at = 0;
    for (int c = 0; c < kCount; ++c) {
      const int largest = c == kGlobal ? kNoLimit : std::min(kLargest[c], largest_in_shared_memory);
      while (at < plan.count() && plan.size(order[at]) > largest) ++at;
      begin[c] = at;
    }
    begin[kCount] = plan.count();
  }
  int count(int c) const { return begin[c + 1] - begin[c]; }
};

template <typename T>
struct Layout {
  Classes classes;
  Arena arena;
  BlockEntry* entries;  // [b]
  GlobalLayout<T> global;

  // `memory` is where the tables go; without any, this only measures.
  Layout(const Plan& plan, const Context& memory, int device)
      : classes(plan, largest_block_class_size<T>(shared_memory_limit(device))),
        arena(memory),
        entries(arena.table<BlockEntry>(plan.count())),
        global(arena, plan, plan.by_decreasing_size().data(), classes.count(Classes::kGlobal)) {
    for (int i = 0; i < plan.count() && entries != nullptr; ++i) {
      const int32_t block = plan.by_decreasing_size()[i];
      entries[i] = {plan.offset(block), plan.size(block), block};
    }
  }
};

template <typename T, int kLanes>
cudaError_t launch_warp_class(const InverseArguments<T>& arguments, const BlockEntry* table, int count, void* stream) {
  using Class = WarpClass<T, kLanes>;
  return launch(damped_inverse_warp_kernel<T, kLanes>, ceil_div(count, Class::kMatrices), kWarpClassThreads,
                Class::kSharedBytes, stream, arguments, table, count);
}

template <typename T>
cudaError_t run(const DampedInverse& op, const Context& ctx) {
  const Layout<T> layout(op.plan, ctx, ctx.device);
  const InverseArguments<T> arguments = {static_cast<const T*>(op.blocks),
                                         static_cast<const T*>(op.damping),
                                         static_cast<T*>(op.inverse),
                                         op.info,
                                         op.retry_failed,
                                         op.nan_on_failure};
  const bool tensor_cores = three_tf32_products_pay(compute_capability(ctx.device));
  cudaError_t error = layout.arena.upload(ctx.stream);
  if (error == cudaSuccess && layout.global.count > 0) {
    error = launch_global_class(arguments, layout.global, layout.arena, tensor_cores, ctx.stream);
  }
  for (int c = Classes::kBlock; c < Classes::kCount && error == cudaSuccess; ++c) {
    const int begin = layout.classes.begin[c], count = layout.classes.count(c);
    if (count == 0) continue;
    const BlockEntry* const entries = layout.arena.on_device(layout.entries + begin);
    switch (Classes::kLargest[c]) {
      case 8:
        error = launch_warp_class<T, 8>(arguments, entries, count, ctx.stream);
        break;
      case 16:
        error = launch_warp_class<T, 16>(arguments, entries, count, ctx.stream);
        break;
      case 32:
        error = launch_warp_class<T, 32>(arguments, entries, count, ctx.stream);
        break;
      default:
        error = launch_block_class(arguments, entries, count, layout.entries[begin].size, tensor_cores, ctx.stream);
    }
  }
  return error;
}

}  // namespace

WorkspaceSize cuda_damped_inverse_workspace(const DampedInverse& op, const Context& ctx) {
  return op.dtype == DType::f64 ? Layout<double>(op.plan, Context(), ctx.device).arena.size()
                                : Layout<float>(op.plan, Context(), ctx.device).arena.size();
}

const char* cuda_damped_inverse(const DampedInverse& op, const Context& ctx) {
  if (op.plan.count() == 0) return nullptr;
  const DeviceGuard guard(ctx);
  if (guard.error() != cudaSuccess) return message(guard.error());
  return message(op.dtype == DType::f64 ? run<double>(op, ctx) : run<float>(op, ctx));
}

}  // namespace kfac_fast
