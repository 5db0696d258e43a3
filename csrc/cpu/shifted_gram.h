// X^T X of a stride-1 convolution (shifted_shape.h) with vector instructions: a few images at a time are padded and
// packed channel by channel, and each shift's products are register tiles of that packing and itself.
#pragma once

#include "conv_rows.h"
#include "microkernel.h"
#include "shifted_shape.h"
#include "support.h"
#include "symmetric_update.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kLinesPositions = 128;                   // summed before the next rows of the tile
constexpr int64_t kPackedImageBytes = int64_t{384} << 10;  // images of a chunk: about the second-level cache

template <typename T>
struct ShiftedGram : ShiftedShape {
  int64_t panels() const { return ceil_div(channels(), kPanel<T>); }
  int64_t block_numel() const { return panels() * panels() * kPanel<T> * kPanel<T>; }
  int64_t images() const {
    const int64_t bytes = positions() * panels() * kPanel<T> * static_cast<int64_t>(sizeof(T));
    return max(1, min(conv.batch, kPackedImageBytes / bytes));
  }

  int64_t packed_numel() const { return images() * positions() * panels() * kPanel<T>; }
  int64_t cells_numel() const { return span(0) * span(1) * span(2) * kPanel<T> * kPanel<T>; }
  int64_t blocks_numel() const { return pairs() * block_numel(); }
  int64_t tasks() const { return shifts() * panels() * panels(); }

  // Place of the block of sums of offsets a <= b.
  T* block(T* blocks, int64_t a, int64_t b) const { return blocks + pair_number(a, b) * block_numel(); }

  void pack_line(const Rows& rows, int64_t image, int64_t z, int64_t y, int64_t panel, T* out) const;
  void pack(const Rows& rows, int64_t first, int64_t count, T* packed, int threads) const;
  struct Tile {
    const T *a, *b;  // first operand's panel; the second's, moved by the shift
    int64_t rows;    // of channels in the tile
    int vectors;     // of channels in the tile
    int64_t images;  // packed
  };
  template <int NV>
  void sum_cell(const Tile& tile, Range z, Range y, Range x, T* out) const;
  void sum_cell(const Tile& tile, Range z, Range y, Range x, T* out) const;
  void add_tile(int64_t task, int64_t images_packed, bool fresh, const T* packed, T* cells, T* blocks) const;
};

// Line (z, y) of one image's padded input, channels of one panel: [padded(2), kPanel].
template <typename T>
inline void ShiftedGram<T>::pack_line(const Rows& rows, int64_t image, int64_t z, int64_t y, int64_t panel,
                                      T* out) const {
  const int64_t width = padded(2);
  const int64_t source_z = padded_index(z - conv.pad[0], conv.size[0], conv.mode);
  const int64_t source_y = padded_index(y - conv.pad[1], conv.size[1], conv.mode);
  with_element(rows.dtype, [&](auto element) {
    using Source = decltype(element);
    alignas(64) T copy[kLanes<T> * kCopiedStride<T>];
    for (int64_t c = 0; c < kPanel<T> && panel * kPanel<T> + c < channels(); c += kLanes<T>) {
      for (int64_t x = 0; x < width; x += kMaxCopiedRows) {
        const int64_t count = min(kMaxCopiedRows, width - x);
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          const int64_t channel = panel * kPanel<T> + c + lane;
          T* const to = copy + lane * kCopiedStride<T>;
          if (channel >= conv.channels) {
            for (int64_t i = 0; i < count; ++i) to[i] = T(channel == conv.channels && bias);
            continue;
          }
          const Source* line = nullptr;
          if (source_z >= 0 && source_y >= 0) {
            line = static_cast<const Source*>(rows.data) + image * conv.batch_stride + channel * conv.channel_stride +
                   source_z * conv.spatial_stride[0] + source_y * conv.spatial_stride[1];
          }
          copy_line(conv, line, {x, x + count}, -conv.pad[2], outputs_inside(conv, -conv.pad[2]), to);
        }
        transpose_to_panel(copy, count, out + x * kPanel<T> + c);
      }
    }
  });
}

