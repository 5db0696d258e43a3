// X^T X of a stride-1 convolution (shifted_shape.h) with the matrix instructions. A group of up to 32 images is packed
// a few lines at a time (pack_images.h), once for each block of channels by channels; the products of a line with those
// up to kernel - 1 lines below it, at all shifts along the row, are summed while all of them are in the second-level
// cache.
#pragma once

#include "direct_product.h"
#include "matrix_tiles.h"
#include "pack_images.h"
#include "shifted_shape.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kMinShiftedImages = 8;  // fewer would leave too much of a step empty

template <typename T>
inline bool shifted_tiles_apply(const Rows& rows) {
  return kHasMatrixTiles<T> && shifted_gram_applies(rows) && rows.conv->batch >= kMinShiftedImages &&
         rows.conv->kernel[0] == 1 && rows.conv->out[0] == 1 && rows.conv->size[0] == 1;
}

// The whole is cut into pieces: of images, lines, and positions in a line. A task sums consecutive pieces of a block of
// channels by channels. All of this depends on the shape alone, and so do results.
constexpr int64_t kShiftedTasks = 8;                     // wanted for the threads
constexpr int64_t kShiftedSums = int64_t{6} << 20;       // bytes of the sums of all tasks, if one fits
constexpr int64_t kShiftedCellBytes = int64_t{3} << 19;  // of one task
constexpr int64_t kShiftedRingBytes = int64_t{7} << 18;  // of one task, if a kernel's lines fit
constexpr int64_t kStripPositions = 64;                  // of a line
constexpr int64_t kMinBandLines = 16;
constexpr int kMaxRun = 5;             // shifts summed at a time, one tile register each
constexpr int64_t kRunPositions = 16;  // before sums join those in memory

struct ShiftedTiles : ShiftedShape {
  int parts;

  static ShiftedTiles of(const Rows& rows) { return {{*rows.conv, rows.bias}, split_parts(rows)}; }

  int64_t row_tiles() const { return column_tiles(channels()); }  // of the operand that is moved, with the ones
  int64_t tiles() const { return column_tiles(conv.channels); }
  int64_t pair_cells_numel() const { return conv.kernel[1] * span(2) * span(2) * kTileWords; }
  // Tiles of a task's channels.
  int64_t side() const {
    int64_t side = 4;
    while (side > 1 && side * side * pair_cells_numel() * 4 > kShiftedCellBytes) --side;
    return min(side, row_tiles());
  }
  int64_t row_blocks() const { return ceil_div(row_tiles(), side()); }
  int64_t blocks() const { return ceil_div(tiles(), side()); }

  int64_t groups() const { return ceil_div(conv.batch, kImages); }
  int64_t strips() const { return ceil_div(padded(2), kStripPositions); }
  int64_t bands() const {
    const int64_t wanted = ceil_div(kShiftedTasks, groups() * strips() * row_blocks() * blocks());
    return max(1, min(wanted, padded(1) / max(kMinBandLines, 4 * reach(1))));
  }
  int64_t pieces() const { return groups() * strips() * bands(); }
  int64_t segments() const {
    const int64_t wanted = ceil_div(kShiftedTasks, row_blocks() * blocks());
    return max(1, min(pieces(), min(wanted, kShiftedSums / (4 * segment_numel()))));
  }
  int64_t tasks() const { return segments() * row_blocks() * blocks(); }

  int64_t segment_numel() const { return pairs() * row_tiles() * tiles() * kTileWords; }
  int64_t strip_width() const { return ceil_div(padded(2), strips()); }
  // Lines packed at a time: an image is read a few lines in one go, where that leaves enough of the cache.
  int64_t packed_lines() const {
    const int64_t line_bytes = side() * ring_width() * step_words() * 4;
    return max(1, min(min(kAreaPositions / ring_width(), padded(1)), kShiftedRingBytes / line_bytes - reach(1)));
  }
  int64_t ring_lines() const { return reach(1) + packed_lines(); }
  int64_t ring_width() const { return min(padded(2), strip_width() + 2 * reach(2)); }
  int64_t step_words() const { return parts * kTileWords; }
  int64_t ring_words() const { return ring_lines() * side() * ring_width() * step_words(); }
  int64_t line_words() const { return side() * strip_width() * step_words(); }
  int64_t cells_numel() const { return side() * side() * pair_cells_numel(); }
  int64_t sums_numel() const { return segments() * segment_numel(); }
};

