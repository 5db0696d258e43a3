// damped_inverse's global-memory class: the pivots of a step.
#pragma once

#include "inverse.cuh"

namespace kfac_fast {

constexpr int kGlobalSide = 64;  // of a tile, and pivots per step
constexpr int kGlobalTile = kGlobalSide * kGlobalSide;
constexpr int kRootStride = kGlobalSide + 1;  // in shared memory: rows and columns both read without conflicts

// Distance of the columns of invert_root's scaled rows: vectors of neighbouring columns lie in different banks.
template <typename T>
constexpr int kColumnStride = kPanel + 16 / sizeof(T);
// Elements of shared memory that invert_root takes beside the square.
template <typename T>
constexpr int kRootScratch = kPanelTile + kGlobalSide * kColumnStride<T>;

// L^-1 of the 64x64 block in `square`, in place (rows below the diagonal of L^-1, elsewhere leftovers), by forward
// elimination of [A | I] 16 pivots at a time: columns of I take the place of columns of A that are done with. All
// threads of the CTA call; 256 of them. Returns the first pivot that fails, 1-based, or 0.
template <typename T>
__device__ int invert_root(T* square,   // [64, kRootStride]
                           T* scratch,  // [kRootScratch]
                           int* failed) {
  constexpr int kParts = 4, kRows = kPanel / kParts;
  T* const small_root = scratch;           // [16, 16]
  T* const scaled = scratch + kPanelTile;  // [64, kColumnStride] the 16 rows being eliminated, a column after the other
  const int thread = static_cast<int>(threadIdx.x), column = thread % kGlobalSide, part = thread / kGlobalSide;
#pragma unroll 1
  for (int begin = 0; begin < kGlobalSide; begin += kPanel) {
    if (thread < kWarpSize) {
      const int pivot = factor_pivot_block<T>(
          [&](int r, T(&x)[kPanel]) {
#pragma unroll
            for (int c = 0; c < kPanel; ++c) x[c] = square[(begin + r) * kRootStride + begin + c];
          },
          [&](int r, int c, T value) { small_root[r * kPanel + c] = value; });
      if (thread == 0) *failed = pivot == 0 ? 0 : begin + pivot;
    }
    __syncthreads();
    if (*failed != 0) return *failed;
    const bool pivotal = column >= begin && column < begin + kPanel;  // column of I from here on
    const int first = kRows * part;                                   // of this thread's rows of the panel
    T* const at = square + begin * kRootStride + column;
    T own[kRows] = {};
#pragma unroll 1
    for (int m = 0; m <= first; m += kRows) {  // L^-1 has zeros above its diagonal
      T a[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) a[i] = at[(m + i) * kRootStride];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        T factor[kRows];
        load4(small_root + (first + r) * kPanel + m, factor);
#pragma unroll
        for (int i = 0; i < kRows; ++i) own[r] += factor[i] * a[i];
      }
    }
    if (pivotal) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) own[r] = small_root[(first + r) * kPanel + column - begin];
    }
    store4_shared(scaled + column * kColumnStride<T> + first, own);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) at[(first + r) * kRootStride] = own[r];
    T x[kPanel];
#pragma unroll
    for (int m = 0; m < kPanel; m += 4) {
      T v[4];
      load4(scaled + column * kColumnStride<T> + m, v);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[m + i] = v[i];
    }
#pragma unroll 1  // a thread has few registers
    for (int r = kPanel + part; begin + r < kGlobalSide; r += kParts) {
      T sum = pivotal ? T(0) : at[r * kRootStride];
#pragma unroll
      for (int m = 0; m < kPanel; m += 4) {
        T factor[4];
        load4(scaled + (begin + r) * kColumnStride<T> + m, factor);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum -= factor[i] * x[m + i];
      }
      at[r * kRootStride] = sum;
    }
    __syncthreads();
  }
  return 0;
}

}  // namespace kfac_fast
