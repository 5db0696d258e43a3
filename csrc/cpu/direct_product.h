// Products of small matrices straight from where they lie, without packing: rows of the left operand are broadcast,
// rows of the right one are loaded as vectors at any alignment. Edges cost nothing but repeated work: the last vector
// of columns is moved to the left until it fits, the rows are shared out evenly over the tiles.
#pragma once

#include "ahead.h"
#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// body(Constant<value>{}), 1 <= value <= kMax.
template <int kMax, typename Body>
inline __attribute__((always_inline)) void with_constant(int value, Body&& body) {
  if constexpr (kMax > 1) {
    if (value < kMax) return with_constant<kMax - 1>(value, body);
  }
  body(Constant<kMax>{});
}

// `total` cut into as few parts of at most `limit` as possible, the parts as equal as possible.
struct EvenParts {
  int64_t count, size, larger;

  EvenParts(int64_t total, int64_t limit)
      : count(ceil_div(total, limit)), size(count > 0 ? total / count : 0), larger(total - size * count) {}
  int64_t begin(int64_t part) const { return part * size + min(part, larger); }
  int length(int64_t part) const { return static_cast<int>(size + (part < larger)); }
};

// The left operand, transposed: [depth, rows], row stride ld. With `extra`, one more row stands behind the others:
// its element k is extra[k * extra_step].
template <typename T>
struct Left {
  const T* data;
  int64_t ld, rows;
  const T* extra = nullptr;
  int64_t extra_step = 0;

  int64_t all_rows() const { return rows + (extra != nullptr); }
};

// acc[r, :] = sum_k a[k, r] b[k, :] for rows row .. row + R, the last of which is the extra row if kExtra. The last
// vector of columns begins `last` elements right of the first.
template <typename T, bool kExtra, int R, int NV>
inline __attribute__((always_inline)) void multiply_direct(int64_t depth, const Left<T>& left, int64_t row, const T* b,
                                                           int64_t ldb, int64_t last, Ahead::Lines ahead,
                                                           Vec<T> (&acc)[R][NV]) {
  constexpr int kInside = R - kExtra;
  KFAC_FAST_UNROLL
  for (int r = 0; r < R; ++r) {
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<T>{};
  }
  const T* a = left.data + row;
  const T* extra = left.extra;
  const T* b_last = b + last;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> line[NV];
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV - 1; ++v) line[v] = load(b + v * kLanes<T>);
    line[NV - 1] = load(b_last);
    KFAC_FAST_UNROLL
    for (int r = 0; r < kInside; ++r) {
      KFAC_FAST_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * line[v];
    }
    if constexpr (kExtra) {
      KFAC_FAST_UNROLL
      for (int v = 0; v < NV; ++v) acc[R - 1][v] += *extra * line[v];
      extra += left.extra_step;
    }
    __builtin_prefetch(ahead.begin, 0, 2);
    ahead.begin += ahead.step;
    a += left.ld;
    b += ldb;
    b_last += ldb;
  }
}

// Where vector v of a tile's NV vectors begins.
template <typename T, int NV>
inline int64_t vector_begin(int v, int64_t last) {
  return v == NV - 1 ? last : v * kLanes<T>;
}

// One register tile of a^T b: rows row .. row + R, columns column .. column + NV vectors, but not past `columns`.
// Calls finish(acc, row, column, last) with acc of type Vec<T>[R][NV].
template <typename T, int R, int NV, typename Finish>
inline void product_tile(int64_t depth, const Left<T>& a, int64_t row, const T* b, int64_t ldb, int64_t column,
                         int64_t columns, Ahead& ahead, Finish&& finish) {
  const int64_t last = min((NV - 1) * kLanes<T>, columns - kLanes<T> - column);
  Vec<T> acc[R][NV];
  if (row + R > a.rows) {
    multiply_direct<T, true>(depth, a, row, b + column, ldb, last, ahead.take(depth), acc);
  } else {
    multiply_direct<T, false>(depth, a, row, b + column, ldb, last, ahead.take(depth), acc);
  }
  finish(acc, row, column, last);
}

// Rows row .. row + R.
template <typename T, int R, typename Finish>
inline void product_rows(int64_t depth, const Left<T>& a, int64_t row, const T* b, int64_t ldb, int64_t columns,
                         Ahead& ahead, Finish&& finish) {
  const EvenParts tiles(ceil_div(columns, kLanes<T>), kTileVectors);
  for (int64_t x = 0; x < tiles.count; ++x) {
    with_constant<kTileVectors>(tiles.length(x), [&](auto vectors) {
      product_tile<T, R, decltype(vectors)::value>(depth, a, row, b, ldb, tiles.begin(x) * kLanes<T>, columns, ahead,
                                                   finish);
    });
  }
}

// All of it; a tile's columns of b stay in the first-level cache. columns >= kLanes.
template <typename T, typename Finish>
inline void product_direct(int64_t depth, const Left<T>& a, const T* b, int64_t ldb, int64_t columns, Ahead& ahead,
                           Finish&& finish) {
  const EvenParts row_tiles(a.all_rows(), kTileRows<T>);
  const EvenParts tiles(ceil_div(columns, kLanes<T>), kTileVectors);
  for (int64_t x = 0; x < tiles.count; ++x) {
    with_constant<kTileVectors>(tiles.length(x), [&](auto vectors) {
      for (int64_t y = 0; y < row_tiles.count; ++y) {
        with_constant<kTileRows<T>>(row_tiles.length(y), [&](auto rows) {
          product_tile<T, decltype(rows)::value, decltype(vectors)::value>(
              depth, a, row_tiles.begin(y), b, ldb, tiles.begin(x) * kLanes<T>, columns, ahead, finish);
        });
      }
    });
  }
}

// Writes a tile to out[row, column], row stride ld.
template <typename T, int R, int NV>
inline __attribute__((always_inline)) void store_direct(const Vec<T> (&acc)[R][NV], int64_t last, T* out, int64_t ld) {
  KFAC_FAST_UNROLL
  for (int r = 0; r < R; ++r) {
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) store(out + r * ld + vector_begin<T, NV>(v, last), acc[r][v]);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
