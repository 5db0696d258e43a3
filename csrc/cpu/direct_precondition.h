// G^-1 V A^-1 of one layer that fits the second-level cache, without packing: the products of direct_product.h.
#pragma once

#include "convert.h"
#include "direct_product.h"
#include "support.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Larger layers are packed: rows far apart share cache sets, and a tile's share of them no longer stays close.
constexpr int64_t kMaxDirectSize = 256;

template <typename T>
struct DirectScratch {
  T* product = nullptr;    // [n, m] V^T G^-1
  T* v = nullptr;          // [m, columns] V, where its memory cannot be read as vectors
  T* g_inverse = nullptr;  // [kLanes, kLanes], likewise
  T* a_inverse = nullptr;  // [n, kLanes], likewise
  T* bias = nullptr;       // [m] last column of V
  T* bias_out = nullptr;   // [m] last column of U

  static DirectScratch take(Arena& arena, int64_t m, int64_t n) {  // sizes up to these
    const int64_t width = round_up(m, kLanes<T>);
    DirectScratch scratch;
    scratch.product = arena.take<T>(n * width);
    scratch.v = arena.take<T>(m * round_up(n, kLanes<T>));
    scratch.g_inverse = arena.take<T>(kLanes<T> * kLanes<T>);
    scratch.a_inverse = arena.take<T>(n * kLanes<T>);
    scratch.bias = arena.take<T>(width);
    scratch.bias_out = arena.take<T>(width);
    return scratch;
  }
};

// Rows that can be loaded as vectors, and the number of columns to load.
template <typename T>
struct DirectRows {
  const T* data;
  int64_t ld, columns;
};

// `source` itself, or a copy whose rows are filled up with zeros to whole vectors.
template <typename T, typename Source>
inline DirectRows<T> copy_rows(const Source* source, int64_t row_stride, int64_t col_stride, int64_t rows,
                               int64_t columns, T* copy) {
  const int64_t ld = round_up(columns, kLanes<T>);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) copy[i * ld + j] = convert<T>(source[i * row_stride + j * col_stride]);
    for (int64_t j = columns; j < ld; ++j) copy[i * ld + j] = T(0);
  }
  return {copy, ld, ld};
}

template <typename T>
inline DirectRows<T> symmetric_rows(const T* inverse, int64_t n, int64_t columns, T* copy) {  // [n, n]
  if (columns >= kLanes<T>) return {inverse, n, columns};
  return copy_rows<T>(inverse, n, 1, n, columns, copy);
}

template <typename T>
inline bool is_direct(const Matrix& v, int64_t columns) {
  return v.dtype == (sizeof(T) == 4 ? DType::f32 : DType::f64) && v.col_stride == 1 && columns >= kLanes<T>;
}

template <typename T>
inline void store_column(const Matrix& u, int64_t m, const T* column) {
  with_element(u.dtype, [&](auto element) {
    auto* out = static_cast<decltype(element)*>(u.bias);
    for (int64_t i = 0; i < m; ++i) narrow(column[i], out + i * u.bias_stride);
  });
}

// Writes a tile of U whose first element is (row, column), where its memory cannot be written as vectors.
template <typename T>
__attribute__((noinline)) void store_tile(const Matrix& u, int64_t row, int64_t column, const T* tile, int64_t ld,
                                          int64_t rows, int64_t columns) {
  with_element(u.dtype, [&](auto element) {
    for (int64_t r = 0; r < rows; ++r) {
      auto* out = static_cast<decltype(element)*>(u.data) + (row + r) * u.row_stride + column * u.col_stride;
      for (int64_t j = 0; j < columns; ++j) narrow(tile[r * ld + j], out + j * u.col_stride);
    }
  });
}

