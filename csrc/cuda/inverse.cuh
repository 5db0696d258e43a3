// What the classes of damped_inverse share: arguments, the pivot test, and the factorisation of a block of pivots.
#pragma once

#include "tile.cuh"

namespace kfac_fast {

// What every damped_inverse kernel gets, besides its table of blocks.
template <typename T>
struct InverseArguments {
  const T* blocks;   // [numel]
  const T* damping;  // [b]
  T* inverse;        // [numel], may be `blocks`
  int32_t* info;     // [b]
  bool retry_failed, nan_on_failure;
};

// Fails zero, negative, NaN and infinite pivots.
template <typename T>
__device__ bool valid_pivot(T pivot) {
  return pivot > T(0) && isfinite(pivot);
}

template <typename T>
__device__ T not_a_number() {
  return static_cast<T>(__uint_as_float(0x7fc00000u));
}

constexpr int kPanel = 16;  // pivots that one warp factors at a time
constexpr int kPanelTile = kPanel * kPanel;

// Position of tile (i, j) or (j, i) in the order of lower_pair.
__device__ inline int lower_index(int i, int j) { return lower_pairs(max(i, j)) + min(i, j); }

// L = chol(D), root = L^-1 for the 16x16 diagonal block D, by one warp: load(r, x) brings row r of D to the diagonal,
// store(r, c, value) takes root, zeros above its diagonal included. Lane c < 16 holds column c of D, lane 16 + c column
// c of the identity, and both take part in the same elimination; what lies below the diagonal of D takes none, because
// lane r holds the same numbers. Returns the first pivot that fails, 1-based, or 0, in all lanes.
template <typename T, typename Load, typename Store>
__device__ int factor_pivot_block(Load&& load, Store&& store) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  T x[kPanel];
  load(lane % kPanel, x);
#pragma unroll
  for (int i = 0; i < kPanel; ++i) x[i] = lane < kPanel ? x[i] : T(i == lane - kPanel);
  int failed = 0;
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const T pivot = __shfl_sync(~0u, x[k], k);
    if (failed == 0 && !valid_pivot(pivot)) failed = k + 1;
    const T r = inverse_sqrt(pivot), unscaled = x[k];
    x[k] *= r;
    const T factor = -x[k] * r;
#pragma unroll
    for (int i = k + 1; i < kPanel; ++i) x[i] += __shfl_sync(~0u, unscaled, i) * factor;
  }
  if (lane >= kPanel) {
#pragma unroll
    for (int i = 0; i < kPanel; ++i) store(i, lane - kPanel, x[i]);
  }
  return failed;
}

}  // namespace kfac_fast
