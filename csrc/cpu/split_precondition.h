// G^-1 V A^-1 of one layer by products of split float32 numbers: U = G^-1 (V A^-1). In this order V and G^-1 are left
// operands and A^-1 and the first product right ones, so that all are packed from their rows, as they lie; the
// first product is split while it is still in the first-level cache and never stored as a matrix.
#pragma once

#include "convert.h"
#include "split_float.h"
#include "support.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

// Blocks of a task, at most this many squared, and the steps of depth done at a time: one chunk of a row of blocks and
// of a column of them and all sums stay in the second-level cache, one block's share in the first-level cache.
constexpr int64_t kSplitGroup = 8;
constexpr int64_t kSplitChunk = 4;
constexpr int64_t kSplitTasksPerThread = 4;
constexpr int64_t kSplitBlock = kSplitSide * kSplitSide;

// A packed operand: chunks of depth one behind the other, [tiles, up to kSplitChunk steps] each.
struct SplitLayout {
  int64_t tiles, steps;

  int64_t words() const { return tiles * steps * kSplitWords; }
  int64_t next(int64_t step) const { return min(kSplitChunk, steps - step / kSplitChunk * kSplitChunk) * kSplitWords; }
  int64_t at(int64_t tile, int64_t step) const {
    const int64_t inside = step % kSplitChunk;
    return (step - inside) * tiles * kSplitWords + tile * next(step) + inside * kSplitWords;
  }
};

inline SplitLayout split_layout(int64_t side, int64_t depth) { return {split_tiles(side), split_steps(depth)}; }

// What a layer needs, packed.
struct SplitScratch {
  int32_t* v = nullptr;          // left [m, n]
  int32_t* g_inverse = nullptr;  // left [m, m]
  int32_t* a_inverse = nullptr;  // right [n, n]
  int32_t* product = nullptr;    // right [m, n]
  float* sums = nullptr;         // [kSplitGroup, kSplitGroup] blocks, of each thread
  float* dots = nullptr;         // [blocks of m, blocks of n] <V, U> of each
};

struct SplitSizes {
  int64_t v = 0, g_inverse = 0, a_inverse = 0, product = 0, sums = 0, dots = 0;

  void include(int64_t m, int64_t n, int threads) {
    v = max(v, split_layout(m, n).words());
    g_inverse = max(g_inverse, split_layout(m, m).words());
    a_inverse = max(a_inverse, split_layout(n, n).words());
    product = max(product, split_layout(n, m).words());
    const int64_t blocks = ceil_div(m, kSplitSide) * ceil_div(n, kSplitSide);
    const int64_t together = threads > 1 ? threads * kSplitGroup * kSplitGroup : min(blocks, kSplitGroup * kSplitGroup);
    sums = max(sums, together * kSplitBlock);
    dots = max(dots, blocks);
  }

  SplitScratch take(Arena& arena) const {
    SplitScratch scratch;
    scratch.v = arena.take<int32_t>(v);
    scratch.g_inverse = arena.take<int32_t>(g_inverse);
    scratch.a_inverse = arena.take<int32_t>(a_inverse);
    scratch.product = arena.take<int32_t>(product);
    scratch.sums = arena.take<float>(sums);
    scratch.dots = arena.take<float>(dots);
    return scratch;
  }
};

#if defined(__AMX_BF16__)

// Whether rows of the gradient without its bias column are rows of float32 numbers.
inline bool has_float_rows(const Matrix& v) { return v.dtype == DType::f32 && v.col_stride == 1; }

// Elements [column, column + columns) of rows [row, row + rows) of V, the last column of all perhaps being the bias.
inline void copy_gradient(const Matrix& v, int64_t n, int64_t row, int64_t column, int64_t rows, int64_t columns,
                          float* out) {  // row stride kTileDepth
  with_element(v.dtype, [&](auto element) {
    using Source = decltype(element);
    const int64_t weights = min(columns, n - (v.bias != nullptr) - column);
    for (int64_t i = 0; i < rows; ++i) {
      const Source* source = static_cast<const Source*>(v.data) + (row + i) * v.row_stride + column * v.col_stride;
      for (int64_t j = 0; j < weights; ++j) out[i * kTileDepth + j] = convert<float>(source[j * v.col_stride]);
      if (weights < columns) {
        out[i * kTileDepth + weights] = convert<float>(static_cast<const Source*>(v.bias)[(row + i) * v.bias_stride]);
      }
    }
  });
}

