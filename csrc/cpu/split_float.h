// Products of float32 matrices by instructions that multiply bfloat16 numbers. A float32 number of 24 bits is the sum
// of three bfloat16 numbers of 8 bits, exactly: x = h + m + l, each the one before's remainder. Of the nine products
// of parts in x y those below 2^-24 of it, m l, l m and l l, are left out: six products, at six times the cost of one,
// leave an error smaller than that of rounding x y to float32.
//
// Limits: parts and products below the smallest normal number, 2^-126, are zeros. So numbers below 2^-110 keep 16 bits
// and those below 2^-118 keep 8. A number that is not finite, or above 0x1.fep127, makes what it meets not finite.
#pragma once

#include "ahead.h"
#include "microkernel.h"
#include "tile_registers.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kSplitParts = 3;
constexpr int64_t kSplitWords = kSplitParts * kTileWords;  // 32-bit words of one step of one tile: h, m, l

constexpr int64_t kSplitSide = 2 * kTileSide;  // of a block of sums

inline int64_t split_tiles(int64_t rows) { return ceil_div(rows, kTileSide); }
inline int64_t split_steps(int64_t depth) { return ceil_div(depth, kTileDepth); }

#if defined(__AMX_BF16__)

// The parts of 16 pairs of numbers as rows of three tiles: word i holds low[i] and, in its upper half, high[i].
template <int kParts = kSplitParts>
inline __attribute__((always_inline)) void split_pairs(__m512 low, __m512 high, int32_t* words) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), half = _mm512_set1_epi32(0x8000);
  KFAC_FAST_UNROLL
  for (int part = 0; part < kParts; ++part) {
    // To nearest: what is left fits the parts to come with a bit to spare. Of the last part nothing is left.
    const __m512i round = part + 1 < kParts ? half : _mm512_setzero_si512();
    const __m512i l = _mm512_add_epi32(_mm512_castps_si512(low), round);
    const __m512i h = _mm512_add_epi32(_mm512_castps_si512(high), round);
    constexpr int kSelect = 0xca;  // bits of the second where the first is 1, else of the third
    const __m512i lower = _mm512_maskz_srli_epi32(static_cast<__mmask16>(-1), l, 16);
    _mm512_store_si512(words + part * kTileWords, _mm512_ternarylogic_epi32(upper, h, lower, kSelect));
    low = _mm512_sub_ps(low, _mm512_castsi512_ps(_mm512_and_si512(l, upper)));
    high = _mm512_sub_ps(high, _mm512_castsi512_ps(_mm512_and_si512(h, upper)));
  }
}

inline __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= kTileSide ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

// Both operands hold [steps, kSplitParts, kTileWords] a tile, filled up with zeros. Their rows of words are packed
// alike, one from a row of the left operand, one across rows of the right: element k of a step is paired with k + 16.

// Up to 16 rows of the left operand, row-major.
inline void pack_left(const float* a, int64_t ld, int64_t rows, int64_t depth, int32_t* words) {
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    const __mmask16 low = first_lanes(depth - k), high = first_lanes(depth - k - kTileSide);
    for (int64_t i = 0; i < kTileSide; ++i) {
      const bool inside = i < rows;
      const float* row = a + i * ld + k;
      split_pairs(_mm512_maskz_loadu_ps(inside ? low : 0, row),
                  _mm512_maskz_loadu_ps(inside ? high : 0, row + kTileSide), words + i * kTileSide);
    }
    words += kSplitWords;
  }
}

// Up to 16 columns of the right operand, row-major.
template <int kParts = kSplitParts>
inline void pack_right(const float* b, int64_t ld, int64_t depth, int64_t columns, int32_t* words) {
  const __mmask16 inside = first_lanes(columns);
  for (int64_t k = 0; k < depth; k += kTileDepth) {
    for (int64_t i = k; i < k + kTileSide; ++i) {
      split_pairs<kParts>(_mm512_maskz_loadu_ps(i < depth ? inside : 0, b + i * ld),
                          _mm512_maskz_loadu_ps(i + kTileSide < depth ? inside : 0, b + (i + kTileSide) * ld),
                          words + (i - k) * kTileSide);
    }
    words += kParts * kTileWords;
  }
}

// An operand's tiles, `next` words apart.
struct SplitOperand {
  const int32_t* words;
  int64_t next;
};

// Parts of both operands in tile registers 4 .. 7, their products in 0 .. 3.
template <int R>
inline __attribute__((always_inline)) void load_left_part(const SplitOperand& left, int64_t part) {
  _tile_loadd(4, left.words + part * kTileWords, 64);
  if constexpr (R > 1) _tile_loadd(5, left.words + left.next + part * kTileWords, 64);
}

template <int C>
inline __attribute__((always_inline)) void load_right_part(const SplitOperand& right, int64_t part) {
  _tile_loadd(6, right.words + part * kTileWords, 64);
  if constexpr (C > 1) _tile_loadd(7, right.words + right.next + part * kTileWords, 64);
}

// A line is asked for with every product: all of a step at once would stand in the way of its own loads.
struct LinesAhead {
  Ahead::Lines lines;
  void next() {
    __builtin_prefetch(lines.begin, 0, 2);
    lines.begin += lines.step;
  }
};

struct NothingAhead {
  void next() {}
};

