// damped_inverse's global-memory class: blocks too large for shared memory, all of them at once.
//
// The blocked symmetric sweep with 64 pivots per step and two launches per step for all matrices together:
//   panel:  W_i = A_ik L^-T, A_ik = W_i L^-1, A_kk = -(L L^T)^-1
//   update: A_ij -= W_i W_j^T; the CTA that holds the next diagonal tile goes on to factor it, so that the chain of
//           pivots runs beside the other tiles' work.
// Matrices stand by decreasing size: those with a step left are always the first ones.
#pragma once

#include "global_root.cuh"
#include "pipeline.cuh"

namespace kfac_fast {

struct GlobalEntry {
  BlockEntry block;
  int64_t scratch;  // offset of this matrix in scratch memory
  int32_t tiles;    // per side
};

// Scratch memory of one matrix: the lower tiles (each [64, 64] row-major, padded with an identity), L^-1 of the current
// pivots [64, 64], and W transposed, [tiles, 64, 64].
constexpr int64_t global_scratch_numel(int tiles) {
  return static_cast<int64_t>(lower_pairs(tiles) + 1 + tiles) * kGlobalTile;
}

template <typename T>
struct GlobalTables {
  const GlobalEntry* entries;     // [count]
  const int32_t* first_panel;     // [count + 1] tiles in a block column before each matrix
  const int32_t* first_update;    // [count + 1] lower tiles without one block row and column
  const int32_t* first_triangle;  // [count + 1] lower tiles
  // [count] 0: working, > 0: the pivot that failed, < 0: not to be touched. Factoring writes `found` while other CTAs
  // of the launch read `status`; the panel launch in between copies one to the other.
  int32_t* found;
  int32_t* status;
  T* scratch;
  int count;
};

template <typename T>
struct GlobalMatrix {
  T* tiles;
  T* root;
  T* panel;

  __device__ GlobalMatrix(const GlobalTables<T>& tables, const GlobalEntry& entry)
      : tiles(tables.scratch + entry.scratch),
        root(tiles + static_cast<int64_t>(lower_pairs(entry.tiles)) * kGlobalTile),
        panel(root + kGlobalTile) {}
  __device__ T* tile(int i, int j) const { return tiles + static_cast<int64_t>(lower_pairs(i) + j) * kGlobalTile; }
};

template <typename T>
using GlobalTile = Tile<T, kGlobalSide>;

// The update on tensor cores, with as many threads as invert_root takes.
struct GlobalMmaTile : MmaTile<float, kGlobalSide> {
  static constexpr int kThreads = 256, kRows = 1, kLoads = kGlobalSide * kDepth / kThreads;
};

// Shared memory of the kernels: the stages of a product, or the square of invert_root and its scratch.
template <typename T>
constexpr size_t kGlobalSharedBytes = std::max({GlobalTile<T>::kSharedBytes, GlobalMmaTile::kSharedBytes,
                                                sizeof(T) * (kGlobalSide * kRootStride + kRootScratch<T>)}) +
                                      16;

// Factors the diagonal tile in `square` (shared memory, as left by the caller behind a barrier) for step `step`.
template <typename T>
__device__ void factor_diagonal(const GlobalMatrix<T>& matrix, T* square, int step, int32_t* found) {
  T* const scratch = square + kGlobalSide * kRootStride;
  int* const failed = reinterpret_cast<int*>(scratch + kRootScratch<T>);
  const int pivot = invert_root(square, scratch, failed);
  if (pivot != 0) {
    if (threadIdx.x == 0) *found = step * kGlobalSide + pivot;
    return;
  }
  for (int e = static_cast<int>(threadIdx.x); e < kGlobalTile; e += GlobalTile<T>::kThreads) {
    const int r = e / kGlobalSide, c = e % kGlobalSide;
    matrix.root[e] = c <= r ? square[r * kRootStride + c] : T(0);
  }
}

// Copies the damped lower triangles to scratch memory and factors the first diagonal tile of each matrix.
// One CTA per tile; neighbouring threads on neighbouring columns.
// Memory.
template <typename T>
__global__ void __launch_bounds__(GlobalTile<T>::kThreads, sizeof(T) == 8 ? 3 : 4)
    damped_inverse_load_kernel(InverseArguments<T> op, GlobalTables<T> tables) {
  const int item = static_cast<int>(blockIdx.x), owner = find_owner(tables.first_triangle, tables.count, item);
  const GlobalEntry& entry = tables.entries[owner];
  int i, j;
  lower_pair(item - tables.first_triangle[owner], i, j);
  const bool skip = op.retry_failed && op.info[entry.block.index] == 0;
  if (i == 0 && threadIdx.x == 0) tables.found[owner] = skip ? -1 : 0;
  if (skip) return;

  const GlobalMatrix<T> matrix(tables, entry);
  const T* const in = op.blocks + entry.block.offset;
  const T damping = op.damping[entry.block.index];
  T* const tile = matrix.tile(i, j);
  T* const square = shared_memory<T>();  // [64, kRootStride]
  const int n = entry.block.size;
  for (int e = static_cast<int>(threadIdx.x); e < kGlobalTile; e += GlobalTile<T>::kThreads) {
    const int r = e / kGlobalSide, c = e % kGlobalSide, row = i * kGlobalSide + r, column = j * kGlobalSide + c;
    if (column > row) continue;
    T value = T(row == column);
    if (row < n) value = in[static_cast<int64_t>(row) * n + column] + (row == column ? damping : T(0));
    square[r * kRootStride + c] = value;
    if (i == j) square[c * kRootStride + r] = value;
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kGlobalTile; e += GlobalTile<T>::kThreads) {
    tile[e] = square[e / kGlobalSide * kRootStride + e % kGlobalSide];
  }
  __syncthreads();
  if (i == 0) factor_diagonal(matrix, square, 0, tables.found + owner);
}

// Rows of P or Q that lie in a [64, 64] tile, as stored or transposed.
template <typename T>
struct TileLoader {
  const T* data;
  LoadSlots<GlobalTile<T>> slots;  // along_k: transposed