// The working memory of one thread.
struct ShiftedTileScratch {
  int32_t* ring = nullptr;  // [row tiles, lines, width, parts, kTileWords] left operands
  float* copy = nullptr;    // of one channel
  int32_t* line = nullptr;  // [tiles, width, parts, kTileWords] right operands: the line that is not moved
  float* cells = nullptr;   // [row tiles, tiles, shifts down, shifts right, cells, kTileWords] of one row of cells
};

#if defined(__AMX_BF16__)

// The products of one part of the right operand, in register 7, with one of the left operand at kRun shifts.
template <int kRun>
inline __attribute__((always_inline)) void multiply_shifts(const int32_t* left, int64_t shift) {
  _tile_loadd(5, left, 64);
  _tile_dpbf16ps(0, 5, 7);
  if constexpr (kRun > 1) {
    _tile_loadd(6, left + shift, 64);
    _tile_dpbf16ps(1, 6, 7);
  }
  if constexpr (kRun > 2) {
    _tile_loadd(5, left + 2 * shift, 64);
    _tile_dpbf16ps(2, 5, 7);
  }
  if constexpr (kRun > 3) {
    _tile_loadd(6, left + 3 * shift, 64);
    _tile_dpbf16ps(3, 6, 7);
  }
  if constexpr (kRun > 4) {
    _tile_loadd(5, left + 4 * shift, 64);
    _tile_dpbf16ps(4, 5, 7);
  }
}

// out[r] = sum over `count` positions of left, moved r times by `shift` words, times right.
template <int kParts, int kRun>
inline void sum_run(int64_t count, const int32_t* left, const int32_t* right, int64_t shift,
                    float* out) {  // [kRun, kTileWords]
  static_assert(kMaxRun == 5 && kRun <= kMaxRun);
  _tile_zero(0);
  if constexpr (kRun > 1) _tile_zero(1);
  if constexpr (kRun > 2) _tile_zero(2);
  if constexpr (kRun > 3) _tile_zero(3);
  if constexpr (kRun > 4) _tile_zero(4);
  for (int64_t p = 0; p < count; ++p) {
    KFAC_FAST_UNROLL
    for (int part = kParts - 1; part >= 0; --part) {  // the products that split_float.h names
      _tile_loadd(7, right + part * kTileWords, 64);
      KFAC_FAST_UNROLL
      for (int other = 0; other < (kParts == 3 ? kParts - part : kParts); ++other) {
        multiply_shifts<kRun>(left + other * kTileWords, shift);
      }
    }
    left += kStepWords<kParts>;
    right += kStepWords<kParts>;
  }
  _tile_stored(0, out, 64);
  if constexpr (kRun > 1) _tile_stored(1, out + kTileWords, 64);
  if constexpr (kRun > 2) _tile_stored(2, out + 2 * kTileWords, 64);
  if constexpr (kRun > 3) _tile_stored(3, out + 3 * kTileWords, 64);
  if constexpr (kRun > 4) _tile_stored(4, out + 4 * kTileWords, 64);
}

// One task: block (row block, block) of all sums of one segment.
template <int kParts>
class ShiftedTask {
 public:
  ShiftedTask(const Rows& rows, const ShiftedTiles& shape, int64_t task, const ShiftedTileScratch& scratch, float* sums)
      : rows_(rows), shape_(shape), s_(scratch) {
    const int64_t side = shape.side();
    const int64_t column = task % shape.blocks(), row = task / shape.blocks() % shape.row_blocks();
    segment_ = task / (shape.blocks() * shape.row_blocks());
    row_tiles_ = {row * side, min((row + 1) * side, shape.row_tiles())};
    tiles_ = {column * side, min((column + 1) * side, shape.tiles())};
    sums_ = sums + segment_ * shape.segment_numel();
  }

