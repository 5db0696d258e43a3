// damped_inverse's shared-memory class: one CTA per matrix, blocked symmetric sweep.
#pragma once

#include "inverse.cuh"
#include "pipeline.cuh"

namespace kfac_fast {

constexpr int kPanelTile = kPanel * kPanel;
// Distance of tiles in shared memory: a skew by two vectors keeps neighbouring tiles apart in the banks.
constexpr int kTileStride = kPanelTile + 8;

// Position of element (r, c) in a tile. Rows r = 4 t + q are stored by q first, so that the 16 threads of an update
// read consecutive vectors; the exclusive or spreads the vectors of a column of rows over the banks.
constexpr __host__ __device__ int in_tile(int r, int c) {
  return kPanel * ((r & 3) * 4 + (r >> 2)) + (((c >> 2) ^ (r & 3)) << 2) + (c & 3);
}
// Position of tile (i, j), i >= j, in the packed lower triangle of tiles.
constexpr __host__ __device__ int tile_start(int i, int j) { return (lower_pairs(i) + j) * kTileStride; }

// Distance of the panel's rows in shared memory: those of a fragment lie in different banks.
constexpr __host__ __device__ int panel_stride(int rows) { return rows + 8; }

// Shared memory of a CTA for matrices of up to `n` rows.
template <typename T>
constexpr size_t block_inverse_shared_bytes(int n) {
  const int tiles = (n + kPanel - 1) / kPanel;
  return sizeof(T) * (tile_start(tiles, 0) + kPanelTile + kPanel * panel_stride(tiles * kPanel)) + 16;
}

// The pivots' columns, divided: W = A_:k L^-T, except that the rows of the pivots themselves become -L^-T, with which
// one formula serves the whole matrix in the update. Thread = row.
template <typename T>
__device__ void solve_panel(const T* tiles, const T* root, T* panel, int step, int count) {
  const int rows = count * kPanel, stride = panel_stride(rows);
  for (int row = static_cast<int>(threadIdx.x); row < rows; row += static_cast<int>(blockDim.x)) {
    const int i = row / kPanel, r = row % kPanel;
    if (i == step) {
#pragma unroll
      for (int c = 0; c < kPanel; ++c) panel[c * stride + row] = -root[c * kPanel + r];
      continue;
    }
    const T* const tile = tiles + (i > step ? tile_start(i, step) : tile_start(step, i));
    T a[kPanel];
    if (i > step) {
#pragma unroll
      for (int m = 0; m < kPanel; ++m) a[m] = tile[in_tile(r, m)];
    } else {
#pragma unroll
      for (int m = 0; m < kPanel; ++m) a[m] = tile[in_tile(m, r)];
    }
#pragma unroll
    for (int c = 0; c < kPanel; ++c) {
      T w = T(0);
#pragma unroll
      for (int m = 0; m <= c; ++m) w += a[m] * root[c * kPanel + m];
      panel[c * stride + row] = w;
    }
  }
}

// A_ij -= W_i W_j^T for one lower tile, where the pivots' own row and column start from zero: with -L^-T for W_k that
// makes A_ik = W_i L^-1 and A_kk = -(L L^T)^-1. 16 threads with 4x4 elements each, or 4 with 8x8 (kGroups = 2): fewer
// loads per product, but only large matrices have tiles for all threads then.
template <int kGroups, typename T>
__device__ void update_tile(T* tiles, const T* panel, int i, int j, int step, int stride, int member) {
  constexpr int kPerSide = 4 / kGroups, kMicro = 4 * kGroups;
  const int ty = member / kPerSide, tx = member % kPerSide;
  const bool fresh = i == step || j == step;
  T* const tile = tiles + tile_start(i, j);
  T acc[kMicro][kMicro] = {};
  const auto for_each_row = [&](auto&& f) {
#pragma unroll
    for (int r = 0; r < kMicro; ++r) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        f(r, g, tile + in_tile(4 * (ty + r / 4 * kPerSide) + r % 4, 4 * (tx + g * kPerSide)));
      }
    }
  };
  if (!fresh) {
    for_each_row([&](int r, int g, const T* at) {
      T v[4];
      load4(at, v);
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[r][4 * g + c] = v[c];
    });
  }
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    T wi[kGroups][4], wj[kGroups][4];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      load4(panel + k * stride + i * kPanel + 4 * (ty + g * kPerSide), wi[g]);
      load4(panel + k * stride + j * kPanel + 4 * (tx + g * kPerSide), wj[g]);
    }
