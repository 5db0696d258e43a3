// The inverse of one matrix by a blocked symmetric sweep with Cholesky-factored pivot blocks.
//
// One step turns pivot block K of A into the negative of its inverse and updates everything else, swept or not:
//   L = chol(A_KK),  W_i = A_iK L^-T,  A_ij <- A_ij - W_i W_j^T,  A_iK <- W_i L^-1,  A_KK <- -L^-T L^-1.
// With row and column K zeroed first and W_K := -L^-T, the last two are the second formula again: the whole step is one
// symmetric update of rank |K|. After all steps A holds -A^-1. Explicit inverses of pivot *blocks* would be faster to
// write down and lose half the digits; L^-T does not.
#pragma once

#include "pivot.h"
#include "support.h"
#include "symmetric_update.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Pivots per step. Small steps keep the serial pivot block cheap, large ones pass over A less often.
inline int64_t sweep_depth(int64_t n) { return n <= 160 ? 16 : n <= 512 ? 32 : 64; }

constexpr int64_t kMaxSweepDepth = 64;

// Everything one sweep needs.
template <typename T>
struct SweepScratch {
  T* matrix;   // padded [n, n], lower triangle
  T* column;   // [panels, depth, kPanel] A_:K transposed
  T* w;        // [panels, depth, kPanel] W transposed
  T* pivot;    // [depth, depth] A_KK, then L^T
  T* inverse;  // [depth, depth] L^-1
  T* factor;   // [depth panels, depth, kPanel] L^-T, packed

  static SweepScratch take(Arena& arena, int64_t n) {
    const int64_t panel = round_up(kMaxSweepDepth, kPanel<T>) * kPanel<T>;
    SweepScratch scratch;
    scratch.matrix = arena.take<T>(Padded<T>{n}.numel());
    scratch.column = arena.take<T>(Padded<T>{n}.panels() * panel);
    scratch.w = arena.take<T>(Padded<T>{n}.panels() * panel);
    scratch.pivot = arena.take<T>(kMaxSweepDepth * kMaxSweepDepth);
    scratch.inverse = arena.take<T>(kMaxSweepDepth * kMaxSweepDepth);
    scratch.factor = arena.take<T>(ceil_div(kMaxSweepDepth, kPanel<T>) * panel);
    return scratch;
  }
};

// Rows [begin, end) of the working copy: lower triangle plus damping, zeros where tiles overhang the diagonal.
template <typename T>
inline void load_damped(const T* block, T damping, int64_t begin, int64_t end, T* a, Padded<T> shape) {
  const int64_t n = shape.n;
  for (int64_t i = begin; i < end; ++i) {
    T* row = a + i * shape.ld();
    const int64_t length = i < n ? i + 1 : 0;
    for (int64_t j = 0; j < length; ++j) row[j] = block[i * n + j];
    const int64_t overhang = min(shape.ld(), i + kPanel<T>);
    for (int64_t j = length; j < overhang; ++j) row[j] = T(0);
    if (i < n) row[i] += damping;
  }
}

// Factors the pivot block and packs L^-T. Returns 0 or the 1-based index of the failing pivot within the matrix.
template <typename T>
inline int64_t factor_pivot(const SweepScratch<T>& s, Padded<T> shape, int64_t k0, int64_t depth) {
  const int64_t ld = round_up(depth, kLanes<T>);
  transpose_matrix(s.matrix + k0 * shape.ld() + k0, shape.ld(), depth, depth, s.pivot, ld);
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = 0; j < ld; ++j) s.inverse[i * ld + j] = T(i == j);
    for (int64_t j = depth; j < ld; ++j) s.pivot[i * ld + j] = T(0);
  }
  const int64_t failed = invert_cholesky_factor(s.pivot, s.inverse, depth, ld);
  if (failed != 0) return k0 + failed;
  for (int64_t kk = 0; kk < depth; kk += kPanel<T>) {
    transpose_matrix(s.inverse + kk * ld, ld, min(kPanel<T>, depth - kk), depth, s.factor + kk * depth, kPanel<T>);
  }
  return 0;
}

