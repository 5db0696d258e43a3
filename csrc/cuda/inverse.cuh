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

// L = chol(D), root = L^-1 for the 16x16 diagonal block D, by one warp. Lane c < 16 holds column c of D, lane 16 + c
// column c of the identity, and both take part in the same elimination. Returns the first pivot that fails, 1-based,
// or 0, in all lanes.
template <typename T, typename Element>
__device__ int factor_pivot_block(Element&& element, T* root) {  // D[r, c] = element(r, c); root [16, 16]
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  T x[kPanel];
#pragma unroll
  for (int i = 0; i < kPanel; ++i) x[i] = lane < kPanel ? element(i, lane) : T(i == lane - kPanel);
  int failed = 0;
#pragma unroll
  for (int k = 0; k < kPanel; ++k) {
    const T pivot = __shfl_sync(~0u, x[k], k);
    if (failed == 0 && !valid_pivot(pivot)) failed = k + 1;
    const T r = inverse_sqrt(pivot);
    x[k] *= r;
#pragma unroll
    for (int i = k + 1; i < kPanel; ++i) x[i] -= __shfl_sync(~0u, x[i], k) * r * x[k];
  }
  if (lane >= kPanel) {
#pragma unroll
    for (int i = 0; i < kPanel; ++i) root[i * kPanel + lane - kPanel] = x[i];
  }
  return failed;
}

}  // namespace kfac_fast