// <V, U> on one tile, without the columns that its last vector shares with the one before.
template <typename T, int R, int NV>
inline Vec<T> tile_dot(const DirectRows<T>& v, const Vec<T> (&acc)[R][NV], int64_t row, int64_t column, int64_t last) {
  Vec<T> sums[NV] = {};
  KFAC_FAST_UNROLL
  for (int r = 0; r < R; ++r) {
    const T* line = v.data + (row + r) * v.ld + column;
    KFAC_FAST_UNROLL
    for (int x = 0; x < NV; ++x) sums[x] += acc[r][x] * load(line + vector_begin<T, NV>(x, last));
  }
  for (int64_t lane = 0; lane < (NV - 1) * kLanes<T> - last; ++lane) sums[NV - 1][lane] = T(0);
  KFAC_FAST_UNROLL
  for (int x = 1; x < NV; ++x) sums[0] += sums[x];
  return sums[0];
}

// U <- G^-1 V A^-1. Returns <V, U>.
template <typename T>
inline T precondition_direct(const T* g_inverse, const T* a_inverse, const Matrix& gradient, const Matrix& result,
                             int64_t m, int64_t n, const DirectScratch<T>& s, Ahead& ahead) {
  const bool bias = gradient.bias != nullptr;
  const int64_t columns = n - bias;
  DirectRows<T> v = {static_cast<const T*>(gradient.data), gradient.row_stride, columns};
  with_element(gradient.dtype, [&](auto element) {
    using Source = decltype(element);
    if (!is_direct<T>(gradient, columns)) {
      v = copy_rows<T>(static_cast<const Source*>(gradient.data), gradient.row_stride, gradient.col_stride, m, columns,
                       s.v);
    }
    if (!bias) return;
    const Source* source = static_cast<const Source*>(gradient.bias);
    for (int64_t i = 0; i < m; ++i) s.bias[i] = convert<T>(source[i * gradient.bias_stride]);
  });

  const DirectRows<T> g = symmetric_rows(g_inverse, m, m, s.g_inverse);
  const int64_t width = round_up(m, kLanes<T>);
  const auto keep = [width](T* product) {
    return [product, width](const auto& acc, int64_t row, int64_t column, int64_t last) {
      store_direct<T>(acc, last, product + row * width + column, width);
    };
  };
  const Left<T> rows = {v.data, v.ld, columns, bias ? s.bias : nullptr, 1};
  product_direct(m, rows, g.data, g.ld, g.columns, ahead, keep(s.product));

  T dot = T(0);
  if (bias) {  // the last row of A^-1 stands for its last column
    const Left<T> column = {a_inverse + (n - 1) * n, 1, 1};
    product_rows<T, 1>(n, column, 0, s.product, width, g.columns, ahead, keep(s.bias_out));
    for (int64_t i = 0; i < m; ++i) dot += s.bias[i] * s.bias_out[i];
    store_column(result, m, s.bias_out);
  }
  if (columns == 0) return dot;
  const DirectRows<T> a = symmetric_rows(a_inverse, n, columns, s.a_inverse);
  const bool direct = is_direct<T>(result, columns);
  Vec<T> sum = {};
  product_direct(n, Left<T>{s.product, width, m}, a.data, a.ld, a.columns, ahead,
                 [&](const auto& acc, int64_t row, int64_t column, int64_t last) {
                   sum += tile_dot<T>(v, acc, row, column, last);
                   if (direct) {
                     T* out = static_cast<T*>(result.data) + row * result.row_stride + column;
                     return store_direct<T>(acc, last, out, result.row_stride);
                   }
                   constexpr int64_t kRows = sizeof(acc) / sizeof(acc[0]);
                   constexpr int64_t kWidth = sizeof(acc[0]) / sizeof(acc[0][0]) * kLanes<T>;
                   T tile[kRows * kWidth];
                   store_direct<T>(acc, last, tile, kWidth);
                   store_tile(result, row, column, tile, kWidth, kRows, min(last + kLanes<T>, columns - column));
                 });
  for (int lane = 0; lane < kLanes<T>; ++lane) dot += sum[lane];
  return dot;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
