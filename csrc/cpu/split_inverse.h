// The sweep of blocked_inverse.h by the processor's matrix instructions, on float32 numbers in three parts
// (split_float.h). What is different:
// - The working copy B is the negative of the swept matrix, so that a step adds: W_i = B_iK L^-T, W_K = L^-T,
//   B_ij += W_i W_j^T, and B_ij = W_i W_j^T in row and column K. At the end it is the inverse itself.
// - B lies in blocks of 32 x 32, the lower triangle of them: a block is one run of memory, and one step of depth of an
//   operand. A step takes one to kMaxSplitSteps blocks of pivots.
// - To the matrix instructions numbers below 2^-126 are zeros. So row and column i of the matrix are scaled by a power
//   of two that brings diagonal entry i to 1 .. 4, and those of the inverse likewise: without any rounding.
#pragma once

#include "matrix_tiles.h"
#include "split_pivot.h"
#include "support.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kMaxSplitSteps = 2;
constexpr int64_t kSplitNumel = kSplitSide * kSplitSide;
constexpr int64_t kProductsPerStep = 24;  // six of parts for each of four tiles
static_assert(kSplitSide == kTileDepth, "a block is one step of depth");

// Blocks of pivots per step. Large steps pass over B less often, which pays from where B leaves the second-level cache.
inline int64_t split_sweep_steps(int64_t n) { return n <= 512 ? 1 : kMaxSplitSteps; }

inline int64_t split_blocks(int64_t n) { return ceil_div(n, kSplitSide); }

struct SplitInverseScratch {
  float* matrix;       // [blocks (blocks + 1) / 2, kSplitSide, kSplitSide] B
  float* scale;        // [blocks, kSplitSide]
  float* pivot;        // [depth, depth] A_KK, then L^T
  float* inverse;      // [depth, depth] L^-1
  int32_t* factor[2];  // left L^-1 and right L^-T, [depth, depth]
  int32_t* left;       // left [n, depth] W
  int32_t* right;      // right [depth, n] W^T

  static SplitInverseScratch take(Arena& arena, int64_t n) {
    const int64_t blocks = split_blocks(n), steps = blocks == 0 ? 0 : split_sweep_steps(n);
    const int64_t depth = steps * kTileDepth;
    SplitInverseScratch scratch;
    scratch.matrix = arena.take<float>(blocks * (blocks + 1) / 2 * kSplitNumel);
    scratch.scale = arena.take<float>(blocks * kSplitSide);
    scratch.pivot = arena.take<float>(depth * depth);
    scratch.inverse = arena.take<float>(depth * depth);
    for (int32_t*& factor : scratch.factor) factor = arena.take<int32_t>(2 * steps * steps * kSplitWords);
    scratch.left = arena.take<int32_t>(2 * blocks * steps * kSplitWords);
    scratch.right = arena.take<int32_t>(2 * blocks * steps * kSplitWords);
    return scratch;
  }

  int64_t index(int64_t i, int64_t j) const { return i * (i + 1) / 2 + j; }
  float* block(int64_t i, int64_t j) const { return matrix + index(i, j) * kSplitNumel; }
};

#if defined(__AMX_BF16__)

