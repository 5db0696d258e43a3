// Cholesky factor and inverse of one pivot block, in one elimination.
#pragma once

#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// A pivot must be positive and finite; written so that NaN fails.
template <typename T>
inline bool is_valid_pivot(T p) {
  return p > T(0) && p - p == T(0);
}

// Rows are eliminated in blocks of this many; what earlier blocks do to a block's rows is done in one sweep over them.
constexpr int64_t kPivotRows = 16;  // a multiple of kLanes
constexpr int64_t kEliminatedRows = 4;

// Rows i .. i + 4 of `target` lose sum over l in [0, end) of factors[l, i] rows[l], on columns [first, last): whole
// vectors. Four rows at a time share the loads and make four independent chains of multiply-adds.
template <typename T>
inline void eliminate(const T* factors, const T* rows, int64_t ld, int64_t i, int64_t end, int64_t first, int64_t last,
                      T* target) {  // all [size, ld]
  for (int64_t c = first; c < last; c += kLanes<T>) {
    Vec<T> sum[kEliminatedRows];
    KFAC_FAST_UNROLL
    for (int r = 0; r < kEliminatedRows; ++r) sum[r] = load(target + (i + r) * ld + c);
    for (int64_t l = 0; l < end; ++l) {
      const Vec<T> row = load(rows + l * ld + c);
      KFAC_FAST_UNROLL
      for (int r = 0; r < kEliminatedRows; ++r) sum[r] -= factors[l * ld + i + r] * row;
    }
    KFAC_FAST_UNROLL
    for (int r = 0; r < kEliminatedRows; ++r) store(target + (i + r) * ld + c, sum[r]);
  }
}

// Eliminating downwards turns [P | I] into [L^T | L^-1], P = L L^T. On entry `upper` holds the upper triangle of P and
// `inverse` the identity; on return `inverse` holds L^-1, zeros above its diagonal. All stores are whole vectors: a
// scalar stored into a row would stall the vector load that follows.
// Returns 0, or the 1-based index of the first pivot that is not positive.
template <typename T>
inline int64_t invert_cholesky_factor(T* upper, T* inverse,        // [size, ld], room for whole kPivotRows
                                      int64_t size, int64_t ld) {  // ld: a multiple of kLanes
  for (int64_t begin = 0; begin < size; begin += kPivotRows) {
    const int64_t end = min(begin + kPivotRows, size);
    for (int64_t i = begin; i < end && begin > 0; i += kEliminatedRows) {
      eliminate(upper, upper, ld, i, begin, i / kLanes<T> * kLanes<T>, ld, upper);
      eliminate(upper, inverse, ld, i, begin, 0, begin, inverse);
    }
    for (int64_t j = begin; j < end; ++j) {
      T* pivot_row = upper + j * ld;
      T* pivot_inverse = inverse + j * ld;
      const T pivot = pivot_row[j];
      if (!is_valid_pivot(pivot)) return j + 1;
      const T scale = T(1) / square_root(pivot);
      for (int64_t c = j / kLanes<T> * kLanes<T>; c < ld; c += kLanes<T>) {
        store(pivot_row + c, load(pivot_row + c) * scale);
      }
      for (int64_t c = 0; c <= j; c += kLanes<T>) store(pivot_inverse + c, load(pivot_inverse + c) * scale);
      for (int64_t i = j + 1; i < end; ++i) {
        const T factor = pivot_row[i];
        T* row = upper + i * ld;
        T* row_inverse = inverse + i * ld;
        for (int64_t c = i / kLanes<T> * kLanes<T>; c < ld; c += kLanes<T>) {
          store(row + c, load(row + c) - factor * load(pivot_row + c));
        }
        for (int64_t c = 0; c <= j; c += kLanes<T>) {
          store(row_inverse + c, load(row_inverse + c) - factor * load(pivot_inverse + c));
        }
      }
    }
  }
  return 0;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
