// C <- decay C + scale X^T X for many blocks. X is packed a few hundred rows at a time into panels that stay in the
// cache, S = X^T X gathers in the workspace, and one last pass over the block folds S into C, mirrors it and takes the
// trace and the finite flag. Limit: multiply-adds for n >= 64 or so, reading X below.
#include "direct_update.h"
#include "kernels.h"
#include "matrix_tiles.h"
#include "pack.h"
#include "shifted_gram.h"
#include "shifted_tiles.h"
#include "support.h"
#include "symmetric_update.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {
namespace {

// Long thin X are cut into segments of rows with sums of their own: work for several threads, and shorter sums. The
// cut depends on the shape alone, so that results do not depend on the number of threads.
constexpr int64_t kSegmentRows = 2048;
constexpr int64_t kMaxSegments = 8;
constexpr int64_t kMaxSegmentedSize = 512;

// A block of this many multiply-adds is worth the attention of all threads (about half a millisecond of one).
constexpr int64_t kTeamWork = int64_t{1} << 25;
// Fewer tasks than this, and than threads, leave too many of them idle: such a block is one thread's.
constexpr int64_t kTeamTasks = 4;

constexpr int64_t kFoldRows = 32;

struct Shape {
  int64_t m, n;
  bool shifted;   // a convolution that needs no patches (shifted_gram.h, shifted_tiles.h)
  bool tiles;     // for the matrix instructions (matrix_tiles.h)
  int64_t tasks;  // that a team can share, if they are few

