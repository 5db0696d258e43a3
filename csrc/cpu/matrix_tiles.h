// X^T X with the processor's matrix instructions (AMX): X as one, two or three bfloat16 numbers an element
// (split_float.h), sums in float32. Every thread packs all of X for itself and sums its own rows of X^T X: nobody waits
// for anybody, and sums stay in the cache of their thread.
#pragma once

#include "../ops.h"
#include "pack.h"
#include "split_float.h"
#include "support.h"
#include "symmetric_update.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// The bfloat16 numbers that an element of X, weighted, is the sum of.
inline int split_parts(const Rows& rows) {
  if (rows.weights != nullptr) return 3;
  return rows.dtype == DType::bf16 ? 1 : rows.dtype == DType::f16 ? 2 : 3;
}

// Rows of three parts are worth their packing from here on; below, the general path is faster.
constexpr int64_t kMinSplitColumns = 96;

template <typename T>
inline bool matrix_tiles_apply(const Rows& rows) {
  return kHasMatrixTiles<T> && (split_parts(rows) < 3 || (rows.d >= kMinSplitColumns && rows.m >= kTileDepth));
}

inline int64_t column_tiles(int64_t n) { return ceil_div(n, kTileSide); }

// Steps of kTileDepth rows packed at a time: two column tiles in both forms fit the first-level cache, all of them the
// second-level cache beside the sums. With several parts half of that counts for nothing against longer products
// between the additions to the sum.
constexpr int64_t kFirstLevelSteps = 16;
constexpr int64_t kPackedTiles = 768;
inline int64_t tile_steps(int64_t n, int parts) {
  const int64_t steps = parts == 1 ? kFirstLevelSteps / 2 : kFirstLevelSteps;
  return max(1, min(steps, kPackedTiles / max(1, column_tiles(n))) / parts);
}

// A chunk of X in the form of a right operand, all of it, and of a left one, a pair of column tiles.
struct TileScratch {
  int32_t* right = nullptr;  // [column tiles, steps, parts, kTileWords]
  int32_t* left = nullptr;   // [2, steps, parts, kTileWords]

  static int64_t words(int64_t n, int parts) { return column_tiles(n) * tile_steps(n, parts) * parts * kTileWords; }

  static TileScratch take(Arena& arena, int64_t words) {
    TileScratch scratch;
    scratch.right = arena.take<int32_t>(words);
    scratch.left = arena.take<int32_t>(words > 0 ? 2 * kFirstLevelSteps * kTileWords : 0);
    return scratch;
  }
};

// The floats of X^T X in row-major order, whole tiles of them.
inline int64_t tile_sum_numel(int64_t n) { return column_tiles(n) * kTileSide * Padded<float>{n}.ld(); }

#if defined(__AMX_BF16__)

// For the intrinsics whose forms without a mask GCC 12 takes for uses of uninitialised variables.
constexpr __mmask8 kWhole8 = 0xff;
constexpr __mmask16 kWhole16 = 0xffff;

// One step of two column tiles, `next` words apart, from bfloat16 rows. Elements k and k + 16 of a column make a word,
// as in split_float.h. kWhole: 32 columns; else those of `inside` and a one at `ones`.
template <bool kWhole, bool kAhead>
inline void pack_bfloat16(const uint16_t* x, int64_t row_stride, __mmask32 inside, __mmask32 ones, int32_t* words,
                          int64_t next, bool both) {
  alignas(64) static constexpr uint16_t kFirst[kTileDepth] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                              37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                              11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst), one = _mm512_set1_epi16(0x3f80);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(kTileSide));
  const auto line = [=](const uint16_t* row) {
    if (kWhole) return _mm512_loadu_si512(row);
    return _mm512_mask_mov_epi16(_mm512_maskz_loadu_epi16(inside, row), ones, one);
  };
  const int64_t half = kTileSide * row_stride;
  for (int64_t pair = 0; pair < kTileSide; ++pair) {
    if (kAhead) {
      __builtin_prefetch(x + 2 * half);
      __builtin_prefetch(x + 3 * half);
    }
    const __m512i low = line(x), high = line(x + half);
    _mm512_store_si512(words, _mm512_permutex2var_epi16(low, first, high));
    if (both) _mm512_store_si512(words + next, _mm512_permutex2var_epi16(low, second, high));
    x += row_stride, words += kTileSide;
  }
}