// Tile `tile` of the left operand V.
inline void pack_gradient(const Matrix& v, int64_t m, int64_t n, int64_t tile, int32_t* words) {
  const SplitLayout layout = split_layout(m, n);
  const int64_t row = tile * kTileSide, rows = min(kTileSide, m - row);
  const int64_t whole = !has_float_rows(v) ? 0 : v.bias == nullptr ? n : (n - 1) / kTileDepth * kTileDepth;
  for (int64_t k = 0; k < n; k += kTileDepth) {
    const int64_t columns = min(kTileDepth, n - k);
    int32_t* out = words + layout.at(tile, k / kTileDepth);
    if (k < whole) {
      pack_left(static_cast<const float*>(v.data) + row * v.row_stride + k, v.row_stride, rows, columns, out);
    } else {
      alignas(64) float copy[kTileSide * kTileDepth];
      copy_gradient(v, n, row, k, rows, columns, copy);
      pack_left(copy, kTileDepth, rows, columns, out);
    }
  }
}

// Tile `tile` of the left operand G^-1.
inline void pack_inverse_rows(const float* inverse, int64_t m, int64_t tile, int32_t* words) {  // [m, m]
  const SplitLayout layout = split_layout(m, m);
  const int64_t row = tile * kTileSide;
  for (int64_t k = 0; k < m; k += kTileDepth * kSplitChunk) {
    pack_left(inverse + row * m + k, m, min(kTileSide, m - row), min(kTileDepth * kSplitChunk, m - k),
              words + layout.at(tile, k / kTileDepth));
  }
}

// Step `step` of depth of the right operand A^-1.
inline void pack_inverse_step(const float* inverse, int64_t n, int64_t step, int32_t* words) {  // [n, n]
  const SplitLayout layout = split_layout(n, n);
  const int64_t row = step * kTileDepth;
  for (int64_t j = 0; j < n; j += kTileSide) {
    pack_right(inverse + row * n + j, n, min(kTileDepth, n - row), min(kTileSide, n - j),
               words + layout.at(j / kTileSide, step));
  }
}

// Writes a block of U whose first element is (row, column), and returns its scalar product with V.
inline float store_block(const Matrix& v, const Matrix& u, int64_t n, int64_t row, int64_t column, int64_t rows,
                         int64_t columns, const float* block) {  // [kSplitSide, kSplitSide]
  static_assert(kSplitSide == kTileDepth, "one row stride for both");
  alignas(64) float copy[kSplitSide * kSplitSide];
  const float* gradient = copy;
  int64_t ld = kTileDepth;
  const bool bias = u.bias != nullptr && column + columns == n;
  const int64_t weights = columns - bias;
  if (has_float_rows(v)) {
    gradient = static_cast<const float*>(v.data) + row * v.row_stride + column;
    ld = v.row_stride;
  } else {
    copy_gradient(v, n, row, column, rows, columns, copy);
  }
  const __mmask16 low = first_lanes(weights), high = first_lanes(weights - kTileSide);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0; i < rows; ++i) {
    const float* line = block + i * kSplitSide;
    const __m512 x = _mm512_maskz_loadu_ps(low, gradient + i * ld);
    const __m512 y = _mm512_maskz_loadu_ps(high, gradient + i * ld + kTileSide);
    sums[0] = _mm512_mask3_fmadd_ps(_mm512_load_ps(line), x, sums[0], low);
    sums[1] = _mm512_mask3_fmadd_ps(_mm512_load_ps(line + kTileSide), y, sums[1], high);
  }
  alignas(64) float lanes[kTileSide];
  _mm512_store_ps(lanes, _mm512_add_ps(sums[0], sums[1]));
  float dot = 0.0f;
  for (int64_t lane = 0; lane < kTileSide; ++lane) dot += lanes[lane];
  if (bias) {
    with_element(v.dtype, [&](auto element) {
      const auto* source = static_cast<const decltype(element)*>(v.bias) + row * v.bias_stride;
      for (int64_t i = 0; i < rows; ++i) {
        dot += convert<float>(source[i * v.bias_stride]) * block[i * kSplitSide + weights];
      }
    });
  }
  if (has_float_rows(u)) {
    float* out = static_cast<float*>(u.data) + row * u.row_stride + column;
    for (int64_t i = 0; i < rows; ++i) {
      const float* line = block + i * kSplitSide;
      _mm512_mask_storeu_ps(out + i * u.row_stride, low, _mm512_load_ps(line));
      _mm512_mask_storeu_ps(out + i * u.row_stride + kTileSide, high, _mm512_load_ps(line + kTileSide));
    }
  }
  with_element(u.dtype, [&](auto element) {
    using Target = decltype(element);
    for (int64_t i = 0; i < rows && !has_float_rows(u); ++i) {
      Target* out = static_cast<Target*>(u.data) + (row + i) * u.row_stride + column * u.col_stride;
      for (int64_t j = 0; j < weights; ++j) narrow(block[i * kSplitSide + j], out + j * u.col_stride);
    }
    for (int64_t i = 0; i < rows && bias; ++i) {
      narrow(block[i * kSplitSide + weights], static_cast<Target*>(u.bias) + (row + i) * u.bias_stride);
    }
  });
  return dot;
}