// 2^-floor(e / 2) of a number whose exponent is e; 1 of one that is no pivot.
inline float root_scale(float x) {
  if (!is_valid_pivot(x)) return 1.0f;
  constexpr float kSmallestNormal = 0x1p-126f, kUp = 0x1p24f;
  const bool subnormal = x < kSmallestNormal;
  const float normal = subnormal ? x * kUp : x;
  int32_t bits;
  __builtin_memcpy(&bits, &normal, sizeof(bits));
  const int32_t exponent = (bits >> 23) - 127 - (subnormal ? 24 : 0);
  bits = (127 - (exponent >> 1)) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

// Row of blocks `row` of B, zeros beyond the matrix and above the diagonal.
inline void load_scaled(const float* a, float damping, int64_t n, int64_t row, const SplitInverseScratch& s) {
  const float* scale = s.scale;
  for (int64_t j = 0; j <= row; ++j) {
    float* out = s.block(row, j);
    for (int64_t r = 0; r < kSplitSide; ++r) {
      const int64_t i = row * kSplitSide + r;
      const int64_t columns = i >= n ? 0 : j < row ? kSplitSide : r + 1;
      const __m512 factor = _mm512_set1_ps(i < n ? -scale[i] : 0.0f);
      for (int64_t c = 0; c < kSplitSide; c += kTileSide) {
        const int64_t column = j * kSplitSide + c;
        const __m512 x = _mm512_maskz_loadu_ps(first_lanes(columns - c), a + i * n + column);
        _mm512_store_ps(out + r * kSplitSide + c,
                        _mm512_mul_ps(_mm512_mul_ps(x, factor), _mm512_load_ps(scale + column)));
      }
      if (j == row && i < n) out[r * kSplitSide + r] = (a[i * n + i] + damping) * -scale[i] * scale[i];
    }
  }
}

// Rows of the inverse from row of blocks `row`, and the columns that mirror them.
inline void store_scaled(const SplitInverseScratch& s, int64_t n, int64_t row, float* inverse) {
  const int64_t last = min((row + 1) * kSplitSide, n);
  for (int64_t i = row * kSplitSide; i < last; i += kTileSide) {
    const int64_t rows = min(kTileSide, n - i);
    for (int64_t j = 0; j <= i; j += kTileSide) {
      const float* in = s.block(row, j / kSplitSide) + i % kSplitSide * kSplitSide + j % kSplitSide;
      const __mmask16 columns = first_lanes(n - j), lower = first_lanes(rows);
      Vec<float> tile[kTileSide], mirrored[kTileSide];
      for (int64_t r = 0; r < kTileSide; ++r) {
        tile[r] = load(in + r * kSplitSide) * s.scale[i + r] * load(s.scale + j);
        mirrored[r] = tile[r];
      }
      transpose<float>(mirrored);
      for (int64_t r = 0; r < rows; ++r) {
        __m512 line = tile[r];
        if (i == j) line = _mm512_mask_mov_ps(mirrored[r], first_lanes(r + 1), line);
        _mm512_mask_storeu_ps(inverse + (i + r) * n + j, columns, line);
      }
      for (int64_t r = 0; r < kTileSide && j < i; ++r) {
        _mm512_mask_storeu_ps(inverse + (j + r) * n + i, lower, mirrored[r]);
      }
    }
  }
}

// Tiles in and out of the form of the other operand.
inline void transpose_parts(const int32_t* in, int32_t* out) {
  for (int64_t part = 0; part < kSplitWords; part += kTileWords) transpose_words(in + part, out + part);
}

// One step of the sweep: blocks [first, first + steps).
struct SplitStep {
  int64_t n, first, steps;

  int64_t end() const { return first + steps; }
  int64_t depth() const { return steps * kTileDepth; }
  int64_t next() const { return steps * kSplitWords; }  // words of a tile of an operand
  bool has(int64_t block) const { return first <= block && block < end(); }
};

// Factors the pivot block and packs L^-1. Returns 0 or the 1-based index of the failing pivot within the matrix.
inline int64_t factor_split_pivot(const SplitInverseScratch& s, const SplitStep& step) {
  const int64_t depth = step.depth(), k0 = step.first * kSplitSide;
  for (int64_t i = 0; i < depth; i += kTileSide) {
    for (int64_t j = 0; j <= i; j += kTileSide) {
      const float* in = s.block(step.first + i / kSplitSide, step.first + j / kSplitSide) +
                        i % kSplitSide * kSplitSide + j % kSplitSide;
      Vec<float> tile[kTileSide];
      for (int64_t r = 0; r < kTileSide; ++r) tile[r] = -load(in + r * kSplitSide);
      transpose<float>(tile);
      for (int64_t r = 0; r < kTileSide; ++r) store(s.pivot + (j + r) * depth + i, tile[r]);
    }
  }
  for (int64_t i = max(0, step.n - k0); i < depth; ++i) s.pivot[i * depth + i] = 1.0f;
  for (int64_t i = 0; i < depth * depth; i += kTileSide) store(s.inverse + i, Vec<float>{});
  const int64_t failed = invert_pivot_tiles(s.pivot, s.inverse, depth);
  if (failed != 0) return k0 + failed;
  for (int64_t tile = 0; tile < 2 * step.steps; ++tile) {
    for (int64_t k = 0; k <= tile / 2; ++k) {
      const int64_t at = tile * step.next() + k * kSplitWords;
      pack_left(s.inverse + tile * kTileSide * depth + k * kTileDepth, depth, kTileSide, kTileDepth, s.factor[0] + at);
      transpose_parts(s.factor[0] + at, s.factor[1] + at);
    }
  }
  return 0;
}

// Both forms of W for row of blocks i. Blocks below the pivots give W, those above give W^T, so that all are packed as
// they lie.
inline void sweep_split_rows(const SplitInverseScratch& s, const SplitStep& step, int64_t i) {
  const int64_t next = step.next();
  const bool below = i >= step.end();
  alignas(64) int32_t column[2 * kMaxSplitSteps * kSplitWords];
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t k = 0; k < step.steps; ++k) {
      int32_t* words = column + tile * next + k * kSplitWords;
      if (below) {
        pack_left(s.block(i, step.first + k) + tile * kTileSide * kSplitSide, kSplitSide, kTileSide, kTileDepth, words);
      } else {
        pack_right(s.block(step.first + k, i) + tile * kTileSide, kSplitSide, kTileDepth, kTileSide, words);
      }
    }
  }
  finish_stores();
  alignas(64) float out[kMaxSplitSteps * kSplitNumel];
  const SplitOperand operand = {column, next};
  const auto beside = [](int64_t) { return NothingAhead{}; };
  for (int64_t k = 0; k < step.steps; ++k) {  // row of blocks k of L^-1 ends with block k
    float* to = out + k * kSplitNumel;
    const int64_t factor = 2 * k * next;
    if (below) {
      multiply_split<2, 2, kSplitParts>(k + 1, operand, {s.factor[1] + factor, next}, true, to, kSplitSide, beside);
    } else {
      multiply_split<2, 2, kSplitParts>(k + 1, {s.factor[0] + factor, next}, operand, true, to, kSplitSide, beside);
    }
  }
  finish_stores();
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t k = 0; k < step.steps; ++k) {
      const int64_t at = (2 * i + tile) * next + k * kSplitWords;
      const float* from = out + k * kSplitNumel;
      if (below) {
        pack_left(from + tile * kTileSide * kSplitSide, kSplitSide, kTileSide, kTileDepth, s.left + at);
        transpose_parts(s.left + at, s.right + at);
      } else {
        pack_right(from + tile * kTileSide, kSplitSide, kTileDepth, kTileSide, s.right + at);
        transpose_parts(s.right + at, s.left + at);
      }
    }
  }
  finish_stores();
}

