// X^T X of bfloat16 rows with the processor's matrix instructions (AMX): exact products, sums in float32. A tile
// register holds 16 rows of 64 bytes; an instruction multiplies 16 x 32 by 32 x 16 elements. To it subnormal numbers,
// whose squares vanish in float32 anyway, are zeros. Compiled in the namespace of these instructions alone; amx.h says
// whether they may run.
#pragma once

#include "../ops.h"
#include "support.h"
#include "symmetric_update.h"
#include "tile_registers.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Weighted rows are no bfloat16 numbers any more; they, and rows that are not contiguous, take the general path.
template <typename T>
inline bool matrix_tiles_apply(const Rows& rows) {
  return kHasMatrixTiles<T> && rows.dtype == DType::bf16 && rows.conv == nullptr && rows.weights == nullptr &&
         rows.col_stride == 1;
}

// Rows of X packed at a time: both forms of one pair of column tiles fit the first-level cache.
constexpr int64_t kTileChunkRows = 256;
constexpr int64_t kTileSteps = kTileChunkRows / kTileDepth;

inline int64_t column_tiles(int64_t n) { return ceil_div(n, kTileSide); }

// A chunk of X in both forms that the instruction reads, [column tiles, kTileSteps, kTileWords] 32-bit words each.
struct TileScratch {
  int32_t* right = nullptr;  // word (p, j) of a tile: rows 2p and 2p + 1 of column j
  int32_t* left = nullptr;   // the same transposed

  static int64_t words(int64_t n) { return column_tiles(n) * kTileSteps * kTileWords; }

  static TileScratch take(Arena& arena, int64_t words) {
    TileScratch scratch;
    scratch.right = arena.take<int32_t>(words);
    scratch.left = arena.take<int32_t>(words);
    return scratch;
  }
};

// The floats of X^T X in row-major order, whole tiles of them.
inline int64_t tile_sum_numel(int64_t n) { return column_tiles(n) * kTileSide * Padded<float>{n}.ld(); }

#if defined(__AMX_BF16__)

// Rows [first, first + kTileDepth) of X, those from `end` on zero, as step `step` of every column tile.
inline void pack_tiles(const Rows& rows, int64_t first, int64_t end, int64_t step, const TileScratch& scratch) {
  const int64_t n = rows.d + rows.bias;
  const uint16_t* x = static_cast<const uint16_t*>(rows.data) + first * rows.row_stride;
  const int64_t depth = min(kTileDepth, end - first);
  for (int64_t tile = 0; tile < column_tiles(n); ++tile) {
    const int64_t begin = tile * kTileSide;
    const int64_t columns = max(0, min(kTileSide, rows.d - begin));
    const auto inside = static_cast<__mmask16>((1u << columns) - 1);
    const auto ones = static_cast<__mmask16>(rows.bias && rows.d - begin < kTileSide ? 1u << (rows.d - begin) : 0u);
    const auto row_at = [&](int64_t k) {
      if (k >= depth) return _mm512_setzero_si512();
      const uint16_t* row = x + k * rows.row_stride + begin;
      _mm_prefetch(reinterpret_cast<const char*>(row + kTileDepth * rows.row_stride), _MM_HINT_T0);
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, row));
      return _mm512_mask_mov_epi32(wide, ones, _mm512_set1_epi32(0x3f80));
    };
    Vec<float> words[kTileSide];
    const int64_t at = (tile * kTileSteps + step) * kTileWords;
    for (int64_t pair = 0; pair < kTileSide; ++pair) {
      const __m512i word = _mm512_or_si512(row_at(2 * pair), _mm512_slli_epi32(row_at(2 * pair + 1), 16));
      _mm512_store_si512(scratch.right + at + pair * kTileSide, word);
      words[pair] = reinterpret_cast<Vec<float>>(word);
    }
    transpose<float>(words);
    for (int64_t column = 0; column < kTileSide; ++column) {
      _mm512_store_si512(scratch.left + at + column * kTileSide, reinterpret_cast<__m512i>(words[column]));
    }
  }
}