// Images [first, first + count), padded: [panels, count, positions, kPanel].
template <typename T>
inline void ShiftedGram<T>::pack(const Rows& rows, int64_t first, int64_t count, T* packed, int threads) const {
  const int64_t lines = padded(0) * padded(1);
  parallel_for(threads, panels() * count * padded(0), [&](int64_t task, int) {
    const int64_t z = task % padded(0), image = task / padded(0) % count, panel = task / (padded(0) * count);
    for (int64_t y = 0; y < padded(1); ++y) {
      const int64_t line = (panel * count + image) * lines + z * padded(1) + y;
      pack_line(rows, first + image, z, y, panel, packed + line * padded(2) * kPanel<T>);
    }
  });
}

// One cell's sum over the packed images, a few lines at a time so that both operands come from the first-level cache.
template <typename T>
template <int NV>
inline void ShiftedGram<T>::sum_cell(const Tile& tile, Range z, Range y, Range x,
                                     T* out) const {  // [kPanel, kPanel]
  const int64_t lines = max(1, kLinesPositions / (x.end - x.begin));
  bool fresh = true;
  for (int64_t image = 0; image < tile.images; ++image) {
    for (int64_t plane = z.begin; plane < z.end; ++plane) {
      for (int64_t line = y.begin; line < y.end; line += lines) {
        for (int64_t r = 0; r < tile.rows; r += kTileRows<T>) {
          T* sums = out + r * kPanel<T>;
          Vec<T> acc[kTileRows<T>][NV] = {};
          for (int64_t at_line = line; at_line < min(line + lines, y.end); ++at_line) {
            const int64_t at = ((image * padded(0) + plane) * padded(1) + at_line) * padded(2) + x.begin;
            multiply_add<T, NV>(x.end - x.begin, tile.a + at * kPanel<T> + r, tile.b + at * kPanel<T>, acc);
          }
          KFAC_FAST_UNROLL
          for (int q = 0; q < kTileRows<T>; ++q) {
            KFAC_FAST_UNROLL
            for (int v = 0; v < NV; ++v) {
              T* place = sums + q * kPanel<T> + v * kLanes<T>;
              store(place, fresh ? acc[q][v] : load(place) + acc[q][v]);
            }
          }
        }
        fresh = false;
      }
    }
  }
}

template <typename T>
inline void ShiftedGram<T>::sum_cell(const Tile& tile, Range z, Range y, Range x, T* out) const {
  switch (tile.vectors) {
    case 1:
      return sum_cell<1>(tile, z, y, x, out);
    case 2:
      return sum_cell<2>(tile, z, y, x, out);
    default:
      return sum_cell<3>(tile, z, y, x, out);
  }
}

