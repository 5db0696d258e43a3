// factor_update's last step: C <- decay C + scale S, where S is whole at once or comes in chunks; and the trace.
#pragma once

#include "rows.cuh"

namespace kfac_fast {

template <typename T>
struct FinishArguments {
  T* partials;         // scratch memory, per block of several chunks: [chunks, lower tiles, side, side]
  T* factors;          // [numel]
  const T* decay;      // [b]
  const T* scale;      // [b]
  int32_t* nonfinite;  // [b] zeroed before
  T* trace;            // [b]
  T* trace_parts;      // scratch memory, per block [CTAs with a part of the diagonal]
  int32_t* arrived;    // [b] of these CTAs; zeroed before
};

// Brings in a CTA's part of the trace, its threads' `own` together; the last CTA adds the parts up, in their order. All
// threads call; `shared` holds one element per warp.
template <typename T>
__device__ void add_to_trace(const RowsEntry& rows, int part, T own, const FinishArguments<T>& to, T* shared) {
  const T sum = sum_over_threads(own, shared);
  if (threadIdx.x != 0) return;
  volatile T* const parts = to.trace_parts + rows.trace;  // others write them: not to be taken from this CTA's cache
  parts[part] = sum;
  __threadfence();
  if (atomicAdd(to.arrived + rows.index, 1) != rows.diagonal - 1) return;
  __threadfence();
  T total = T(0);
  for (int i = 0; i < rows.diagonal; ++i) total += parts[i];
  to.trace[rows.index] = total;
}

// decay == 0 starts afresh whatever C held, NaN included (the BLAS convention for beta).
template <typename T>
__device__ T decayed(T keep, T before, T added) {
  return keep == T(0) ? added : keep * before + added;
}

// What becomes of a CTA's tile of products: one of the chunks of S, or, where there is a single one, part of C on both
// sides of the diagonal. `visit` and `staged`: see hand_around.
template <int kSide, int kThreads, typename T, typename Visit>
__device__ void finish_tile(const RowsEntry& rows, const RowsItem& item, const FinishArguments<T>& to, T* staged,
                            Visit&& visit) {
  constexpr int kPass = kSide < 64 ? kSide : 64, kStride = kSide + 1;
  const bool whole = rows.chunks == 1;
  const T keep = to.decay[rows.index], add = to.scale[rows.index];
  T* const c = to.factors + rows.factor;
  T* const partial = to.partials + item.partial;
  const int row0 = item.ti * kSide, column0 = item.tj * kSide;
  bool bad = false;
  T diagonal = T(0);
  const auto write = [&](int r, int k, T& value) {
    const int row = row0 + r, column = column0 + k;
    if (row >= rows.size || column > row) return;
    if (whole) {
      T* const at = c + static_cast<int64_t>(row) * rows.size + column;
      bad = bad || !isfinite(value);
      *at = value = decayed(keep, *at, add * value);
      if (row == column) diagonal += value;
    } else {
      partial[r * kSide + k] = value;
    }
  };
  hand_around<kSide, kThreads>(staged, visit, write, [&](int first) {
    if (!whole) return;
    __syncthreads();
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < kPass * kSide; e += kThreads) {  // the mirror image
      const int row = row0 + first + e % kPass, column = column0 + e / kPass;
      if (row < rows.size && column < row) {
        c[static_cast<int64_t>(column) * rows.size + row] = staged[e % kPass * kStride + e / kPass];
      }
    }
  });
  if (!whole) return;
  if (__syncthreads_or(bad) && threadIdx.x == 0) atomicOr(to.nonfinite + rows.index, 1);
  if (item.ti == item.tj) add_to_trace(rows, item.ti, diagonal, to, staged);
}

constexpr int kFinishSide = 32, kFinishThreads = 256;

// C <- decay C + scale (sum of the chunks), both triangles, and whether the sum is finite.
// One CTA per lower 32x32 piece of a block; its mirror image goes through shared memory to be written in rows.
// Memory: reads every chunk's piece once, reads half of C and writes all of it.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    factor_update_finish_kernel(const RowsEntry* entries, const int32_t* first, int count, FinishArguments<T> to) {
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(first, count, item);
  const RowsEntry& rows = entries[owner];
  int pi, pj;
  lower_pair(item - first[owner], pi, pj);
  const int row0 = pi * kFinishSide, column0 = pj * kFinishSide;
  const int tx = static_cast<int>(threadIdx.x) % kFinishSide, ty = static_cast<int>(threadIdx.x) / kFinishSide;
  const int ti = row0 / rows.side, tj = column0 / rows.side;
  const int64_t tile_numel = static_cast<int64_t>(rows.side) * rows.side;
  const int64_t chunk_numel = lower_pairs(rows.tiles) * tile_numel;
  const T* const tile = to.partials + rows.partial + (lower_pairs(ti) + tj) * tile_numel +
                        (row0 % rows.side) * rows.side + column0 % rows.side;
  const T keep = to.decay[rows.index], add = to.scale[rows.index];
  T* const c = to.factors + rows.factor;
  T* const mirror = shared_memory<T>();  // [32, 33]
  constexpr int kRowsPerThread = kFinishSide * kFinishSide / kFinishThreads;

  bool bad = false;
  T diagonal = T(0);
#pragma unroll
  for (int s = 0; s < kRowsPerThread; ++s) {
    const int r = ty + s * (kFinishThreads / kFinishSide);
    const int row = row0 + r, column = column0 + tx;
    if (row >= rows.size || column > row) continue;
    T sum = T(0);
    for (int chunk = 0; chunk < rows.chunks; ++chunk) sum += tile[chunk * chunk_numel + r * rows.side + tx];
    bad = bad || !isfinite(sum);
    T* const at = c + static_cast<int64_t>(row) * rows.size + column;
    const T value = decayed(keep, *at, add * sum);
    *at = mirror[r * (kFinishSide + 1) + tx] = value;
    if (row == column) diagonal += value;
  }
  const int any_bad = __syncthreads_or(bad);
  if (any_bad && threadIdx.x == 0) atomicOr(to.nonfinite + rows.index, 1);
#pragma unroll
  for (int s = 0; s < kRowsPerThread; ++s) {
    const int r = ty + s * (kFinishThreads / kFinishSide);
    const int row = column0 + r, column = row0 + tx;  // of the mirror image
    if (column < rows.size && row < column) {
      c[static_cast<int64_t>(row) * rows.size + column] = mirror[tx * (kFinishSide + 1) + r];
    }
  }
  if (pi == pj) add_to_trace(rows, pi, diagonal, to, mirror);
}

}  // namespace kfac_fast