  void run() {
    const TileRegisters registers;
    clear();
    const int64_t pieces = shape_.pieces(), segments = shape_.segments();
    for (int64_t piece = segment_ * pieces / segments; piece < (segment_ + 1) * pieces / segments; ++piece) {
      const int64_t strip = piece % shape_.strips(), band = piece / shape_.strips() % shape_.bands();
      const int64_t group = piece / (shape_.strips() * shape_.bands());
      const int64_t height = shape_.padded(1), width = shape_.strip_width();
      x_ = Range{strip * width, (strip + 1) * width}.within({0, shape_.padded(2)});
      ring_x_ = Range{x_.begin - shape_.reach(2), x_.end + shape_.reach(2)}.within({0, shape_.padded(2)});
      const Conv& conv = shape_.conv;
      const ImageGroup images{rows_, group * kImages, min(kImages, conv.batch - group * kImages)};
      add_piece(images, {band * height / shape_.bands(), (band + 1) * height / shape_.bands()});
    }
  }

 private:
  void clear() {
    for (int64_t i = 0; i < shape_.cells_numel(); i += kTileSide) store(s_.cells + i, Vec<float>{});
    for (int64_t pair = 0; pair < shape_.pairs(); ++pair) {
      for (int64_t row = row_tiles_.begin; row < row_tiles_.end; ++row) {
        float* to = sum_of(pair, row, tiles_.begin);
        for (int64_t i = 0; i < tiles_.length() * kTileWords; i += kTileSide) store(to + i, Vec<float>{});
      }
    }
  }

  float* sum_of(int64_t pair, int64_t row, int64_t tile) const {
    return sums_ + ((pair * shape_.row_tiles() + row) * shape_.tiles() + tile) * kTileWords;
  }

  int32_t* ring(int64_t y, int64_t row, int64_t x) const {
    const int64_t at = (row - row_tiles_.begin) * shape_.ring_lines() + y % shape_.ring_lines();
    return s_.ring + (at * shape_.ring_width() + x - ring_x_.begin) * kStepWords<kParts>;
  }

  int32_t* line(int64_t tile, int64_t x) const {
    return s_.line + ((tile - tiles_.begin) * shape_.strip_width() + x - x_.begin) * kStepWords<kParts>;
  }

  float* cell(int64_t row, int64_t tile, int64_t down, int64_t right, int64_t index) const {
    const int64_t pair = (row - row_tiles_.begin) * shape_.side() + tile - tiles_.begin, k = shape_.conv.kernel[2];
    const int64_t at = (pair * shape_.conv.kernel[1] + down) * shape_.span(2) + right + k - 1;
    return s_.cells + (at * shape_.span(2) + index) * kTileWords;
  }