  template <int kCount>
  __device__ __forceinline__ void load(T (&values)[kCount], int64_t k0, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int k = static_cast<int>(k0) + slots.k(first + i), column = slots.column(first + i);
      values[i] = slots.along_k ? data[column * kGlobalSide + k] : data[k * kGlobalSide + column];
    }
  }
};

// Writes a thread's accumulators to a [64, 64] tile, as they are or transposed.
template <typename T>
__device__ void store_tile(T* tile, const T (&acc)[4][4], bool transposed) {
  const int row = GlobalTile<T>::row(0), column = GlobalTile<T>::column(0);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    T v[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) v[b] = transposed ? acc[b][a] : acc[a][b];
    store4(tile + (transposed ? (column + a) * kGlobalSide + row : (row + a) * kGlobalSide + column), v);
  }
}

// Block column `step`: W for the update, and its swept values.
// One CTA per tile of the column; 256 threads with 4x4 elements each.
// Latency of two products of depth 64.
template <typename T>
__global__ void __launch_bounds__(GlobalTile<T>::kThreads, 2)
    damped_inverse_panel_kernel(GlobalTables<T> tables, int active, int step) {
  using Loader = TileLoader<T>;
  const int item = static_cast<int>(blockIdx.x), owner = find_owner(tables.first_panel, active, item);
  const int i = item - tables.first_panel[owner], found = tables.found[owner];
  if (i == step && threadIdx.x == 0) tables.status[owner] = found;
  if (found != 0) return;
  const GlobalMatrix<T> matrix(tables, tables.entries[owner]);
  T* const tile = i >= step ? matrix.tile(i, step) : matrix.tile(step, i);
  T* const shared = shared_memory<T>();
  T* const w = matrix.panel + static_cast<int64_t>(i) * kGlobalTile;
  if (i != step) {
    T acc[4][4] = {};
    multiply<GlobalTile<T>>(acc, Loader{tile, {i > step}}, Loader{matrix.root, {true}}, false, 0, kGlobalSide, shared);
    store_tile(w, acc, true);
    __syncthreads();
  }
  T acc[4][4] = {};
  const Loader root = {matrix.root, {false}};
  multiply<GlobalTile<T>>(acc, i == step ? root : Loader{w, {false}}, root, i == step, 0, kGlobalSide, shared);
  if (i == step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[r][c] = -acc[r][c];
    }
  }
  store_tile(tile, acc, i < step);
}