// finish(row, column, rows, columns, block) for every block of 32 x 32 of an [m, n] product, in square groups side by
// side on all threads. A single thread asks for its next layer's memory.
template <typename Finish>
inline void split_product(int threads, int64_t m, int64_t n, int64_t depth, const int32_t* left, const int32_t* right,
                          float* sums, Ahead& ahead, Finish&& finish) {
  const SplitLayout left_layout = split_layout(m, depth), right_layout = split_layout(n, depth);
  const int64_t rows = ceil_div(m, kSplitSide), columns = ceil_div(n, kSplitSide), steps = left_layout.steps;
  int64_t group = kSplitGroup;
  while (group > 1 && threads > 1 &&
         ceil_div(rows, group) * ceil_div(columns, group) < kSplitTasksPerThread * threads) {
    --group;
  }
  const int64_t across = ceil_div(columns, group);
  const auto multiply = [&](int64_t task, float* blocks, Ahead& beyond) {
    const int64_t i = task / across * group, j = task % across * group;
    const int64_t i_end = min(i + group, rows), j_end = min(j + group, columns);
    for (int64_t step = 0; step < steps; step += kSplitChunk) {
      const int64_t left_next = left_layout.next(step), right_next = right_layout.next(step);
      Ahead chunk;
      const int64_t then = step + kSplitChunk;
      if (then < steps) {
        chunk.add(left + left_layout.at(2 * i, then), 2 * (i_end - i) * left_layout.next(then) * 4);
        chunk.add(right + right_layout.at(2 * j, then), 2 * (j_end - j) * right_layout.next(then) * 4);
      }
      for (int64_t x = j; x < j_end; ++x) {
        for (int64_t y = i; y < i_end; ++y) {
          float* block = blocks + ((y - i) * (j_end - j) + x - j) * kSplitBlock;
          const int64_t height = min(kSplitSide, m - y * kSplitSide), width = min(kSplitSide, n - x * kSplitSide);
          multiply_split(min(kSplitChunk, steps - step), height, width, {left + left_layout.at(2 * y, step), left_next},
                         {right + right_layout.at(2 * x, step), right_next}, step == 0, block, kSplitSide,
                         then < steps ? chunk : beyond);
          if (then < steps) continue;
          finish_stores();
          finish(y * kSplitSide, x * kSplitSide, height, width, block);
        }
      }
    }
  };
  const int64_t tasks = ceil_div(rows, group) * across;
  if (threads == 1) {
    const TileRegisters registers;
    for (int64_t task = 0; task < tasks; ++task) multiply(task, sums, ahead);
    return;
  }
  parallel_for(threads, tasks, [&](int64_t task, int thread) {
    const TileRegisters registers;
    Ahead nothing;
    multiply(task, sums + thread * kSplitGroup * kSplitGroup * kSplitBlock, nothing);
  });
}

// U <- G^-1 V A^-1 on up to `threads` threads. Returns <V, U>.
inline float precondition_split(const float* g_inverse, const float* a_inverse, const Matrix& v, const Matrix& u,
                                int64_t m, int64_t n, const SplitScratch& s, int threads, Ahead& ahead) {
  const int64_t m_tiles = split_tiles(m);
  parallel_for(threads, 2 * m_tiles + split_steps(n), [&](int64_t task, int) {
    if (task < m_tiles) {
      pack_gradient(v, m, n, task, s.v);
    } else if (task < 2 * m_tiles) {
      pack_inverse_rows(g_inverse, m, task - m_tiles, s.g_inverse);
    } else {
      pack_inverse_step(a_inverse, n, task - 2 * m_tiles, s.a_inverse);
    }
    finish_stores();
  });
  const SplitLayout product = split_layout(n, m);
  split_product(threads, m, n, n, s.v, s.a_inverse, s.sums, ahead,
                [&](int64_t row, int64_t column, int64_t rows, int64_t columns, const float* block) {
                  for (int64_t j = 0; j < columns; j += kTileSide) {
                    pack_right(block + j, kSplitSide, rows, min(kTileSide, columns - j),
                               s.product + product.at((column + j) / kTileSide, row / kTileDepth));
                  }
                  finish_stores();
                });
  const int64_t across = ceil_div(n, kSplitSide);
  split_product(threads, m, n, m, s.g_inverse, s.product, s.sums, ahead,
                [&](int64_t row, int64_t column, int64_t rows, int64_t columns, const float* block) {
                  s.dots[row / kSplitSide * across + column / kSplitSide] =
                      store_block(v, u, n, row, column, rows, columns, block);
                });
  float dot = 0.0f;
  for (int64_t block = 0; block < ceil_div(m, kSplitSide) * across; ++block) dot += s.dots[block];
  return dot;
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