#pragma unroll
    for (int r = 0; r < kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < kMicro; ++c) acc[r][c] -= wi[r / 4][r % 4] * wj[c / 4][c % 4];
    }
  }
  for_each_row([&](int r, int g, T* at) {
    T v[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) v[c] = acc[r][4 * g + c];
    store4_shared(at, v);
  });
}

// Where a lane finds its part of the operands and of a tile. The rows of a fragment are the tile's in an order that
// spreads them over the banks.
struct LanePlaces {
  int p, q, pair[2][2];  // pairs of neighbours: [left or right half, upper or lower]

  __device__ explicit LanePlaces(int stride) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4, row = g % 4 * 2 + g / 4;
    p = t * stride + row;
    q = t * stride + g;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int half = 0; half < 2; ++half) pair[c][half] = in_tile(row + 8 * half, 8 * c + 2 * t);
    }
  }
};

// The same by a warp on tensor cores, three TF32 products for one: see Fragments.
__device__ inline void update_tile_mma(float* tiles, const float* panel, int i, int j, int step, int stride,
                                       const LanePlaces& places) {
  using Operand = Fragments<float>;
  const float *const p = panel + i * kPanel + places.p, *const q = panel + j * kPanel + places.q;
  float d[2][4] = {};
#pragma unroll
  for (int k = 0; k < kPanel; k += Operand::kStep) {
    uint32_t a[4], a_low[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      a[w] = Operand::word(p + (k + w / 2 * 4) * stride + w % 2 * 8);
      a_low[w] = Operand::low(a[w]);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      uint32_t b[2], b_low[2];
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        b[w] = Operand::word(q + (k + w * 4) * stride + 8 * c);
        b_low[w] = Operand::low(b[w]);
      }
      mma_tf32(d[c], a_low, b);
      mma_tf32(d[c], a, b_low);
      mma_tf32(d[c], a, b);
    }
  }
  const bool fresh = i == step || j == step;
  float* const tile = tiles + tile_start(i, j);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2& at = *reinterpret_cast<float2*>(tile + places.pair[c][half]);
      const float2 v = at;
      at = {(fresh ? 0.0f : v.x) - d[c][2 * half], (fresh ? 0.0f : v.y) - d[c][2 * half + 1]};
    }
  }
}

// Lower triangle to shared memory, a warp per row; diagonal tiles are kept as full squares. Beyond n stands an
// identity, whose sweeps change nothing.
template <typename T>
__device__ void load_lower(const T* in,  // [n, n]
                           T damping, int n, T* tiles, int count) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warps = static_cast<int>(blockDim.x) / kWarpSize;
  for (int row = static_cast<int>(threadIdx.x) / kWarpSize; row < count * kPanel; row += warps) {
    const int i = row / kPanel;
    for (int begin = 0; begin <= row; begin += kWarpSize) {
      const int column = begin + lane, j = column / kPanel;
      if (column > row) continue;
      T value = T(row == column);
      if (row < n) value = in[static_cast<int64_t>(row) * n + column] + (row == column ? damping : T(0));
      T* const tile = tiles + tile_start(i, j);
      tile[in_tile(row % kPanel, column % kPanel)] = value;
      if (i == j) tile[in_tile(column % kPanel, row % kPanel)] = value;
    }
    __syncwarp();  // a row's loads are one request if the warp comes together again
  }
}

constexpr int kBlockClassThreads = 256;  // at most
constexpr int kOnTensorCores = 0;        // in place of kGroups

