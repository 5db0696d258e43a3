// C <- decay C + scale X^T X of one small block in a single pass, without packing: the products of direct_product.h go
// from registers into C.
#pragma once

#include "direct_product.h"
#include "support.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Larger X are packed a piece at a time: the tiles pass over all of X again and again, so it must stay close.
constexpr int64_t kMaxDirectRows = 512;
constexpr int64_t kMaxDirectColumns = 256;

template <typename T>
inline bool direct_update_applies(const Rows& rows) {
  return rows.conv == nullptr && rows.weights == nullptr && rows.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64) &&
         rows.col_stride == 1 && rows.d >= kLanes<T> && rows.d <= kMaxDirectColumns && rows.m <= kMaxDirectRows;
}

// Adds a tile of X^T X to C. The last vector may share columns with the one before: all of a row is read, then written.
// `poison` stays zero as long as the tile is finite.
template <typename T, int R, int NV>
inline __attribute__((always_inline)) void fold_tile(const Vec<T> (&acc)[R][NV], int64_t last, T decay, T scale, T* c,
                                                     int64_t n, Vec<T>& poison) {
  KFAC_FAST_UNROLL
  for (int r = 0; r < R; ++r) {
    T* row = c + r * n;
    Vec<T> sum[NV];
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) {
      poison += acc[r][v] - acc[r][v];
      sum[v] = scale * acc[r][v];
      if (decay != T(0)) sum[v] += decay * load(row + vector_begin<T, NV>(v, last));
    }
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) store(row + vector_begin<T, NV>(v, last), sum[v]);
  }
}

// Returns whether X^T X is finite.
template <typename T>
inline bool update_direct(const Rows& rows, T decay, T scale, T* c, int64_t n, Ahead& ahead) {  // C: [n, n]
  const T* x = static_cast<const T*>(rows.data);
  const int64_t d = rows.d;
  const T one = T(1);
  const Left<T> left = {x, rows.row_stride, d, rows.bias ? &one : nullptr};
  Vec<T> poison = {};
  const auto finish = [&](const auto& acc, int64_t row, int64_t column, int64_t last) {
    fold_tile<T>(acc, last, decay, scale, c + row * n + column, n, poison);
  };
  product_rows<T, kLanes<T>>(rows.m, left, 0, x, rows.row_stride, kLanes<T>, ahead, finish);
  const EvenParts tiles(left.all_rows() - kLanes<T>, kTileRows<T>);
  for (int64_t y = 0; y < tiles.count; ++y) {
    const int64_t row = kLanes<T> + tiles.begin(y);
    with_constant<kTileRows<T>>(tiles.length(y), [&](auto length) {
      constexpr int kRows = decltype(length)::value;
      // Whole vectors, past the diagonal too: what is there holds the entries of the other triangle.
      product_rows<T, kRows>(rows.m, left, row, x, rows.row_stride, min(round_up(row + kRows, kLanes<T>), d), ahead,
                             finish);
    });
  }
  if (rows.bias) {
    T& corner = c[d * n + d];
    corner = scale * static_cast<T>(rows.m) + (decay == T(0) ? T(0) : decay * corner);
  }
  mirror_rows(c, n, 0, n);
  bool finite = true;
  for (int lane = 0; lane < kLanes<T>; ++lane) finite &= poison[lane] == T(0);
  return finite;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