// One step of all column tiles.
inline void pack_bfloat16(const Rows& rows, int64_t begin, int64_t depth, int32_t* words, int64_t next) {
  const int64_t n = rows.d + rows.bias;
  for (int64_t column = 0; column < n; column += 2 * kTileSide) {
    const uint16_t* x = static_cast<const uint16_t*>(rows.data) + begin * rows.row_stride + column;
    int32_t* const to = words + column / kTileSide * next;
    const int64_t count = rows.d - column;
    const bool both = column + kTileSide < n;
    const auto inside = static_cast<__mmask32>(count >= 32 ? 0xffffffff : (1u << count) - 1);
    const auto ones = static_cast<__mmask32>(rows.bias && count < 32 ? 1u << count : 0);
    if (depth < kTileDepth) {
      alignas(64) uint16_t copy[kTileDepth * kTileDepth];
      for (int64_t k = 0; k < kTileDepth; ++k) {
        const __m512i row =
            k < depth ? _mm512_maskz_loadu_epi16(inside, x + k * rows.row_stride) : _mm512_setzero_si512();
        const auto one = static_cast<__mmask32>(k < depth ? ones : 0);
        _mm512_store_si512(copy + k * kTileDepth, _mm512_mask_mov_epi16(row, one, _mm512_set1_epi16(0x3f80)));
      }
      pack_bfloat16<true, false>(copy, kTileDepth, inside, ones, to, next, both);
    } else if (count >= 32) {
      pack_bfloat16<true, true>(x, rows.row_stride, inside, ones, to, next, both);
    } else {
      pack_bfloat16<false, true>(x, rows.row_stride, inside, ones, to, next, both);
    }
  }
}

// The same of any rows through a panel of float32.
template <int kParts>
inline void pack_split(const Rows& rows, int64_t first, int64_t depth, const float* root_weights, int64_t panel,
                       int32_t* words, int64_t next) {
  alignas(64) float x[kTileDepth * kPanel<float>];
  pack_rows(rows, first, depth, panel, root_weights, x);
  const int64_t begin = panel * kPanel<float>;
  const int64_t n = rows.d + rows.bias;
  for (int64_t c = 0; c < kPanel<float> && begin + c < n; c += kTileSide) {
    pack_right<kParts>(x + c, kPanel<float>, depth, kTileSide, words + (begin + c) / kTileSide * next);
  }
}

// Rows [first, first + depth) of X as one step of every column tile.
template <int kParts>
inline void pack_step(const Rows& rows, int64_t first, int64_t depth, int32_t* words, int64_t next) {
  const int64_t n = rows.d + rows.bias;
  if (kParts == 1 && rows.conv == nullptr && rows.col_stride == 1) {
    pack_bfloat16(rows, first, depth, words, next);
    return;
  }
  int64_t packed = 0;  // columns
  float weights[kTileDepth];
  if (kParts == 3 && rows.conv == nullptr && rows.col_stride == 1 && rows.weights == nullptr &&
      rows.dtype == DType::f32) {
    const float* x = static_cast<const float*>(rows.data) + first * rows.row_stride;
    for (; packed + kPanel<float> <= rows.d; packed += kPanel<float>) {
      for (int64_t c = packed; c < packed + kPanel<float>; c += kTileSide) {
        pack_right<kParts>(x + c, rows.row_stride, depth, kTileSide, words + c / kTileSide * next);
      }
    }
  }
  for (; packed < n; packed += kPanel<float>) {
    pack_split<kParts>(rows, first, depth, root_weights(rows, first, depth, weights), packed / kPanel<float>, words,
                       next);
  }
}

// The words of a tile transposed. The vectors are put together of quarters in memory, for which the processor has more
// room than for shuffles.
inline void transpose_words(const int32_t* in, int32_t* out) {
  KFAC_FAST_UNROLL
  for (int quarter = 0; quarter < 4; ++quarter) {
    __m512i row[4];
    KFAC_FAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const auto at = [&](int64_t r) {
        return _mm_load_si128(reinterpret_cast<const __m128i*>(in + r * kTileSide + 4 * quarter));
      };
      row[i] = _mm512_castsi128_si512(at(i));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0x00f0, at(4 + i));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0x0f00, at(8 + i));
      row[i] = _mm512_mask_broadcast_i32x4(row[i], 0xf000, at(12 + i));
    }
    const __m512i a = _mm512_maskz_unpacklo_epi32(kWhole16, row[0], row[1]),
                  b = _mm512_maskz_unpackhi_epi32(kWhole16, row[0], row[1]);
    const __m512i c = _mm512_maskz_unpacklo_epi32(kWhole16, row[2], row[3]),
                  d = _mm512_maskz_unpackhi_epi32(kWhole16, row[2], row[3]);
    int32_t* to = out + 4 * quarter * kTileSide;
    _mm512_store_si512(to, _mm512_maskz_unpacklo_epi64(kWhole8, a, c));
    _mm512_store_si512(to + kTileSide, _mm512_maskz_unpackhi_epi64(kWhole8, a, c));
    _mm512_store_si512(to + 2 * kTileSide, _mm512_maskz_unpacklo_epi64(kWhole8, b, d));
    _mm512_store_si512(to + 3 * kTileSide, _mm512_maskz_unpackhi_epi64(kWhole8, b, d));
  }
}

// Products of blocks of up to 2 x 2 tiles on their way into the sum: a block's are added while the next is multiplied.
// Those of one part, which take a sixth of the time, are too quick for that and start from the sum.
class TileSums {
 public:
  TileSums(float* sum, int64_t ld) : sum_(sum), ld_(ld) {}