template <int R, int C, typename Lines>
inline __attribute__((always_inline)) void multiply_parts(Lines& ahead) {
  KFAC_FAST_UNROLL
  for (int line = 0; line < R * C; ++line) ahead.next();
  _tile_dpbf16ps(0, 4, 6);
  if constexpr (C > 1) _tile_dpbf16ps(1, 4, 7);
  if constexpr (R > 1) _tile_dpbf16ps(2, 5, 6);
  if constexpr (R > 1 && C > 1) _tile_dpbf16ps(3, 5, 7);
}

// The products of one step: of three parts h l, h m, h h, m h, m m, l h, with 16 loads for 24 products; of two parts,
// which hold numbers of 16 bits, all four; of one part, a bfloat16 number, the only one.
template <int kParts, int R, int C, typename Lines>
inline __attribute__((always_inline)) void multiply_step(const SplitOperand& left, const SplitOperand& right,
                                                         Lines ahead) {
  load_left_part<R>(left, 0);
  KFAC_FAST_UNROLL
  for (int part = kParts - 1; part >= 0; --part) {
    load_right_part<C>(right, part);
    multiply_parts<R, C>(ahead);
  }
  if constexpr (kParts > 1) {
    load_left_part<R>(left, 1);
    multiply_parts<R, C>(ahead);
    load_right_part<C>(right, 1);
    multiply_parts<R, C>(ahead);
  }
  if constexpr (kParts > 2) {
    load_left_part<R>(left, 2);
    load_right_part<C>(right, 0);
    multiply_parts<R, C>(ahead);
  }
}

// out (=, +=) a b on R x C tiles, R and C up to 2. Stores made before and loads made after belong outside
// finish_stores(). beside(step) runs with each step, where vector instructions take no time of the matrix instructions,
// and says what to ask for during it.
template <int R, int C, int kParts, typename Beside>
inline void multiply_split(int64_t steps, SplitOperand left, SplitOperand right, bool assign,
                           float* out,  // [16 R, 16 C]
                           int64_t ld, Beside&& beside) {
  const int64_t row_bytes = ld * static_cast<int64_t>(sizeof(float));
  if (assign) {
    _tile_zero(0);
    if constexpr (C > 1) _tile_zero(1);
    if constexpr (R > 1) _tile_zero(2);
    if constexpr (R > 1 && C > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, out, row_bytes);
    if constexpr (C > 1) _tile_loadd(1, out + kTileSide, row_bytes);
    if constexpr (R > 1) _tile_loadd(2, out + kTileSide * ld, row_bytes);
    if constexpr (R > 1 && C > 1) _tile_loadd(3, out + kTileSide * ld + kTileSide, row_bytes);
  }
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kParts, R, C>(left, right, beside(step));
    left.words += kParts * kTileWords;
    right.words += kParts * kTileWords;
  }
  _tile_stored(0, out, row_bytes);
  if constexpr (C > 1) _tile_stored(1, out + kTileSide, row_bytes);
  if constexpr (R > 1) _tile_stored(2, out + kTileSide * ld, row_bytes);
  if constexpr (R > 1 && C > 1) _tile_stored(3, out + kTileSide * ld + kTileSide, row_bytes);
}

template <int R, int C>
inline void multiply_split(int64_t steps, SplitOperand left, SplitOperand right, bool assign, float* out, int64_t ld,
                           Ahead& ahead) {
  multiply_split<R, C, kSplitParts>(steps, left, right, assign, out, ld,
                                    [&](int64_t) { return LinesAhead{ahead.take(2 * kSplitParts * R * C)}; });
}

// The same for up to 32 rows and columns: whole tiles of them are written.
inline void multiply_split(int64_t steps, int64_t rows, int64_t columns, SplitOperand left, SplitOperand right,
                           bool assign, float* out, int64_t ld, Ahead& ahead) {
  if (rows > kTileSide) {
    return columns > kTileSide ? multiply_split<2, 2>(steps, left, right, assign, out, ld, ahead)
                               : multiply_split<2, 1>(steps, left, right, assign, out, ld, ahead);
  }
  return columns > kTileSide ? multiply_split<1, 2>(steps, left, right, assign, out, ld, ahead)
                             : multiply_split<1, 1>(steps, left, right, assign, out, ld, ahead);
}

// c (=, +=, -=) a b on up to 32 rows and columns; nothing else is written.
template <Store kStore>
inline void update_split(int64_t steps, int64_t rows, int64_t columns, SplitOperand left, SplitOperand right, float* c,
                         int64_t ld, Ahead& ahead) {
  alignas(64) float out[kSplitSide * kSplitSide];
  multiply_split(steps, rows, columns, left, right, true, out, kSplitSide, ahead);
  finish_stores();
  for (int64_t j = 0; j < columns; j += kTileSide) {
    const __mmask16 inside = first_lanes(columns - j);
    for (int64_t i = 0; i < rows; ++i) {
      __m512 sum = _mm512_load_ps(out + i * kSplitSide + j);
      float* to = c + i * ld + j;
      if (kStore == Store::add) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(inside, to), sum);
      if (kStore == Store::subtract) sum = _mm512_sub_ps(_mm512_maskz_loadu_ps(inside, to), sum);
      _mm512_mask_storeu_ps(to, inside, sum);
    }
  }
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
