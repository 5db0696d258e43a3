// split_float.h compiled for the matrix instructions, with whole matrices as arguments.
#include "../../csrc/cpu/split_float.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

int64_t split_product_words(int64_t m, int64_t n, int64_t depth) {
  return (split_tiles(m) + split_tiles(n)) * split_steps(depth) * kSplitWords;
}

void split_product(int sign, int64_t m, int64_t n, int64_t depth, const float* a, int64_t lda, const float* b,
                   int64_t ldb, float* c, int64_t ldc, int32_t* words) {
  const int64_t steps = split_steps(depth), next = steps * kSplitWords;
  int32_t* right = words + split_tiles(m) * next;
  for (int64_t i = 0; i < m; i += kTileSide) {
    pack_left(a + i * lda, lda, min(kTileSide, m - i), depth, words + i / kTileSide * next);
  }
  for (int64_t j = 0; j < n; j += kTileSide) {
    pack_right(b + j, ldb, depth, min(kTileSide, n - j), right + j / kTileSide * next);
  }
  finish_stores();
  const TileRegisters registers;
  Ahead nothing;
  for (int64_t i = 0; i < m; i += kSplitSide) {
    for (int64_t j = 0; j < n; j += kSplitSide) {
      const int64_t rows = min(kSplitSide, m - i), columns = min(kSplitSide, n - j);
      const SplitOperand x = {words + i / kTileSide * next, next}, y = {right + j / kTileSide * next, next};
      float* out = c + i * ldc + j;
      if (sign == 0) update_split<Store::assign>(steps, rows, columns, x, y, out, ldc, nothing);
      if (sign > 0) update_split<Store::add>(steps, rows, columns, x, y, out, ldc, nothing);
      if (sign < 0) update_split<Store::subtract>(steps, rows, columns, x, y, out, ldc, nothing);
    }
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
