// The register tile: the one loop in which nearly all arithmetic of the package happens on the CPU.
#pragma once

#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// acc[r, :] += sum_k a[k, r] b[k, :], with kTileRows rows r and NV vectors of columns. Per k: NV loads, kTileRows
// broadcasts and kTileRows * NV multiply-adds, which bind as long as both panels come from the first-level cache.
template <typename T, int NV>
inline __attribute__((always_inline)) void multiply_add(int64_t depth,
                                                        const T* a,  // [depth, kPanel], the tile's first row
                                                        const T* b,  // [depth, kPanel]
                                                        Vec<T> (&acc)[kTileRows<T>][NV]) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> row[NV];
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) row[v] = load(b + v * kLanes<T>);
    KFAC_FAST_UNROLL
    for (int r = 0; r < kTileRows<T>; ++r) {
      KFAC_FAST_UNROLL
      for (int v = 0; v < NV; ++v) acc[r][v] += a[r] * row[v];
    }
    a += kPanel<T>;
    b += kPanel<T>;
  }
}

// What to do with a finished tile.
enum class Store { assign, add, subtract };

// c (=, +=, -=) a^T b on one register tile.
template <typename T, Store kStore, int NV>
inline void update_tile(int64_t depth, const T* a, const T* b,
                        T* c,  // [kTileRows, NV * kLanes], row stride ld
                        int64_t ld) {
  Vec<T> acc[kTileRows<T>][NV] = {};
  multiply_add<T, NV>(depth, a, b, acc);
  KFAC_FAST_UNROLL
  for (int r = 0; r < kTileRows<T>; ++r) {
    KFAC_FAST_UNROLL
    for (int v = 0; v < NV; ++v) {
      T* out = c + r * ld + v * kLanes<T>;
      if (kStore == Store::assign) store(out, acc[r][v]);
      if (kStore == Store::add) store(out, load(out) + acc[r][v]);
      if (kStore == Store::subtract) store(out, load(out) - acc[r][v]);
    }
  }
}

template <typename T, Store kStore>
inline void update_tile(int vectors, int64_t depth, const T* a, const T* b, T* c, int64_t ld) {
  static_assert(kTileVectors == 3, "one case per number of vectors");
  switch (vectors) {
    case 1:
      return update_tile<T, kStore, 1>(depth, a, b, c, ld);
    case 2:
      return update_tile<T, kStore, 2>(depth, a, b, c, ld);
    default:
      return update_tile<T, kStore, 3>(depth, a, b, c, ld);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