  // Lines [begin, end) of a group's padded images times those below them.
  void add_piece(const ImageGroup& images, Range lines) {
    const Conv& conv = shape_.conv;
    const bool zeros = conv.mode == PaddingMode::zeros;
    // Where the operand that is not moved lies in padded zeros, nothing is summed: its products with what is not
    // finite are zeros too.
    const Range inside = zeros ? x_.within({conv.pad[2], conv.pad[2] + conv.size[2]}) : x_;
    const int64_t needed = min(lines.end + shape_.reach(1), shape_.padded(1));
    int64_t packed = lines.begin;
    for (int64_t index = 0; index < shape_.span(1); ++index) {
      const Range here = shape_.cell(1, index).within(lines);
      bool summed = false;
      for (int64_t y = here.begin; y < here.end; ++y) {
        while (packed <= min(y + shape_.reach(1), needed - 1)) {
          const Range next = {packed, min(packed + shape_.packed_lines(), min(y + shape_.ring_lines(), needed))};
          for (int64_t row = row_tiles_.begin; row < row_tiles_.end; ++row) pack_ring(images, row, next);
          packed = next.end;
        }
        if (zeros && images.in_padding(y)) continue;
        pack_line(images, y, inside);
        finish_stores();
        for (int64_t down = 0; down < conv.kernel[1] && index <= 2 * conv.kernel[1] - 2 - down; ++down) {
          if (zeros && images.in_padding(y + down * conv.dilation[1])) continue;
          for (int64_t row = row_tiles_.begin; row < row_tiles_.end; ++row) {
            for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) add_line(y, down, row, tile, inside);
          }
        }
        summed = true;
      }
      if (summed) add_cells(index);
    }
  }

  void pack_ring(const ImageGroup& images, int64_t row, Range lines) {
    for (int64_t x = ring_x_.begin; x < ring_x_.end; x += kAreaPositions) {
      const Area area = {lines, Range{x, x + kAreaPositions}.within(ring_x_)};
      int32_t* words[kAreaPositions];
      int64_t p = 0;
      for (int64_t y = lines.begin; y < lines.end; ++y) {
        for (int64_t at = area.x.begin; at < area.x.end; ++at) words[p++] = ring(y, row, at);
      }
      images.pack<kParts>(row, area, words, s_.copy);
    }
  }

  // The right operands, left ones transposed.
  void pack_line(const ImageGroup& images, int64_t y, Range inside) {
    for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) {
      const bool there = tile >= row_tiles_.begin && tile < row_tiles_.end;
      for (int64_t x = inside.begin; x < inside.end; x += kTileSide) {
        const Range piece = {x, min(x + kTileSide, inside.end)};
        alignas(64) int32_t packed[kTileSide * kStepWords<kParts>];
        if (!there) {
          int32_t* words[kTileSide];
          for (int64_t p = 0; p < kTileSide; ++p) words[p] = packed + p * kStepWords<kParts>;
          images.pack<kParts>(tile, {{y, y + 1}, piece}, words, s_.copy);
        }
        const int32_t* from = there ? ring(y, tile, x) : packed;
        int32_t* to = line(tile, x);
        for (int64_t i = 0; i < piece.length() * kStepWords<kParts>; i += kTileWords) transpose_words(from + i, to + i);
      }
    }
  }

  // Of ones only products with the same position are asked for.
  bool only_ones(int64_t row) const { return row * kTileSide == shape_.conv.channels; }

  // The products of one line with the one `down` below it.
  void add_line(int64_t y, int64_t down, int64_t row, int64_t tile, Range inside) {
    const int64_t k = shape_.conv.kernel[2], step = shape_.conv.dilation[2];
    if (only_ones(row) && down > 0) return;
    for (int64_t index = 0; index < shape_.span(2); ++index) {
      const Range x = shape_.cell(2, index).within(inside);
      if (x.begin >= x.end) continue;
      const int64_t last = only_ones(row) ? 0 : min(k - 1, 2 * k - 2 - index);
      int64_t right = down == 0 ? 0 : max(1 - k, -index);
      while (right <= last) {
        const int64_t left_over = last - right + 1;
        const int64_t run = left_over <= kMaxRun ? left_over : min(kMaxRun, ceil_div(left_over, 2));
        with_constant<kMaxRun>(static_cast<int>(run), [&](auto length) {
          constexpr int kRun = decltype(length)::value;
          add_run<kRun>(x, line(tile, x.begin), ring(y + down * shape_.conv.dilation[1], row, x.begin + right * step),
                        step * kStepWords<kParts>, cell(row, tile, down, right, index));
        });
        right += run;
      }
    }
  }

  template <int kRun>
  void add_run(Range x, const int32_t* right, const int32_t* left, int64_t shift, float* cells) const {
    alignas(64) float out[kRun * kTileWords];
    const int64_t next = shape_.span(2) * kTileWords;
    for (int64_t count = x.length(); count > 0;) {
      const int64_t now = count <= kRunPositions ? count : min(kRunPositions, ceil_div(count, 2));
      sum_run<kParts, kRun>(now, left, right, shift, out);
      finish_stores();
      KFAC_FAST_UNROLL
      for (int r = 0; r < kRun; ++r) {
        for (int64_t i = 0; i < kTileWords; i += kTileSide) {
          store(cells + r * next + i, load(cells + r * next + i) + load(out + r * kTileWords + i));
        }
      }
      left += now * kStepWords<kParts>;
      right += now * kStepWords<kParts>;
      count -= now;
    }
  }

  // Row `index` of the grid of cells joins the windows that hold it, and is zero again.
  void add_cells(int64_t index) {
    const int64_t* kernel = shape_.conv.kernel;
    for (int64_t row = row_tiles_.begin; row < row_tiles_.end; ++row) {
      for (int64_t tile = tiles_.begin; tile < tiles_.end; ++tile) {
        for (int64_t down = 0; down < kernel[1] && index <= 2 * kernel[1] - 2 - down; ++down) {
          const Range above = shape_.first_offsets(1, down).within({index - kernel[1] + 1, index + 1});
          for (int64_t right = down == 0 ? 0 : 1 - kernel[2]; right < kernel[2]; ++right) {
            if (only_ones(row) && (down > 0 || right > 0)) continue;
            const Range before = shape_.first_offsets(2, right);
            for (int64_t a = before.begin; a < before.end; ++a) {
              add_window(cell(row, tile, down, right, a), row, tile, above, a, down, right);
            }
            float* cells = cell(row, tile, down, right, 0);
            for (int64_t i = 0; i < shape_.span(2) * kTileWords; i += kTileSide) store(cells + i, Vec<float>{});
          }
        }
      }
    }
  }

  // Cells of a window along the row, to all offsets (above, a) whose windows hold this row of them.
  void add_window(const float* cells, int64_t row, int64_t tile, Range above, int64_t a, int64_t down, int64_t right) {
    const int64_t* kernel = shape_.conv.kernel;
    alignas(64) float total[kTileWords];
    for (int64_t i = 0; i < kTileWords; i += kTileSide) {
      Vec<float> sum = load(cells + i);
      for (int64_t x = 1; x < kernel[2]; ++x) sum += load(cells + x * kTileWords + i);
      store(total + i, sum);
    }
    for (int64_t z = above.begin; z < above.end; ++z) {
      const int64_t first = z * kernel[2] + a, second = (z + down) * kernel[2] + a + right;
      float* to = sum_of(shape_.pair_number(first, second), row, tile);
      for (int64_t i = 0; i < kTileWords; i += kTileSide) store(to + i, load(to + i) + load(total + i));
    }
  }

  const Rows& rows_;
  const ShiftedTiles& shape_;
  const ShiftedTileScratch& s_;
  Range row_tiles_, tiles_;  // of channels
  Range x_, ring_x_;         // positions in a line: summed, and packed for the moved operand
  int64_t segment_;
  float* sums_;
};