// A_:K transposed for columns [begin, end) of one panel, from either side of the diagonal; A_:K is zeroed there.
template <typename T>
inline void take_column(T* a, int64_t ld, int64_t k0, int64_t depth, int64_t begin, int64_t end,
                        T* column) {  // [depth, kPanel]
  if (begin + kPanel<T> <= k0) {      // all above: rows as they are
    for (int64_t l = 0; l < depth; ++l) {
      T* source = a + (k0 + l) * ld + begin;
      KFAC_FAST_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        store(column + l * kPanel<T> + v * kLanes<T>, load(source + v * kLanes<T>));
        store(source + v * kLanes<T>, Vec<T>{});
      }
    }
    return;
  }
  const int64_t k1 = k0 + depth;
  const int64_t below = max(begin, min(end, k1));
  if (begin < k1 || end - begin < kPanel<T>) {
    const int64_t above = max(begin, min(end, k0));
    for (int64_t l = 0; l < depth; ++l) {
      T* row = column + l * kPanel<T>;
      T* source = a + (k0 + l) * ld;
      for (int64_t i = 0; i < kPanel<T>; ++i) row[i] = T(0);
      for (int64_t i = begin; i < above; ++i) row[i - begin] = source[i];
      for (int64_t i = begin; i < min(below, k0 + l + 1); ++i) source[i] = T(0);
    }
  }
  transpose_matrix(a + below * ld + k0, ld, end - below, depth, column + below - begin, kPanel<T>);
  for (int64_t i = below; i < end; ++i) {
    T* row = a + i * ld + k0;
    int64_t l = 0;
    for (; l + kLanes<T> <= depth; l += kLanes<T>) store(row + l, Vec<T>{});
    for (; l < depth; ++l) row[l] = T(0);
  }
}

// Panel `index` of the step: W^T = L^-1 A_K: for these columns, and A_:K zeroed there.
template <typename T>
inline void sweep_panel(const SweepScratch<T>& s, Padded<T> shape, int64_t k0, int64_t depth, int64_t index) {
  const int64_t begin = index * kPanel<T>;
  const int64_t end = min(begin + kPanel<T>, shape.n);
  T* column = s.column + index * depth * kPanel<T>;
  T* w = s.w + index * depth * kPanel<T>;
  take_column(s.matrix, shape.ld(), k0, depth, begin, end, column);

  for (int64_t kk = 0; kk < depth; kk += kTileRows<T>) {
    const T* factor = s.factor + kk / kPanel<T> * depth * kPanel<T> + kk % kPanel<T>;
    // Row kk of L^-1 ends at column kk; rows past `depth` would land in the next panel and are stored apart.
    const int64_t product_depth = min(kk + kTileRows<T>, depth);
    if (kk + kTileRows<T> <= depth) {
      update_tile<T, Store::assign, kTileVectors>(product_depth, factor, column, w + kk * kPanel<T>, kPanel<T>);
    } else {
      T tile[kTileRows<T> * kPanel<T>];
      update_tile<T, Store::assign, kTileVectors>(product_depth, factor, column, tile, kPanel<T>);
      for (int64_t x = 0; x < (depth - kk) * kPanel<T>; ++x) w[kk * kPanel<T> + x] = tile[x];
    }
  }
  if (end <= k0 || begin >= k0 + depth) return;
  const int64_t pivot_ld = round_up(depth, kLanes<T>);
  for (int64_t kk = 0; kk < depth; ++kk) {
    for (int64_t i = max(begin, k0); i < min(end, k0 + depth); ++i) {
      w[kk * kPanel<T> + i - begin] = -s.inverse[kk * pivot_ld + i - k0];
    }
  }
}

// Rows [begin, end) of the result, both triangles: the negative of the swept matrix.
template <typename T>
inline void store_inverse(const T* a, Padded<T> shape, int64_t begin, int64_t end, T* inverse) {  // [n, n]
  const int64_t n = shape.n;
  for (int64_t i = begin; i < end; ++i) {
    for (int64_t j = 0; j <= i; ++j) inverse[i * n + j] = -a[i * shape.ld() + j];
  }
  mirror_rows(inverse, n, begin, end);
}

// inverse <- (block + damping I)^-1 on up to `threads` threads. Returns 0 or the index of the failing pivot, in which
// case `inverse` is untouched.
template <typename T>
inline int64_t invert_by_sweep(const T* block, T damping, int64_t n, T* inverse, const SweepScratch<T>& s, int threads,
                               Ahead& ahead) {
  constexpr int64_t kRows = 32;
  const Padded<T> shape{n};
  parallel_for(threads, ceil_div(shape.rows(), kRows), [&](int64_t strip, int) {
    load_damped(block, damping, strip * kRows, min((strip + 1) * kRows, shape.rows()), s.matrix, shape);
  });
  for (int64_t k0 = 0; k0 < n; k0 += sweep_depth(n)) {
    const int64_t depth = min(sweep_depth(n), n - k0);
    const int64_t failed = factor_pivot(s, shape, k0, depth);
    if (failed != 0) return failed;
    parallel_for(threads, shape.panels(), [&](int64_t index, int) { sweep_panel(s, shape, k0, depth, index); });
    if (threads == 1) {
      symmetric_update<T, Store::subtract>(depth, s.w, s.matrix, shape, ahead);
    } else {
      parallel_for(threads, symmetric_strips<T>(n), [&](int64_t strip, int) {
        symmetric_update_strip<T, Store::subtract>(strip, depth, s.w, s.matrix, shape);
      });
    }
  }
  parallel_for(threads, ceil_div(n, kRows), [&](int64_t strip, int) {
    store_inverse(s.matrix, shape, strip * kRows, min((strip + 1) * kRows, n), inverse);
  });
  return 0;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