// Both forms of W_K = L^-T for its row of blocks i.
inline void pack_pivot_rows(const SplitInverseScratch& s, const SplitStep& step, int64_t i) {
  for (int64_t tile = 0; tile < 2; ++tile) {
    for (int64_t k = 0; k < step.steps; ++k) {
      const int64_t at = (2 * i + tile) * step.next() + k * kSplitWords;
      const int64_t column = (i - step.first) * kSplitSide + tile * kTileSide;
      pack_right(s.inverse + k * kTileDepth * step.depth() + column, step.depth(), kTileDepth, kTileSide, s.right + at);
      transpose_parts(s.right + at, s.left + at);
    }
  }
  finish_stores();
}

inline void sweep_split(const SplitInverseScratch& s, const SplitStep& step, int64_t i) {
  if (step.has(i)) return pack_pivot_rows(s, step, i);
  sweep_split_rows(s, step, i);
}

// Memory of the next matrix: of the lines that come with a block a few are asked for with every product, since many at
// once would stand in the way of this matrix's own.
class SpreadAhead {
 public:
  SpreadAhead(Ahead& ahead, int64_t lines, int64_t steps)
      : ahead_(ahead), per_block_(lines), per_product_(ceil_div(lines, steps * kProductsPerStep)) {}

  void start_block() { lines_ = ahead_.take(per_block_); }
  void next() {
    for (int64_t line = 0; line < per_product_; ++line) {
      __builtin_prefetch(lines_.begin, 0, 2);
      lines_.begin += lines_.step;
    }
  }

 private:
  Ahead& ahead_;
  int64_t per_block_, per_product_;
  Ahead::Lines lines_ = {};
};

