// damped_inverse's shared-memory class: one CTA per matrix, blocked symmetric sweep.
//
// Where numbers lie in shared memory, and who computes what, is said by block_fma.cuh and block_mma.cuh. They have for
// it
//   solve(step)              The pivots' columns, divided: W = A_:k L^-T, except that the rows of the pivots themselves
//                            become -L^-T, with which one formula serves the whole matrix in the update.
//   update(item, i, j, step) A_ij -= W_i W_j^T for tile `item`, (i, j), where the pivots' own row and column start from
//                            zero: that makes A_ik = W_i L^-1 and A_kk = -(L L^T)^-1.
//   update_diagonal(i, step) The same of a diagonal tile by a single warp, which goes on to factor it.
#pragma once

#include "block_fma.cuh"
#include "block_mma.cuh"

namespace kfac_fast {

// Shared memory of a CTA for matrices of up to `n` rows.
template <typename Tiles>
constexpr size_t block_inverse_shared_bytes(int n) {
  const int count = (n + kPanel - 1) / kPanel;
  return sizeof(typename Tiles::Scalar) *
             (kPanelTile + Tiles::panel_numel(count) + lower_pairs(count) * Tiles::kStride) +
         16;
}

// Lower triangle to shared memory, a warp per row. Beyond n stands an identity, whose sweeps change nothing.
template <typename Tiles, typename T>
__device__ void load_lower(const Tiles& matrix, unsigned n,
                           const T* in,  // [n, n]
                           T damping) {
  const unsigned lane = threadIdx.x % kWarpSize, c = lane % kPanel, rows = matrix.count * kPanel;
  for (unsigned row = threadIdx.x / kWarpSize; row < rows; row += blockDim.x / kWarpSize) {
    const unsigned i = row / kPanel, r = row % kPanel;
    const T* const from = in + static_cast<int64_t>(row) * n;
    T* to = matrix.tile(lower_pairs(i) + lane / kPanel) + Tiles::place(r, c);
    T* const mirror = matrix.tile(lower_pairs(i) + i) + Tiles::place(c, r);
    const T on_diagonal = row < n ? damping : T(1);
    for (unsigned column = lane; column <= row; column += kWarpSize, to += kWarpSize / kPanel * Tiles::kStride) {
      T value = row < n ? from[column] : T(0);
      if (column == row) value += on_diagonal;
      *to = value;
      if (column / kPanel == i) *mirror = value;
    }
    __syncwarp();  // a row's loads are one request if the warp comes together again
  }
}

// The result, minus the swept matrix, to global memory, a warp per row.
template <typename Tiles, typename T>
__device__ void store_inverse(const Tiles& matrix, unsigned n,
                              T* out) {  // [n, n]
  const unsigned lane = threadIdx.x % kWarpSize, c = lane % kPanel;
  for (unsigned row = threadIdx.x / kWarpSize; row < n; row += blockDim.x / kWarpSize) {
    const unsigned i = row / kPanel, r = row % kPanel;
    const T* const own = matrix.tiles + Tiles::place(r, c);
    const T* const mirrored = matrix.tiles + Tiles::place(c, r);
    T* const to = out + static_cast<int64_t>(row) * n;
    for (unsigned column = lane; column < n; column += kWarpSize) {
      const T* const from = column > row ? mirrored : own;
      to[column] = -from[lower_index(i, column / kPanel) * Tiles::kStride];
    }
  }
}

// Inverses of blocks of 33 rows and more that fit into shared memory, one per CTA, lower triangle in 16x16 tiles.
// Per 16 pivots: all solve the panel, then all update tiles but warp 0, which factors the next diagonal.
// Small sizes: latency of the pivot chain; large ones: shared-memory bandwidth and instructions about equally.
template <typename Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, Tiles::kResident)
    damped_inverse_block_kernel(InverseArguments<typename Tiles::Scalar> op, const BlockEntry* table) {
  using T = typename Tiles::Scalar;
  const BlockEntry block = table[blockIdx.x];
  if (op.retry_failed && op.info[block.index] == 0) return;
  const int n = block.size, count = (n + kPanel - 1) / kPanel, pairs = lower_pairs(count);
  const Tiles matrix(shared_memory<T>(), count);
  int* const failed = reinterpret_cast<int*>(matrix.tile(pairs));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;

  load_lower(matrix, n, op.blocks + block.offset, op.damping[block.index]);
  if (thread == 0) *failed = 0;
  __syncthreads();

  const auto factor = [&](int step) {  // warp 0
    const T* const diagonal = matrix.tile(lower_index(step, step));
    const int pivot =
        factor_pivot_block<T>([&](int r, T(&x)[kPanel]) { Tiles::load_row(diagonal, r, x); },
                              [&](int r, int c, T value) { matrix.root[Tiles::root_place(r, c)] = value; });
    if (lane == 0 && pivot != 0) *failed = step * kPanel + pivot;
  };
  if (warp == 0) factor(0);
  __syncthreads();
  for (int step = 0; step < count && *failed == 0; ++step) {
    matrix.solve(step);
    __syncthreads();
    const bool ahead = step + 1 < count;
    if (ahead && warp == 0) {
      matrix.update_diagonal(step + 1, step);
      factor(step + 1);
    } else {
      const int next = ahead ? lower_index(step + 1, step + 1) : -1;
      const int busy = ahead ? kWarpSize : 0;  // threads that have other things to do
      const int groups = (static_cast<int>(blockDim.x) - busy) / Tiles::kMembers;
      const int first = (thread - busy) / Tiles::kMembers;
      int i, j;
      lower_pair(first, i, j);
      for (int item = first; item < pairs; item += groups) {
        if (item != next) matrix.update(item, i, j, step);
        for (j += groups; j > i; ++i) j -= i + 1;
      }
    }
    __syncthreads();
  }

  const int info = *failed;
  if (thread == 0) op.info[block.index] = info;
  T* const out = op.inverse + block.offset;
  if (info == 0) {
    store_inverse(matrix, n, out);
  } else if (op.nan_on_failure) {
    for (int e = thread; e < n * n; e += static_cast<int>(blockDim.x)) out[e] = not_a_number<T>();
  }
}