// sum <- X^T X (lower triangle, zeros after it) on up to `threads` threads. sums: [ShiftedTiles::sums_numel()].
template <typename ScratchOf>
inline void shifted_gram_by_tiles(const Rows& rows, int threads, ScratchOf&& scratch_of, float* sums, float* sum,
                                  Padded<float> padded) {
  const ShiftedTiles shape = ShiftedTiles::of(rows);
  parallel_for(threads, shape.tasks(), [&](int64_t task, int thread) {
    const ShiftedTileScratch& scratch = scratch_of(thread);
    if (shape.parts == 1) {
      ShiftedTask<1>(rows, shape, task, scratch, sums).run();
    } else if (shape.parts == 2) {
      ShiftedTask<2>(rows, shape, task, scratch, sums).run();
    } else {
      ShiftedTask<3>(rows, shape, task, scratch, sums).run();
    }
  });
  parallel_for(threads, shape.segments() > 1 ? shape.pairs() : 0, [&](int64_t pair, int) {
    const int64_t length = shape.segment_numel() / shape.pairs();
    for (int64_t i = pair * length; i < (pair + 1) * length; i += kTileSide) {
      Vec<float> total = load(sums + i);
      for (int64_t s = 1; s < shape.segments(); ++s) total += load(sums + s * shape.segment_numel() + i);
      store(sums + i, total);
    }
  });
  parallel_for(threads, shape.channels(), [&](int64_t channel, int) {
    shape.write_rows(channel, sum, padded.ld(), [&](int64_t a, int64_t b, int64_t c, int64_t e) {
      // The moved operand's channels are rows. The ones are there alone, and with them it does not matter which moves.
      const int64_t row = c == shape.conv.channels ? c : e, column = c == shape.conv.channels ? e : c;
      const int64_t tile = row / kTileSide * shape.tiles() + column / kTileSide;
      const int64_t place = (shape.pair_number(a, b) * shape.row_tiles() * shape.tiles() + tile) * kTileWords;
      return sums[place + row % kTileSide * kTileSide + column % kTileSide];
    });
  });
  clear_beyond_diagonal(sum, padded);
}

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