  // sum (=, +=) left right at tile row `row` and tile column `column`.
  template <int kParts, int R, int C>
  void multiply(int64_t steps, SplitOperand left, SplitOperand right, int64_t row, int64_t column, bool assign) {
    float* to = sum_ + row * kTileSide * ld_ + column * kTileSide;
    const int64_t rows = ceil_div(kSplitSide, max(1, steps));  // no steps: no rows at all
    const auto ask = [&](float* block, int64_t step) {
      for (int64_t r = step * rows; r < min((step + 1) * rows, R * kTileSide); ++r) {
        __builtin_prefetch(block + r * ld_, 1);
        if (C > 1) __builtin_prefetch(block + r * ld_ + kTileSide, 1);
      }
      return NothingAhead{};
    };
    if constexpr (kParts == 1) {
      return multiply_split<R, C, 1>(steps, left, right, assign, to, ld_,
                                     [&](int64_t step) { return ask(to + C * kTileSide, step); });
    }
    multiply_split<R, C, kParts>(steps, left, right, true, out_[current_], kSplitSide, [&](int64_t step) {
      add(rows);
      return ask(to, step);
    });
    finish();
    waiting_ = {to, R * kTileSide, C > 1, assign};
    current_ = 1 - current_;
    row_ = 0;
  }

  void finish() { add(kSplitSide); }

 private:
  struct Block {
    float* to = nullptr;
    int64_t rows = 0;
    bool wide = false, assign = false;
  };

  // The next `count` rows of the block that waits.
  void add(int64_t count) {
    finish_stores();
    const int64_t end = min(row_ + count, waiting_.rows);
    const float* out = out_[1 - current_];
    for (; row_ < end; ++row_) {
      add_vector(out + row_ * kSplitSide, waiting_.to + row_ * ld_);
      if (waiting_.wide) add_vector(out + row_ * kSplitSide + kTileSide, waiting_.to + row_ * ld_ + kTileSide);
    }
  }

  void add_vector(const float* out, float* to) const { store(to, waiting_.assign ? load(out) : load(to) + load(out)); }

  alignas(64) float out_[2][kSplitSide * kSplitSide];
  float* sum_;
  int64_t ld_, row_ = 0;
  int current_ = 0;
  Block waiting_;
};

// Tile rows [row, row + 2) of the lower triangle of X^T X, or the last one.
template <int kParts>
inline void add_tile_rows(int64_t row, int64_t n, int64_t steps, const TileScratch& scratch, TileSums& sums,
                          bool assign) {
  const int64_t next = tile_steps(n, kParts) * kParts * kTileWords;
  const int64_t tiles = min(2, column_tiles(n) - row);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t at = 0; at < steps * kParts * kTileWords; at += kTileWords) {
      transpose_words(scratch.right + (row + tile) * next + at, scratch.left + tile * next + at);
    }
  }
  finish_stores();
  const SplitOperand left = {scratch.left, next};
  for (int64_t column = 0; column < row + tiles; column += 2) {
    const SplitOperand right = {scratch.right + column * next, next};
    if (tiles == 2) {
      sums.multiply<kParts, 2, 2>(steps, left, right, row, column, assign);
    } else if (column < row) {
      sums.multiply<kParts, 1, 2>(steps, left, right, row, column, assign);
    } else {
      sums.multiply<kParts, 1, 1>(steps, left, right, row, column, assign);
    }
  }
}

// Share `share` of `shares` of the tile rows of sum <- X^T X over rows [begin, end), lower triangle.
template <int kParts>
inline void gram_by_tiles(const Rows& rows, int64_t begin, int64_t end, int share, int shares,
                          const TileScratch& scratch, float* sum) {
  const TileRegisters registers;
  const int64_t n = rows.d + rows.bias;
  TileSums sums(sum, Padded<float>{n}.ld());
  const int64_t pairs = ceil_div(column_tiles(n), 2);
  const int64_t chunk_steps = tile_steps(n, kParts), chunk = chunk_steps * kTileDepth;
  const int64_t next = chunk_steps * kParts * kTileWords;
  for (int64_t first = begin; first < end || first == begin; first += chunk) {
    const int64_t steps = ceil_div(min(chunk, end - first), kTileDepth);
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t at = first + step * kTileDepth;
      pack_step<kParts>(rows, at, min(kTileDepth, end - at), scratch.right + step * kParts * kTileWords, next);
    }
    // Long rows and short ones in turn, so that the shares are even.
    for (int64_t round = 0; round * shares < pairs; ++round) {
      const int64_t pair = round * shares + (round % 2 == 0 ? share : shares - 1 - share);
      if (pair < pairs) add_tile_rows<kParts>(2 * (pairs - 1 - pair), n, steps, scratch, sums, first == begin);
    }
    sums.finish();
  }
}

inline void gram_by_tiles(const Rows& rows, int64_t begin, int64_t end, int share, int shares,
                          const TileScratch& scratch, float* sum) {
  switch (split_parts(rows)) {
    case 1:
      return gram_by_tiles<1>(rows, begin, end, share, shares, scratch, sum);
    case 2:
      return gram_by_tiles<2>(rows, begin, end, share, shares, scratch, sum);
    default:
      return gram_by_tiles<3>(rows, begin, end, share, shares, scratch, sum);
  }
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