// sum (=, +=) left^T right on R x C tiles, R and C up to 2, over all steps of a chunk.
template <int R, int C>
inline void multiply_tiles(int64_t steps, const int32_t* left, const int32_t* right, float* sum, int64_t ld,
                           bool assign) {
  constexpr int64_t kNext = kTileSteps * kTileWords;
  constexpr int64_t kRowBytes = kTileSide * 4;
  alignas(64) float out[R][C][kTileWords];
  _tile_zero(0);
  if constexpr (C > 1) _tile_zero(1);
  if constexpr (R > 1) _tile_zero(2);
  if constexpr (R > 1 && C > 1) _tile_zero(3);
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, left, kRowBytes);
    _tile_loadd(6, right, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (C > 1) {
      _tile_loadd(7, right + kNext, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, left + kNext, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
    left += kTileWords;
    right += kTileWords;
  }
  _tile_stored(0, out[0][0], kRowBytes);
  if constexpr (C > 1) _tile_stored(1, out[0][C - 1], kRowBytes);
  if constexpr (R > 1) _tile_stored(2, out[R - 1][0], kRowBytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, out[R - 1][C - 1], kRowBytes);
  finish_stores();
  for (int64_t r = 0; r < R * kTileSide; ++r) {
    KFAC_FAST_UNROLL
    for (int64_t c = 0; c < C; ++c) {
      float* to = sum + r * ld + c * kTileSide;
      const Vec<float> part = load(out[r / kTileSide][c] + r % kTileSide * kTileSide);
      store(to, assign ? part : load(to) + part);
    }
  }
}

// Tile rows [row, row + 2) of the lower triangle of X^T X, or the last one.
inline void multiply_tile_rows(int64_t row, int64_t n, int64_t steps, const TileScratch& scratch, float* sum,
                               bool assign) {
  constexpr int64_t kNext = kTileSteps * kTileWords;
  const int64_t ld = Padded<float>{n}.ld();
  const int64_t tiles = column_tiles(n);
  const int32_t* left = scratch.left + row * kNext;
  float* out = sum + row * kTileSide * ld;
  if (row + 1 == tiles) {  // also the only one, where n <= 16
    for (int64_t column = 0; column < row; column += 2) {
      multiply_tiles<1, 2>(steps, left, scratch.right + column * kNext, out + column * kTileSide, ld, assign);
    }
    return multiply_tiles<1, 1>(steps, left, scratch.right + row * kNext, out + row * kTileSide, ld, assign);
  }
  for (int64_t column = 0; column <= row; column += 2) {
    multiply_tiles<2, 2>(steps, left, scratch.right + column * kNext, out + column * kTileSide, ld, assign);
  }
}

// sum <- X^T X over rows [begin, end), lower triangle, on up to `threads` threads that share the scratch.
inline void gram_by_tiles(const Rows& rows, int64_t begin, int64_t end, int threads, const TileScratch& scratch,
                          float* sum) {
  const int64_t n = rows.d + rows.bias;
  const int64_t pairs = ceil_div(column_tiles(n), 2);
  for (int64_t first = begin; first < end || first == begin; first += kTileChunkRows) {
    const int64_t steps = ceil_div(min(kTileChunkRows, end - first), kTileDepth);
    parallel_for(threads, steps, [&](int64_t step, int) {
      pack_tiles(rows, first + step * kTileDepth, end, step, scratch);
      finish_stores();
    });
    // The longest rows first. A row's part of the sum stays with a thread only by chance.
    parallel_for(threads, pairs, [&](int64_t pair, int) {
      const TileRegisters registers;
      multiply_tile_rows(2 * (pairs - 1 - pair), n, steps, scratch, sum, first == begin);
    });
  }
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