// The rest of the matrix: A_ij -= W_i W_j^T, by FMA or by three TF32 products, which are as accurate here. The first
// `active` CTAs hold the next diagonal tiles and factor them.
// One CTA per tile; 256 threads with 4x4 elements each, or 8 warps with 16x32.
// Bandwidth of the L2 cache (4 tiles moved per product of depth 64) and arithmetic about equally.
template <typename T, bool kTensorCores>
__global__ void __launch_bounds__(GlobalTile<T>::kThreads, 2)
    damped_inverse_update_kernel(GlobalTables<T> tables, int active, int step) {
  int owner = static_cast<int>(blockIdx.x), i = step + 1, j = step + 1;
  const bool next = owner < active;
  if (!next) {
    const int item = owner - active;
    owner = find_owner(tables.first_update, active, item);
    lower_pair(item - tables.first_update[owner], i, j);
    i += i >= step;  // the pairs without the pivots' row and column
    j += j >= step;
  }
  const GlobalEntry& entry = tables.entries[owner];
  if (tables.status[owner] != 0) return;
  const bool last = step + 1 == entry.tiles;
  if (next ? last : i == step + 1 && j == step + 1) return;
  const GlobalMatrix<T> matrix(tables, entry);
  T* const tile = matrix.tile(i, j);
  const T* const wi = matrix.panel + static_cast<int64_t>(i) * kGlobalTile;
  const T* const wj = matrix.panel + static_cast<int64_t>(j) * kGlobalTile;
  T* const shared = shared_memory<T>();
  const auto subtract = [&](auto&& visit) {
    const auto write = [&](int r, int c, T& value) {
      value = tile[r * kGlobalSide + c] - value;
      if (!next) tile[r * kGlobalSide + c] = value;
    };
    hand_around<kGlobalSide, GlobalTile<T>::kThreads>(shared, visit, write, [](int) {});
  };
  if constexpr (kTensorCores) {
    using Tile = GlobalMmaTile;
    T* const q = i == j ? shared : shared + Tile::kStages * Tile::kStage;
    const auto copy = [](T* stage, const T* w, int64_t k0) {
      copy_vectors<Tile>(
          stage, w, 0, kGlobalSide, false, [&](int k) { return w + (k0 + k) * kGlobalSide; }, [](int) { return T(0); });
    };
    MmaSums<Tile> sums;
    multiply_pipelined<Tile>(sums, 0, kGlobalSide, shared, q, [&](int stage, int64_t k0) {
      copy(shared + stage * Tile::kStage, wi, k0);
      if (i != j) copy(q + stage * Tile::kStage, wj, k0);
    });
    subtract([&](auto&& put) { sums.visit(put); });
  } else {
    using Tile = GlobalTile<T>;
    using Loader = TileLoader<T>;
    T acc[4][4] = {};
    multiply<Tile>(acc, Loader{wi, {false}}, Loader{wj, {false}}, i == j, 0, kGlobalSide, shared);
    subtract([&](auto&& put) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) put(Tile::row(r), Tile::column(c), acc[r][c]);
      }
    });
  }
  if (!next) return;
  // The next diagonal tile is consumed here and now: the panel launch of its own step overwrites it.
  __syncthreads();
  factor_diagonal(matrix, shared, step + 1, tables.found + owner);
}

