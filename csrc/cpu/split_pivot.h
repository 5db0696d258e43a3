// Cholesky factor and inverse of a pivot block of whole tiles for split_inverse.h: pivot.h with 16 rows in registers.
#pragma once

#include "pivot.h"
#include "split_float.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

#if defined(__AMX_BF16__)

using PivotRows = __m512[kTileSide];

// From the upper triangle of P = L L^T to L^-1; what stands below the diagonal is ignored. Returns the pivots.
// Gauss-Jordan in place: where column j is eliminated, its entries of the inverse begin. Roots wait until the end: on
// the way from one pivot to the next there is a division, and no root.
inline __attribute__((always_inline)) __m512 invert_tile(PivotRows& rows) {
  constexpr auto kAll = static_cast<__mmask16>(-1);
  const __m512 one = _mm512_set1_ps(1.0f);
  __m512 pivots = one;
  KFAC_FAST_UNROLL
  for (int j = 0; j < kTileSide; ++j) {
    const auto lane = static_cast<__mmask16>(1 << j);
    const __m512 pivot = _mm512_maskz_permutexvar_ps(kAll, _mm512_set1_epi32(j), rows[j]);
    const __m512 factors = _mm512_mul_ps(rows[j], _mm512_set1_ps(1.0f / _mm512_cvtss_f32(pivot)));
    pivots = _mm512_mask_mov_ps(pivots, lane, pivot);
    rows[j] = _mm512_mask_mov_ps(rows[j], lane, one);
    KFAC_FAST_UNROLL
    for (int i = j + 1; i < kTileSide; ++i) {
      const __m512 factor = _mm512_maskz_permutexvar_ps(kAll, _mm512_set1_epi32(i), factors);
      rows[i] = _mm512_fnmadd_ps(factor, rows[j], _mm512_mask_mov_ps(rows[i], lane, _mm512_setzero_ps()));
    }
  }
  const __m512 scale = _mm512_div_ps(one, _mm512_maskz_sqrt_ps(kAll, pivots));
  KFAC_FAST_UNROLL
  for (int i = 0; i < kTileSide; ++i) {
    const auto lower = static_cast<__mmask16>((2 << i) - 1);
    rows[i] = _mm512_maskz_mul_ps(lower, rows[i], _mm512_maskz_permutexvar_ps(kAll, _mm512_set1_epi32(i), scale));
  }
  return pivots;
}

// rows -= sum over l in [begin, end) of factors[l, r] others[l, :].
inline __attribute__((always_inline)) void eliminate_rows(const float* factors, const float* others, int64_t ld,
                                                          int64_t begin, int64_t end, PivotRows& rows) {
  for (int64_t l = begin; l < end; ++l) {
    const __m512 other = _mm512_load_ps(others + l * ld);
    KFAC_FAST_UNROLL
    for (int r = 0; r < kTileSide; ++r) {
      rows[r] = _mm512_fnmadd_ps(_mm512_set1_ps(factors[l * ld + r]), other, rows[r]);
    }
  }
}

// rows <- L^-1 rows.
inline __attribute__((always_inline)) void multiply_rows(const float* inverse, int64_t ld, PivotRows& rows) {
  KFAC_FAST_UNROLL
  for (int r = kTileSide - 1; r >= 0; --r) {
    rows[r] = _mm512_mul_ps(_mm512_set1_ps(inverse[r * ld + r]), rows[r]);
    KFAC_FAST_UNROLL
    for (int l = 0; l < r; ++l) rows[r] = _mm512_fmadd_ps(_mm512_set1_ps(inverse[r * ld + l]), rows[l], rows[r]);
  }
}

inline __attribute__((always_inline)) void load_rows(const float* from, int64_t ld, PivotRows& rows) {
  KFAC_FAST_UNROLL
  for (int r = 0; r < kTileSide; ++r) rows[r] = _mm512_load_ps(from + r * ld);
}

inline __attribute__((always_inline)) void store_rows(const PivotRows& rows, float* to, int64_t ld) {
  KFAC_FAST_UNROLL
  for (int r = 0; r < kTileSide; ++r) _mm512_store_ps(to + r * ld, rows[r]);
}

// [P | 0] becomes [L^T | L^-1], P = L L^T: P by its upper triangle, of L^T only the tiles right of the diagonal, of
// L^-1 the lower triangle. Returns 0, or the 1-based index of the first pivot that is not positive.
inline int64_t invert_pivot_tiles(float* upper, float* inverse, int64_t depth) {  // [depth, depth]
  for (int64_t begin = 0; begin < depth; begin += kTileSide) {
    float* pivot_rows = upper + begin * depth;
    float* inverse_rows = inverse + begin * depth;
    PivotRows rows;
    load_rows(pivot_rows + begin, depth, rows);
    eliminate_rows(upper + begin, upper + begin, depth, 0, begin, rows);
    const __m512 pivots = invert_tile(rows);
    alignas(64) float pivot[kTileSide];
    _mm512_store_ps(pivot, pivots);
    for (int64_t j = 0; j < kTileSide; ++j) {
      if (!is_valid_pivot(pivot[j])) return begin + j + 1;
    }
    store_rows(rows, inverse_rows + begin, depth);
    for (int64_t c = begin + kTileSide; c < depth; c += kTileSide) {
      load_rows(pivot_rows + c, depth, rows);
      eliminate_rows(upper + begin, upper + c, depth, 0, begin, rows);
      multiply_rows(inverse_rows + begin, depth, rows);
      store_rows(rows, pivot_rows + c, depth);
    }
    for (int64_t c = 0; c < begin; c += kTileSide) {
      load_rows(inverse_rows + c, depth, rows);
      eliminate_rows(upper + begin, inverse + c, depth, c, begin, rows);
      multiply_rows(inverse_rows + begin, depth, rows);
      store_rows(rows, inverse_rows + c, depth);
    }
  }
  return 0;
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