// Largest size of the class on a device with this much shared memory per block. FMA needs a little more than tensor
// cores; the limit is the same for both.
template <typename T>
int largest_block_class_size(size_t shared_bytes) {
  int n = kPanel;
  while (block_inverse_shared_bytes<FmaTiles<T, 1>>(n + kPanel) <= shared_bytes) n += kPanel;
  return n;
}

// `largest`: size of the first block of the class.
template <typename T>
cudaError_t launch_block_class(const InverseArguments<T>& arguments, const BlockEntry* table, int count, int largest,
                               bool tensor_cores, void* stream) {
  const auto start = [&](auto* kernel, int threads, size_t shared_bytes) {
    return launch(kernel, count, threads, shared_bytes, stream, arguments, table);
  };
  if constexpr (sizeof(T) == 4) {
    if (tensor_cores) {
      const int threads = largest <= 64 ? 128 : largest <= 128 ? 192 : MmaTiles::kThreads;
      return start(damped_inverse_block_kernel<MmaTiles>, threads, block_inverse_shared_bytes<MmaTiles>(largest));
    }
    if (largest > 96) {  // doubles have no registers for 8x8 elements
      using Tiles = FmaTiles<T, 2>;
      const int threads = largest <= 128 ? 192 : Tiles::kThreads;
      return start(damped_inverse_block_kernel<Tiles>, threads, block_inverse_shared_bytes<Tiles>(largest));
    }
  }
  using Tiles = FmaTiles<T, 1>;
  const int threads = largest <= 64 ? 128 : Tiles::kThreads;
  return start(damped_inverse_block_kernel<Tiles>, threads, block_inverse_shared_bytes<Tiles>(largest));
}

}  // namespace kfac_fast