// Products on their way into B: a block's are added while the next is multiplied, a few vectors with every instruction.
class BlockSums {
 public:
  // to (=, +=) left right.
  void multiply(int64_t steps, SplitOperand left, SplitOperand right, bool assign, float* to,  // [32, 32]
                SpreadAhead& ahead) {
    float* out = assign ? to : out_[current_];
    ahead.start_block();
    multiply_split<2, 2, kSplitParts>(steps, left, right, true, out, kSplitSide,
                                      [&](int64_t) { return Beside{*this, ahead}; });
    finish();
    if (assign) return;
    from_ = out, to_ = to, end_ = out + kSplitNumel;
    current_ = 1 - current_;
  }

  void finish() {
    finish_stores();
    while (from_ < end_) add();
  }

 private:
  struct Beside {
    BlockSums& sums;
    SpreadAhead& ahead;
    void next() {
      ahead.next();
      if (sums.from_ < sums.end_) sums.add();
    }
  };

  inline __attribute__((always_inline)) void add() {
    constexpr int kVectors = 4;
    KFAC_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      float* to = to_ + v * kTileSide;
      _mm512_store_ps(to, _mm512_add_ps(_mm512_load_ps(to), _mm512_load_ps(from_ + v * kTileSide)));
    }
    from_ += kVectors * kTileSide;
    to_ += kVectors * kTileSide;
  }

  alignas(64) float out_[2][kSplitNumel];
  int current_ = 0;
  const float *from_ = nullptr, *end_ = nullptr;
  float* to_ = nullptr;
};

// Row of blocks i of B, up to the diagonal.
inline void update_split_rows(const SplitInverseScratch& s, const SplitStep& step, int64_t i, BlockSums& sums,
                              SpreadAhead& ahead) {
  const SplitOperand left = {s.left + 2 * i * step.next(), step.next()};
  for (int64_t j = 0; j <= i; ++j) {
    const SplitOperand right = {s.right + 2 * j * step.next(), step.next()};
    sums.multiply(step.steps, left, right, step.has(i) || step.has(j), s.block(i, j), ahead);
  }
}

// body(row) for every row of blocks, the longest first, with tile registers.
template <typename Body>
inline void for_block_rows(int threads, int64_t blocks, Body&& body) {
  if (threads == 1) {
    const TileRegisters registers;
    for (int64_t row = blocks - 1; row >= 0; --row) body(row);
    return;
  }
  parallel_for(threads, blocks, [&](int64_t task, int) {
    const TileRegisters registers;
    body(blocks - 1 - task);
  });
}

// inverse <- (block + damping I)^-1 on up to `threads` threads. Returns 0 or the index of the failing pivot, in which
// case `inverse` is untouched.
inline int64_t invert_split(const float* block, float damping, int64_t n, float* inverse, const SplitInverseScratch& s,
                            int threads, Ahead& ahead) {
  const int64_t blocks = split_blocks(n);
  for (int64_t i = 0; i < blocks * kSplitSide; ++i) s.scale[i] = i < n ? root_scale(block[i * n + i] + damping) : 1.0f;
  for_block_rows(threads, blocks, [&](int64_t i) { load_scaled(block, damping, n, i, s); });
  const int64_t depth_steps = split_sweep_steps(n);
  const int64_t updates = blocks * (blocks + 1) / 2 * ceil_div(blocks, depth_steps);
  SpreadAhead spread(ahead, ceil_div(n * n / 8, updates), depth_steps);  // lines of both matrices of the next block
  for (int64_t k = 0; k < blocks; k += depth_steps) {
    const SplitStep step = {n, k, min(depth_steps, blocks - k)};
    const int64_t failed = factor_split_pivot(s, step);
    if (failed != 0) return failed;
    for_block_rows(threads, blocks, [&](int64_t i) { sweep_split(s, step, i); });
    if (threads == 1) {
      const TileRegisters registers;
      BlockSums sums;
      for (int64_t i = 0; i < blocks; ++i) update_split_rows(s, step, i, sums, spread);
      sums.finish();
    } else {
      for_block_rows(threads, blocks, [&](int64_t i) {
        Ahead nothing;
        SpreadAhead none(nothing, 0, depth_steps);
        BlockSums sums;
        update_split_rows(s, step, i, sums, none);
        sums.finish();
      });
    }
  }
  for_block_rows(threads, blocks, [&](int64_t i) { store_scaled(s, n, i, inverse); });
  return 0;
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