  int64_t segments() const {
    return n <= kMaxSegmentedSize && !shifted ? max(1, min(m / kSegmentRows, kMaxSegments)) : 1;
  }
  template <typename T>
  int64_t sum_numel() const {  // of one segment
    return tiles ? max(tile_sum_numel(n), Padded<T>{n}.numel()) : Padded<T>{n}.numel();
  }
  int64_t segment_rows() const { return ceil_div(m, segments()); }
  bool for_team(int threads) const {
    return threads > 1 && m * n * n >= kTeamWork && tasks >= min(threads, kTeamTasks);
  }
};

// Rows packed at a time: a panel of this depth and a tile's rows fit the first-level cache.
template <typename T>
constexpr int64_t kChunkRows = sizeof(T) == 4 ? kMaxCopiedRows : kMaxCopiedRows / 2;

template <typename T>
struct Scratch {
  T* sum = nullptr;           // padded [n, n], and as many again as segments are summed side by side
  T* panels = nullptr;        // [panels, kChunkRows, kPanel]
  T* root_weights = nullptr;  // [kChunkRows]
  ShiftedScratch<T> shifted;
  T* cells = nullptr;  // of shifted_gram.h and shifted_tiles.h
  ShiftedTileScratch shifted_tiles;
  TileScratch tiles;
};

template <typename T>
Shape shape_of(const FactorUpdate& op, int block) {
  const Rows& rows = op.rows[block];
  const int64_t tasks = shifted_tiles_apply<T>(rows) ? ShiftedTiles::of(rows).tasks() : kTeamTasks;
  return {rows.m, op.plan.size(block), shifted_gram_applies(rows), matrix_tiles_apply<T>(rows), tasks};
}

// sum <- X^T X over rows [begin, end), by one thread.
template <typename T>
void gram(const Rows& rows, int64_t begin, int64_t end, Padded<T> shape, const Scratch<T>& scratch, T* sum) {
  if constexpr (kHasMatrixTiles<T>) {
    if (matrix_tiles_apply<T>(rows)) return gram_by_tiles(rows, begin, end, 0, 1, scratch.tiles, sum);
  }
  Ahead nothing;
  for (int64_t first = begin; first < end || first == begin; first += kChunkRows<T>) {
    const int64_t depth = min(kChunkRows<T>, end - first);
    const T* weights = root_weights(rows, first, depth, scratch.root_weights);
    for (int64_t p = 0; p < shape.panels(); ++p) {
      pack_rows(rows, first, depth, p, weights, scratch.panels + p * depth * kPanel<T>);
    }
    if (first == begin) {
      symmetric_update<T, Store::assign>(depth, scratch.panels, sum, shape, nothing);
    } else {
      symmetric_update<T, Store::add>(depth, scratch.panels, sum, shape, nothing);
    }
  }
}

// The same by all threads: panels are packed, then tiles updated, side by side.
template <typename T>
void gram_by_team(const Rows& rows, int threads, Padded<T> shape, const Scratch<T>* all, T* sum) {
  if constexpr (kHasMatrixTiles<T>) {
    if (matrix_tiles_apply<T>(rows)) {
      return parallel_for(threads, threads, [&](int64_t share, int thread) {
        gram_by_tiles(rows, 0, rows.m, static_cast<int>(share), threads, all[thread].tiles, sum);
      });
    }
  }
  const Scratch<T>& scratch = all[0];
  for (int64_t first = 0; first < rows.m; first += kChunkRows<T>) {
    const int64_t depth = min(kChunkRows<T>, rows.m - first);
    const T* weights = root_weights(rows, first, depth, scratch.root_weights);
    parallel_for(threads, shape.panels(), [&](int64_t p, int) {
      pack_rows(rows, first, depth, p, weights, scratch.panels + p * depth * kPanel<T>);
    });
    parallel_for(threads, symmetric_strips<T>(shape.n), [&](int64_t strip, int) {
      if (first == 0) {
        symmetric_update_strip<T, Store::assign>(strip, depth, scratch.panels, sum, shape);
      } else {
        symmetric_update_strip<T, Store::add>(strip, depth, scratch.panels, sum, shape);
      }
    });
  }
}

// Rows [begin, end) of C <- decay C + scale S, mirrored. Returns whether S has a NaN or an infinity in these rows.
template <typename T>
bool fold(T* c, int64_t n, const T* sum, int64_t ld, int64_t begin, int64_t end, T decay, T scale) {
  Vec<T> poison = {};  // s - s is 0, or NaN for every non-finite s
  for (int64_t i = begin; i < end; ++i) {
    const T* s = sum + i * ld;
    T* row = c + i * n;
    // The last vector may reach past the diagonal, where tiles hold entries of X^T X again, or zeros past column n.
    for (int64_t j = 0; j <= i; j += kLanes<T>) poison += load(s + j) - load(s + j);
    if (decay == T(0)) {  // as in BLAS, nothing of the old C survives, NaNs included
      for (int64_t j = 0; j <= i; ++j) row[j] = scale * s[j];
    } else {
      for (int64_t j = 0; j <= i; ++j) row[j] = decay * row[j] + scale * s[j];
    }
  }
  mirror_rows(c, n, begin, end);
  bool finite = true;
  for (int lane = 0; lane < kLanes<T>; ++lane) finite &= poison[lane] == T(0);
  return !finite;
}

template <typename T>
void set_trace(const FactorUpdate& op, int block) {
  const int64_t n = op.plan.size(block);
  const T* c = static_cast<const T*>(op.factors) + op.plan.offset(block);
  T trace = T(0);
  for (int64_t i = 0; i < n; ++i) trace += c[i * n + i];
  static_cast<T*>(op.trace)[block] = trace;
}

template <typename T>
void finish(const FactorUpdate& op, int block, const T* sum, int threads) {
  const int64_t n = op.plan.size(block);
  T* c = static_cast<T*>(op.factors) + op.plan.offset(block);
  const T decay = static_cast<const T*>(op.decay)[block];
  const T scale = static_cast<const T*>(op.scale)[block];
  op.nonfinite[block] = 0;
  parallel_for(threads, ceil_div(n, kFoldRows), [&](int64_t strip, int) {
    const int64_t begin = strip * kFoldRows;
    if (fold(c, n, sum, Padded<T>{n}.ld(), begin, min(begin + kFoldRows, n), decay, scale)) {
      __atomic_store_n(&op.nonfinite[block], 1, __ATOMIC_RELAXED);
    }
  });
  set_trace<T>(op, block);
}

// The lower triangles of `count` sums, one behind the other, join the first in their order.
template <typename T>
void add_segments(T* sum, int64_t count, Padded<T> shape, int64_t stride, int threads) {
  parallel_for(threads, ceil_div(shape.n, kFoldRows), [&](int64_t strip, int) {
    const int64_t end = min((strip + 1) * kFoldRows, shape.n);
    for (int64_t segment = 1; segment < count; ++segment) {
      for (int64_t i = strip * kFoldRows; i < end; ++i) {
        T* total = sum + i * shape.ld();
        const T* part = total + segment * stride;
        for (int64_t j = 0; j <= i; j += kLanes<T>) store(total + j, load(total + j) + load(part + j));
      }
    }
  });
}

// What a block's update will read; nothing if there is no such block.
template <typename T>
Ahead memory_of(const FactorUpdate& op, int block) {
  Ahead ahead;
  if (block < 0 || op.rows[block].conv != nullptr) return ahead;
  const Rows& rows = op.rows[block];
  const int64_t n = op.plan.size(block);
  ahead.add(rows.data, rows.m * rows.d * static_cast<int64_t>(sizeof(T)));
  ahead.add(static_cast<const T*>(op.factors) + op.plan.offset(block), n * n * static_cast<int64_t>(sizeof(T)));
  return ahead;
}

// sum <- X^T X of a convolution that needs no patches; `scratch` of every thread.
template <typename T>
void shifted_sum(const Rows& rows, int threads, const Scratch<T>* scratch, T* sum, Padded<T> padded) {
  if constexpr (kHasMatrixTiles<T>) {
    if (shifted_tiles_apply<T>(rows)) {
      const auto scratch_of = [&](int thread) -> const ShiftedTileScratch& { return scratch[thread].shifted_tiles; };
      return shifted_gram_by_tiles(rows, threads, scratch_of, scratch[0].shifted.blocks, sum, padded);
    }
  }
  shifted_gram(rows, threads, scratch[0].shifted, [&](int thread) { return scratch[thread].cells; }, sum, padded);
}

template <typename T>
void update_block(const FactorUpdate& op, int block, int next, const Scratch<T>& scratch) {
  const Rows& rows = op.rows[block];
  if (direct_update_applies<T>(rows)) {
    Ahead ahead = memory_of<T>(op, next);
    op.nonfinite[block] =
        !update_direct(rows, static_cast<const T*>(op.decay)[block], static_cast<const T*>(op.scale)[block],
                       static_cast<T*>(op.factors) + op.plan.offset(block), op.plan.size(block), ahead);
    return set_trace<T>(op, block);
  }
  const Shape shape = shape_of<T>(op, block);
  const Padded<T> padded{shape.n};
  if (shape.shifted) {
    shifted_sum(rows, 1, &scratch, scratch.sum, padded);
    return finish(op, block, scratch.sum, 1);
  }
  const int64_t step = shape.segment_rows();
  gram(rows, 0, min(step, shape.m), padded, scratch, scratch.sum);
  for (int64_t segment = 1; segment < shape.segments(); ++segment) {
    const int64_t stride = shape.sum_numel<T>();
    gram(rows, segment * step, min((segment + 1) * step, shape.m), padded, scratch, scratch.sum + stride);
    add_segments(scratch.sum, 2, padded, stride, 1);
  }
  finish(op, block, scratch.sum, 1);
}

template <typename T>
void update_block_by_team(const FactorUpdate& op, int block, int threads, const Scratch<T>* scratch) {
  const Rows& rows = op.rows[block];
  const Shape shape = shape_of<T>(op, block);
  const Padded<T> padded{shape.n};
  T* sum = scratch[0].sum;
  if (shape.shifted) {
    shifted_sum(rows, threads, scratch, sum, padded);
  } else if (shape.segments() == 1) {
    gram_by_team(rows, threads, padded, scratch, sum);
  } else {
    const int64_t step = shape.segment_rows();
    parallel_for(threads, shape.segments(), [&](int64_t segment, int thread) {
      gram(rows, segment * step, min((segment + 1) * step, shape.m), padded, scratch[thread],
           sum + segment * shape.sum_numel<T>());
    });
    add_segments(sum, shape.segments(), padded, shape.sum_numel<T>(), threads);
  }
  finish(op, block, sum, threads);
}

// Lays out the scratch of every thread (only counting when `scratch` is null). A team shares thread 0's arrays, but
// for those that every thread fills on its own (`each`).
template <typename T>
void lay_out(const FactorUpdate& op, int threads, Arena& arena, Scratch<T>* scratch) {
  struct Sizes {
    int64_t sum = 0, panels = 0, tiles = 0, packed = 0, blocks = 0, ring = 0, copy = 0, line = 0, cells = 0;

    void include(const Sizes& other) {
      sum = max(sum, other.sum), panels = max(panels, other.panels), tiles = max(tiles, other.tiles);
      packed = max(packed, other.packed), blocks = max(blocks, other.blocks);
      ring = max(ring, other.ring), copy = max(copy, other.copy), line = max(line, other.line),
      cells = max(cells, other.cells);
    }
  };
  Sizes own, first;
  for (int block = 0; block < op.plan.count(); ++block) {
    const Shape shape = shape_of<T>(op, block);
    const bool team = shape.for_team(threads);
    Sizes sizes;
    sizes.sum = shape.sum_numel<T>();
    Sizes each;
    if (shape.shifted && shifted_tiles_apply<T>(op.rows[block])) {
      const ShiftedTiles gram = ShiftedTiles::of(op.rows[block]);
      sizes.blocks = gram.sums_numel();
      each.ring = gram.ring_words(), each.copy = kCopyNumel;
      each.line = gram.line_words(), each.cells = gram.cells_numel();
    } else if (shape.shifted) {
      const ShiftedGram<T> gram{{*op.rows[block].conv, op.rows[block].bias}};
      sizes.packed = gram.packed_numel(), sizes.blocks = gram.blocks_numel();
      each.cells = gram.cells_numel();
    } else {
      if (shape.tiles) {
        sizes.tiles = each.tiles = TileScratch::words(shape.n, split_parts(op.rows[block]));
      } else {
        sizes.panels = Padded<T>{shape.n}.panels() * kPanel<T> * kChunkRows<T>;
      }
      if (shape.segments() > 1) {
        each.panels = sizes.panels;
        sizes.sum *= team ? shape.segments() : 2;
      }
    }
    own.include(each);
    (team ? first : own).include(sizes);
  }
  first.include(own);
  for (int thread = 0; thread < threads; ++thread) {
    const Sizes& sizes = thread == 0 ? first : own;
    Scratch<T> mine;
    mine.sum = arena.take<T>(sizes.sum);
    mine.panels = arena.take<T>(sizes.panels);
    mine.root_weights = arena.take<T>(kChunkRows<T>);
    mine.shifted.packed = arena.take<T>(sizes.packed);
    mine.shifted.blocks = arena.take<T>(sizes.blocks);
    mine.cells = arena.take<T>(sizes.cells);
    mine.shifted_tiles.ring = arena.take<int32_t>(sizes.ring);
    mine.shifted_tiles.copy = arena.take<float>(sizes.copy);
    mine.shifted_tiles.line = arena.take<int32_t>(sizes.line);
    mine.shifted_tiles.cells = reinterpret_cast<float*>(mine.cells);
    mine.tiles = TileScratch::take(arena, sizes.tiles);
    if (scratch != nullptr) scratch[thread] = mine;
  }
}

template <typename T>
void run(const FactorUpdate& op, const Context& ctx) {
  const int threads = usable_threads(ctx.threads);
  Arena arena(ctx.workspace);
  auto* scratch = arena.take<Scratch<T>>(threads);
  lay_out(op, threads, arena, scratch);

  const int32_t* order = op.plan.by_decreasing_size().data();
  for (int task = 0; task < op.plan.count(); ++task) {
    const int block = order[task];
    if (shape_of<T>(op, block).for_team(threads)) update_block_by_team(op, block, threads, scratch);
  }
  parallel_for(threads, op.plan.count(), [&](int64_t task, int thread) {
    const int block = order[task];
    if (!shape_of<T>(op, block).for_team(threads)) {
      const int64_t next = task + threads;
      update_block(op, block, next < op.plan.count() ? order[next] : -1, scratch[thread]);
    }
  });
}

template <typename T>
size_t bytes_for(const FactorUpdate& op, int threads) {
  Arena arena(nullptr);
  arena.take<Scratch<T>>(threads);
  lay_out<T>(op, threads, arena, nullptr);
  return arena.used();
}

}  // namespace

WorkspaceSize factor_update_workspace(const FactorUpdate& op, const Context& ctx) {
  return workspace_for(op.dtype, ctx.threads,
                       [&](auto element, int threads) { return bytes_for<decltype(element)>(op, threads); });
}

const char* factor_update(const FactorUpdate& op, const Context& ctx) {
  with_factor_type(op.dtype, [&](auto element) { run<decltype(element)>(op, ctx); });
  return nullptr;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