// One tile of kPanel x kPanel channels for one shift: the cells' sums over the packed images, then every block's
// window of cells. `fresh`: blocks are overwritten instead of added to.
template <typename T>
inline void ShiftedGram<T>::add_tile(int64_t task, int64_t images_packed, bool fresh, const T* packed,
                                     T* cells,  // [cells, kPanel, kPanel]
                                     T* blocks) const {
  constexpr int64_t kTile = kPanel<T> * kPanel<T>;
  const int64_t column = task % panels(), row = task / panels() % panels();
  int64_t d[3];
  shift(task / (panels() * panels()), d);
  const int64_t panel_stride = images_packed * positions() * kPanel<T>;
  const int64_t ahead =
      ((d[0] * conv.dilation[0] * padded(1)) + d[1] * conv.dilation[1]) * padded(2) + d[2] * conv.dilation[2];
  Tile tile;
  tile.a = packed + row * panel_stride;
  tile.b = packed + column * panel_stride + ahead * kPanel<T>;
  tile.rows = min(kPanel<T>, channels() - row * kPanel<T>);
  tile.vectors = static_cast<int>(ceil_div(min(kPanel<T>, channels() - column * kPanel<T>), kLanes<T>));
  tile.images = images_packed;

  // Only cells that some window of this shift holds.
  Range begin_offsets[3], used[3];
  for (int axis = 0; axis < 3; ++axis) {
    begin_offsets[axis] = first_offsets(axis, d[axis]);
    used[axis] = {begin_offsets[axis].begin, begin_offsets[axis].end + conv.kernel[axis] - 1};
  }
  for (int64_t i = used[0].begin; i < used[0].end; ++i) {
    for (int64_t j = used[1].begin; j < used[1].end; ++j) {
      for (int64_t k = used[2].begin; k < used[2].end; ++k) {
        sum_cell(tile, cell(0, i), cell(1, j), cell(2, k), cells + ((i * span(1) + j) * span(2) + k) * kTile);
      }
    }
  }

  int64_t offset[3], other[3];
  for (offset[0] = begin_offsets[0].begin; offset[0] < begin_offsets[0].end; ++offset[0]) {
    for (offset[1] = begin_offsets[1].begin; offset[1] < begin_offsets[1].end; ++offset[1]) {
      for (offset[2] = begin_offsets[2].begin; offset[2] < begin_offsets[2].end; ++offset[2]) {
        for (int axis = 0; axis < 3; ++axis) other[axis] = offset[axis] + d[axis];
        T* out = block(blocks, offset_number(offset), offset_number(other)) + (row * panels() + column) * kTile;
        for (int64_t place = 0; place < tile.rows * kTileVectors; ++place) {
          if (place % kTileVectors >= tile.vectors) continue;
          const int64_t x = place * kLanes<T>;
          Vec<T> sum = fresh ? Vec<T>{} : load(out + x);
          for (int64_t i = offset[0]; i < offset[0] + conv.kernel[0]; ++i) {
            for (int64_t j = offset[1]; j < offset[1] + conv.kernel[1]; ++j) {
              const T* line = cells + (i * span(1) + j) * span(2) * kTile + x;
              for (int64_t k = offset[2]; k < offset[2] + conv.kernel[2]; ++k) sum += load(line + k * kTile);
            }
          }
          store(out + x, sum);
        }
      }
    }
  }
}

// The working memory of one such update.
template <typename T>
struct ShiftedScratch {
  T* packed = nullptr;  // [panels, images, positions, kPanel]
  T* blocks = nullptr;  // [pairs, panels, panels, kPanel, kPanel]; of shifted_tiles.h, sums of all segments
};

// sum <- X^T X (lower triangle, zeros after it) on up to `threads` threads; cells_of(thread) is that thread's
// [cells, kPanel, kPanel].
template <typename T, typename Cells>
inline void shifted_gram(const Rows& rows, int threads, const ShiftedScratch<T>& s, Cells&& cells_of, T* sum,
                         Padded<T> shape) {
  const ShiftedGram<T> gram{{*rows.conv, rows.bias}};
  for (int64_t first = 0; first < rows.conv->batch; first += gram.images()) {
    const int64_t count = min(gram.images(), rows.conv->batch - first);
    gram.pack(rows, first, count, s.packed, threads);
    parallel_for(threads, gram.tasks(), [&](int64_t task, int thread) {
      gram.add_tile(task, count, first == 0, s.packed, cells_of(thread), s.blocks);
    });
  }
  constexpr int64_t kSide = kPanel<T>;
  parallel_for(threads, gram.channels(), [&](int64_t channel, int) {
    gram.write_rows(channel, sum, shape.ld(), [&](int64_t a, int64_t b, int64_t c, int64_t e) {
      const int64_t tile = c / kSide * gram.panels() + e / kSide;
      return gram.block(s.blocks, a, b)[(tile * kSide + c % kSide) * kSide + e % kSide];
    });
  });
  clear_beyond_diagonal(sum, shape);
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