// Inverses of blocks of 33 rows and more that fit into shared memory, one per CTA, lower triangle in 16x16 tiles.
// Per 16 pivots: a thread per row solves the panel, then all update tiles but warp 0, which factors the next diagonal.
// Small sizes: latency of the pivot chain; large ones: shared-memory bandwidth and instructions about equally.
template <typename T, int kGroups>
__global__ void __launch_bounds__(kBlockClassThreads, kGroups == 2 || sizeof(T) == 8 ? 1 : 2)
    damped_inverse_block_kernel(InverseArguments<T> op, const BlockEntry* table) {
  const BlockEntry block = table[blockIdx.x];
  if (op.retry_failed && op.info[block.index] == 0) return;
  const int n = block.size, count = (n + kPanel - 1) / kPanel, stride = panel_stride(count * kPanel);
  T* const root = shared_memory<T>();  // [16, 16]
  T* const panel = root + kPanelTile;  // [16, stride]
  T* const tiles = panel + kPanel * stride;
  int* const failed = reinterpret_cast<int*>(tiles + tile_start(count, 0));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpSize, warp = thread / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;

  load_lower(op.blocks + block.offset, op.damping[block.index], n, tiles, count);
  if (thread == 0) *failed = 0;
  __syncthreads();

  [[maybe_unused]] const LanePlaces places(stride);
  const auto factor = [&](int step) {  // warp 0
    const T* const diagonal = tiles + tile_start(step, step);
    const int pivot = factor_pivot_block([&](int r, int c) { return diagonal[in_tile(r, c)]; }, root);
    if (lane == 0 && pivot != 0) *failed = step * kPanel + pivot;
  };
  if (warp == 0) factor(0);
  __syncthreads();
  for (int step = 0; step < count && *failed == 0; ++step) {
    solve_panel(tiles, root, panel, step, count);
    __syncthreads();
    const bool ahead = step + 1 < count;
    const int next = ahead ? tile_start(step + 1, step + 1) / kTileStride : -1;
    if (ahead && warp == 0) {
      if (lane < 16) update_tile<1>(tiles, panel, step + 1, step + 1, step, stride, lane);
      __syncwarp();
      factor(step + 1);
    } else if constexpr (kGroups == kOnTensorCores) {
      const int first = warp - (ahead ? 1 : 0), groups = warps - (ahead ? 1 : 0);
      int i, j;
      lower_pair(first, i, j);
      for (int item = first; item < lower_pairs(count); item += groups) {
        if (item != next) update_tile_mma(tiles, panel, i, j, step, stride, places);
        for (j += groups; j > i; ++i) j -= i + 1;
      }
    } else {
      constexpr int kMembers = 16 / (kGroups * kGroups);  // threads per tile
      const int busy = ahead ? kWarpSize : 0;             // threads that have other things to do
      const int groups = (static_cast<int>(blockDim.x) - busy) / kMembers;
      for (int item = (thread - busy) / kMembers; item < lower_pairs(count); item += groups) {
        int i, j;
        lower_pair(item, i, j);
        if (item != next) update_tile<kGroups>(tiles, panel, i, j, step, stride, thread % kMembers);
      }
    }
    __syncthreads();
  }

  const int info = *failed;
  if (thread == 0) op.info[block.index] = info;
  if (info != 0 && !op.nan_on_failure) return;
  T* const out = op.inverse + block.offset;
  for (int row = warp; row < n; row += warps) {
    for (int column = lane; column < n; column += kWarpSize) {
      const int i = max(row, column), j = min(row, column);
      const T value = tiles[tile_start(i / kPanel, j / kPanel) + in_tile(i % kPanel, j % kPanel)];
      out[static_cast<int64_t>(row) * n + column] = info != 0 ? not_a_number<T>() : -value;
    }
  }
}

// Largest size of the class on a device with this much shared memory per block.
template <typename T>
int largest_block_class_size(size_t shared_bytes) {
  int n = kPanel;
  while (block_inverse_shared_bytes<T>(n + kPanel) <= shared_bytes) n += kPanel;
  return n;
}

// `largest`: size of the first block of the class.
template <typename T>
cudaError_t launch_block_class(const InverseArguments<T>& arguments, const BlockEntry* table, int count, int largest,
                               bool tensor_cores, void* stream) {
  const size_t shared_bytes = block_inverse_shared_bytes<T>(largest);
  if constexpr (sizeof(T) == 4) {
    if (tensor_cores) {
      const int threads = largest <= 64 ? 128 : largest <= 128 ? 192 : kBlockClassThreads;
      return launch(damped_inverse_block_kernel<T, kOnTensorCores>, count, threads, shared_bytes, stream, arguments,
                    table);
    }
    if (largest > 96) {  // doubles have no registers for 8x8 elements
      const int threads = largest <= 128 ? 192 : kBlockClassThreads;
      return launch(damped_inverse_block_kernel<T, 2>, count, threads, shared_bytes, stream, arguments, table);
    }
  }
  const int threads = largest <= 64 ? 128 : kBlockClassThreads;
  return launch(damped_inverse_block_kernel<T, 1>, count, threads, shared_bytes, stream, arguments, table);
}

}  // namespace kfac_fast