// Both triangles of the results, minus the swept matrices, and info.
// One CTA per lower tile; its mirror image goes through shared memory to be written in rows.
// Memory.
template <typename T>
__global__ void __launch_bounds__(GlobalTile<T>::kThreads)
    damped_inverse_store_kernel(InverseArguments<T> op, GlobalTables<T> tables) {
  const int item = static_cast<int>(blockIdx.x), owner = find_owner(tables.first_triangle, tables.count, item);
  const GlobalEntry& entry = tables.entries[owner];
  int i, j;
  lower_pair(item - tables.first_triangle[owner], i, j);
  const int failed = tables.found[owner];
  if (failed < 0) return;
  if (i == 0 && threadIdx.x == 0) op.info[entry.block.index] = failed;
  if (failed != 0 && !op.nan_on_failure) return;

  const GlobalMatrix<T> matrix(tables, entry);
  const T* const tile = matrix.tile(i, j);
  T* const out = op.inverse + entry.block.offset;
  T* const square = shared_memory<T>();  // [64, kRootStride]
  const int n = entry.block.size;
  for (int e = static_cast<int>(threadIdx.x); e < kGlobalTile; e += GlobalTile<T>::kThreads) {
    const int r = e / kGlobalSide, c = e % kGlobalSide;
    square[r * kRootStride + c] = failed != 0 ? not_a_number<T>() : -tile[e];
  }
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < kGlobalTile; e += GlobalTile<T>::kThreads) {
    const int r = e / kGlobalSide, c = e % kGlobalSide;
    const int row = i * kGlobalSide + r, column = j * kGlobalSide + c;
    if (row < n && column <= row) out[static_cast<int64_t>(row) * n + column] = square[r * kRootStride + c];
    const int mirror_row = j * kGlobalSide + r, mirror_column = i * kGlobalSide + c;
    if (mirror_column < n && mirror_row < mirror_column) {
      out[static_cast<int64_t>(mirror_row) * n + mirror_column] = square[c * kRootStride + r];
    }
  }
}

// Tables of the class, in memory and on the device. `order` lists its `count` blocks by decreasing size.
template <typename T>
struct GlobalLayout {
  GlobalEntry* entries;
  int32_t *first_panel, *first_update, *first_triangle;
  int32_t *found, *status;
  T* scratch;
  int count;

  GlobalLayout(Arena& arena, const Plan& plan, const int32_t* order, int count_) : count(count_) {
    entries = arena.table<GlobalEntry>(count);
    first_panel = arena.table<int32_t>(count + 1);
    first_update = arena.table<int32_t>(count + 1);
    first_triangle = arena.table<int32_t>(count + 1);
    int64_t numel = 0;
    int32_t panel = 0, update = 0, triangle = 0;
    for (int m = 0;; ++m) {
      if (entries != nullptr) first_panel[m] = panel, first_update[m] = update, first_triangle[m] = triangle;
      if (m == count) break;
      const int32_t n = plan.size(order[m]), tiles = static_cast<int32_t>(ceil_div(n, kGlobalSide));
      if (entries != nullptr) entries[m] = {{plan.offset(order[m]), n, order[m]}, numel, tiles};
      numel += global_scratch_numel(tiles);
      panel += tiles;
      update += lower_pairs(tiles - 1);
      triangle += lower_pairs(tiles);
    }
    found = arena.scratch<int32_t>(count);
    status = arena.scratch<int32_t>(count);
    scratch = arena.scratch<T>(numel);
  }
};

template <typename T>
cudaError_t launch_global_class(const InverseArguments<T>& arguments, const GlobalLayout<T>& layout, const Arena& arena,
                                bool tensor_cores, void* stream) {
  const GlobalTables<T> tables = {arena.on_device(layout.entries),
                                  arena.on_device(layout.first_panel),
                                  arena.on_device(layout.first_update),
                                  arena.on_device(layout.first_triangle),
                                  layout.found,
                                  layout.status,
                                  layout.scratch,
                                  layout.count};
  constexpr int kThreads = GlobalTile<T>::kThreads;
  constexpr size_t kShared = kGlobalSharedBytes<T>;
  const int32_t triangles = layout.first_triangle[layout.count];
  cudaError_t error = launch(damped_inverse_load_kernel<T>, triangles, kThreads, kShared, stream, arguments, tables);
  auto* update = damped_inverse_update_kernel<T, false>;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (tensor_cores) update = damped_inverse_update_kernel<T, true>;
  }
  int active = layout.count;
  for (int step = 0; error == cudaSuccess; ++step) {
    while (active > 0 && layout.entries[active - 1].tiles <= step) --active;
    if (active == 0) break;
    error = launch(damped_inverse_panel_kernel<T>, layout.first_panel[active], kThreads, kShared, stream, tables,
                   active, step);
    if (error != cudaSuccess) break;
    error = launch(update, active + layout.first_update[active], kThreads, kShared, stream, tables, active, step);
  }
  if (error != cudaSuccess) return error;
  return launch(damped_inverse_store_kernel<T>, triangles, kThreads, kShared, stream, arguments, tables);
}

}  // namespace kfac_fast
