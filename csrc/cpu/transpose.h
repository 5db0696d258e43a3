// In-register transposition of kLanes vectors, without intrinsics.
#pragma once

#include <utility>

#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

template <typename T>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  using Scalar = int32_t;
  typedef int32_t Vector __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES)));
};
template <>
struct LaneIndex<double> {
  using Scalar = int64_t;
  typedef int64_t Vector __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES)));
};

template <int... kIndices, typename T>
inline Vec<T> shuffle(Vec<T> a, Vec<T> b, T) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndices...);
#else
  return __builtin_shuffle(a, b, typename LaneIndex<T>::Vector{kIndices...});
#endif
}

// Exchanges the off-diagonal entries of the 2 x 2 blocks, each kStep lanes wide, that vectors a and b hold.
template <typename T, int kStep, int... kLane>
inline void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  const Vec<T> first = shuffle<(kLane & kStep ? kLanes<T> + kLane - kStep : kLane)...>(a, b, T());
  const Vec<T> second = shuffle<(kLane & kStep ? kLanes<T> + kLane : kLane + kStep)...>(a, b, T());
  a = first;
  b = second;
}

template <typename T, int kStep>
inline __attribute__((always_inline)) void transpose_blocks(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (kStep > 0) {
    for (int r = 0; r < kLanes<T>; ++r) {
      if ((r & kStep) == 0) exchange<T, kStep>(rows[r], rows[r + kStep], std::make_integer_sequence<int, kLanes<T>>());
    }
    transpose_blocks<T, kStep / 2>(rows);
  }
}

template <typename T>
inline __attribute__((always_inline)) void transpose(Vec<T> (&rows)[kLanes<T>]) {
  transpose_blocks<T, kLanes<T> / 2>(rows);
}

// out[j, i] = in[i, j] for one tile of kLanes rows and columns.
template <typename T>
inline __attribute__((always_inline)) void transpose_tile(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  Vec<T> rows[kLanes<T>];
  for (int i = 0; i < kLanes<T>; ++i) rows[i] = load(in + i * in_stride);
  transpose<T>(rows);
  for (int j = 0; j < kLanes<T>; ++j) store(out + j * out_stride, rows[j]);
}

// The same for any number of rows and columns.
template <typename T>
inline void transpose_matrix(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                             int64_t out_stride) {
  const int64_t whole_rows = rows / kLanes<T> * kLanes<T>, whole_columns = columns / kLanes<T> * kLanes<T>;
  for (int64_t j = 0; j < whole_columns; j += kLanes<T>) {
    for (int64_t i = 0; i < whole_rows; i += kLanes<T>) {
      transpose_tile(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    }
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; ++i) out[j * out_stride + i] = in[i * in_stride + j];
  }
}

// Copies the lower triangle's rows [begin, end) of c to the upper triangle.
template <typename T>
inline void mirror_rows(T* c, int64_t n, int64_t begin, int64_t end) {  // [n, n]
  for (int64_t first = begin; first < end; first += kLanes<T>) {
    const int64_t last = min(first + kLanes<T>, end);
    transpose_matrix(c + first * n, n, last - first, first, c + first, n);
    for (int64_t i = first; i < last; ++i) {
      for (int64_t j = first; j < i; ++j) c[j * n + i] = c[i * n + j];
    }
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
