// C (=, +=, -=) P^T P on the lower triangle, P packed in panels: the heart of X^T X and of the inverse.
#pragma once

#include "ahead.h"
#include "microkernel.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Geometry of a working copy of a symmetric [n, n] matrix: whole vectors in a row and whole tiles of rows, so that the
// kernels need no edge cases. The padding is written but never read as a result.
template <typename T>
struct Padded {
  int64_t n;
  // Not a multiple of a quarter page: a tile's rows would share a few sets of the first-level cache.
  int64_t ld() const {
    const int64_t whole = round_up(n, kLanes<T>);
    return whole * static_cast<int64_t>(sizeof(T)) % 1024 == 0 ? whole + kLanes<T> : whole;
  }
  int64_t rows() const { return round_up(n, kTileRows<T>); }
  int64_t numel() const { return rows() * ld(); }
  int64_t panels() const { return ceil_div(n, kPanel<T>); }
};

// Enough to have a block of any size read by the time the one before is inverted.
constexpr int64_t kLinesPerTile = 10;

// From this depth on a tile takes long enough for its part of C to arrive while it is computed.
constexpr int64_t kPrefetchedDepth = 64;

// The unit of parallel work: the tiles of up to kStripPanels row panels in one column panel.
constexpr int64_t kStripPanels = 8;

template <typename T>
inline int64_t symmetric_strips(int64_t n) {
  int64_t strips = 0;
  const int64_t panels = Padded<T>{n}.panels();
  for (int64_t column = 0; column < panels; ++column) strips += ceil_div(panels - column, kStripPanels);
  return strips;
}

template <typename T, Store kStore>
inline void symmetric_update_panel(int64_t column,              // of panels
                                   int64_t begin, int64_t end,  // row panels, column <= begin
                                   int64_t depth, const T* p,   // [panels, depth, kPanel]
                                   T* c,                        // [rows, ld]
                                   Padded<T> shape, Ahead& ahead) {
  const int64_t j = column * kPanel<T>;
  const T* b = p + column * depth * kPanel<T>;
  const int64_t last = min(end * kPanel<T>, shape.n);
  for (int64_t i = begin * kPanel<T>; i < last; i += kTileRows<T>) {
    const T* a = p + i / kPanel<T> * depth * kPanel<T> + i % kPanel<T>;
    // Vectors wholly above the diagonal, or past the last column, are left out.
    const int64_t columns = min(min(kPanel<T>, i + kTileRows<T> - j), shape.n - j);
    const int vectors = static_cast<int>(ceil_div(columns, kLanes<T>));
    ahead.ask(kLinesPerTile);
    T* tile = c + i * shape.ld() + j;
    if (depth >= kPrefetchedDepth) {
      for (int64_t r = 0; r < kTileRows<T>; ++r) {
        for (int v = 0; v < vectors; ++v) __builtin_prefetch(tile + r * shape.ld() + v * kLanes<T>, 1);
      }
    }
    update_tile<T, kStore>(vectors, depth, a, b, tile, shape.ld());
  }
}

template <typename T, Store kStore>
inline void symmetric_update_strip(int64_t strip, int64_t depth, const T* p, T* c, Padded<T> shape) {
  Ahead nothing;
  for (int64_t column = 0;; ++column) {
    const int64_t strips = ceil_div(shape.panels() - column, kStripPanels);
    if (strip < strips) {
      const int64_t begin = column + strip * kStripPanels;
      return symmetric_update_panel<T, kStore>(column, begin, min(begin + kStripPanels, shape.panels()), depth, p, c,
                                               shape, nothing);
    }
    strip -= strips;
  }
}

template <typename T, Store kStore>
inline void symmetric_update(int64_t depth, const T* p, T* c, Padded<T> shape, Ahead& ahead) {
  for (int64_t column = 0; column < shape.panels(); ++column) {
    symmetric_update_panel<T, kStore>(column, column, shape.panels(), depth, p, c, shape, ahead);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
