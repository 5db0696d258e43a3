// Packing: rows of any element type and layout -> panels [panels, depth, kPanel] in the accumulate type, weighted,
// with the bias column, zero-filled to the end of its vector or tile. All conversions of a factor update happen here,
// once per element.
#pragma once

#include "conv_rows.h"
#include "convert.h"
#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Rows may lie pages apart, where the processor's own prefetchers do not follow.
constexpr int64_t kRowsAhead = 8;

// One panel of a strided matrix: columns [column, column + kPanel) of rows [0, depth) of `x`.
template <typename T, typename Source>
inline void pack_strided(const Source* x, int64_t row_stride, int64_t col_stride, int64_t depth, int64_t columns,
                         T* panel) {  // [depth, kPanel]
  if (col_stride == 1 && columns == kPanel<T>) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Source));
    for (int64_t k = 0; k < depth; ++k) {
      const Source* row = x + k * row_stride;
      for (int64_t c = 0; c < kPanel<T>; c += kLine) __builtin_prefetch(row + kRowsAhead * row_stride + c);
      for (int64_t c = 0; c < kPanel<T>; ++c) panel[k * kPanel<T> + c] = convert<T>(row[c]);
    }
    return;
  }
  const int64_t whole = col_stride == 1 ? columns / kLanes<T> * kLanes<T> : 0;
  for (int64_t k = 0; k < depth; ++k) {
    const Source* row = x + k * row_stride;
    T* out = panel + k * kPanel<T>;
    KFAC_FAST_UNROLL
    for (int v = 0; v < kTileVectors; ++v) store(out + v * kLanes<T>, Vec<T>{});
    for (int64_t c = 0; c < whole; c += kLanes<T>) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) out[c + lane] = convert<T>(row[c + lane]);
    }
    for (int64_t c = whole; c < columns; ++c) out[c] = convert<T>(row[c * col_stride]);
  }
}

// Square roots of the weights of rows [first, first + depth), or null when there are none.
template <typename T>
inline const T* root_weights(const Rows& rows, int64_t first, int64_t depth, T* out) {  // [depth]
  if (rows.weights == nullptr) return nullptr;
  const T* weights = static_cast<const T*>(rows.weights) + first;
  for (int64_t k = 0; k < depth; ++k) out[k] = square_root(weights[k]);
  return out;
}

// Rows [first, first + depth) of one block of a factor update.
template <typename T>
inline void pack_rows(const Rows& rows, int64_t first, int64_t depth, int64_t index,
                      const T* root_weights,  // [depth], or null
                      T* panel) {             // [depth, kPanel], panel number `index`
  const int64_t begin = index * kPanel<T>;
  const int64_t columns = max(0, min(kPanel<T>, rows.d - begin));
  with_element(rows.dtype, [&](auto element) {
    using Source = decltype(element);
    const Source* x = static_cast<const Source*>(rows.data);
    if (rows.conv != nullptr) {
      pack_patches<T>(*rows.conv, x, first, depth, begin, columns, panel);
    } else {
      pack_strided<T>(x + first * rows.row_stride + begin * rows.col_stride, rows.row_stride, rows.col_stride, depth,
                      columns, panel);
    }
  });
  const int64_t bias = rows.d - begin;
  if (rows.bias && bias >= 0 && bias < kPanel<T>) {
    for (int64_t k = 0; k < depth; ++k) panel[k * kPanel<T> + bias] = T(1);
  }
  if (root_weights != nullptr) {
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t c = 0; c < kPanel<T>; ++c) panel[k * kPanel<T> + c] *= root_weights[k];
    }
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
