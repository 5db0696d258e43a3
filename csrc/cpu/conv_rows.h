// The patches of a convolution, gathered straight from its input: nothing larger than a panel is ever materialised.
#pragma once

#include "../ops.h"
#include "convert.h"
#include "isa.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

struct Range {
  int64_t begin, end;

  int64_t length() const { return max(0, end - begin); }
  Range within(Range other) const { return {max(begin, other.begin), min(end, other.end)}; }
};

// Where coordinate `i` of the padded input lies in an axis of `size` elements; -1 means a padded zero.
inline int64_t padded_index(int64_t i, int64_t size, PaddingMode mode) {
  if (i >= 0 && i < size) return i;
  switch (mode) {
    case PaddingMode::zeros:
      return -1;
    case PaddingMode::replicate:
      return i < 0 ? 0 : size - 1;
    case PaddingMode::circular:
      return (i % size + size) % size;
    case PaddingMode::reflect: {
      const int64_t period = max(1, 2 * (size - 1));
      const int64_t phase = (i % period + period) % period;
      return phase < size ? phase : period - phase;
    }
  }
  return -1;
}

// Rows packed at a time at most: what is copied of them before it is transposed stays in the first-level cache.
constexpr int64_t kMaxCopiedRows = 192;
template <typename T>
constexpr int64_t kCopiedStride = kMaxCopiedRows + kLanes<T>;  // not a quarter page

// The outputs whose input at `offset` lies in the image: of the last axis.
inline Range outputs_inside(const Conv& conv, int64_t offset) {
  const int64_t step = conv.stride[2];
  if (step == 1) return {-offset, conv.size[2] - offset};
  return {offset < 0 ? ceil_div(-offset, step) : 0, max(0, ceil_div(conv.size[2] - offset, step))};
}

// One output line (fixed image and all output coordinates but the last) of one patch column: outputs w.begin ..
// w.end. `line` is null when the whole line lies in the padding.
template <typename T, typename Source>
inline void copy_line(const Conv& conv, const Source* line, Range w, int64_t offset, Range inside, T* out) {
  if (line == nullptr) {
    for (int64_t i = 0; i < w.length(); ++i) out[i] = T(0);
    return;
  }
  const int64_t step = conv.stride[2], stride = conv.spatial_stride[2];
  const auto copy_edge = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t index = padded_index(i * step + offset, conv.size[2], conv.mode);
      out[i - w.begin] = index < 0 ? T(0) : convert<T>(line[index * stride]);
    }
  };
  const int64_t begin = min(w.end, max(w.begin, inside.begin)), end = max(begin, min(w.end, inside.end));
  copy_edge(w.begin, begin);
  const Source* from = line + (begin * step + offset) * stride;
  T* const to = out + begin - w.begin;
  const int64_t count = end - begin;
  if (step * stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(from[i]);
  } else if (step * stride == 2) {
    for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(from[2 * i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(from[i * step * stride]);
  }
  copy_edge(end, w.end);
}

// kLanes columns, kCopiedStride apart, as rows of a panel.
template <typename T>
inline void transpose_to_panel(const T* columns, int64_t depth, T* panel) {  // [depth, kPanel], its first column
  int64_t k = 0;
  for (; k + kLanes<T> <= depth; k += kLanes<T>) {
    transpose_tile(columns + k, kCopiedStride<T>, panel + k * kPanel<T>, kPanel<T>);
  }
  for (; k < depth; ++k) {
    for (int64_t c = 0; c < kLanes<T>; ++c) panel[k * kPanel<T> + c] = columns[c * kCopiedStride<T> + k];
  }
}

// The same patches of an image without a kernel, as one long line where it lies so.
inline Conv flattened(Conv conv) {
  for (int axis = 1; axis >= 0; --axis) {
    const bool whole = conv.kernel[axis] == 1 && conv.stride[axis] == 1 && conv.out[axis] == conv.size[axis] &&
                       conv.pad[axis] == 0 && conv.kernel[2] == 1 && conv.stride[2] == 1 && conv.pad[2] == 0 &&
                       conv.out[2] == conv.size[2];
    if (!whole || conv.spatial_stride[axis] != conv.size[2] * conv.spatial_stride[2]) return conv;
    conv.out[2] = conv.size[2] *= conv.size[axis];
    conv.out[axis] = conv.size[axis] = 1;
  }
  return conv;
}

// The columns of the patch matrix in their order: channel, and kernel offset times dilation, less the padding.
class PatchColumns {
 public:
  PatchColumns(const Conv& conv, int64_t column) : conv_(conv) {
    for (int axis = 2; axis >= 0; --axis) {
      offset_[axis] = column % conv.kernel[axis];
      column /= conv.kernel[axis];
    }
    channel_ = column;
  }
  int64_t channel() const { return channel_; }
  int64_t at(int axis) const { return offset_[axis] * conv_.dilation[axis] - conv_.pad[axis]; }
  void next() {
    for (int axis = 2; axis >= 0; --axis) {
      if (++offset_[axis] < conv_.kernel[axis]) return;
      offset_[axis] = 0;
    }
    ++channel_;
  }

 private:
  const Conv& conv_;
  int64_t offset_[3], channel_;
};

// Part of an output line.
struct OutputPiece {
  Range w;
  int64_t h, d, image;
};

// Rows [first, first + depth), at most kMaxCopiedRows, and columns [begin, begin + columns) of the patch matrix, as one
// panel; zeros behind them as far as a tile reaches, and one column further.
template <typename T, typename Source>
inline void pack_patches(const Conv& given, const Source* x, int64_t first, int64_t depth, int64_t begin,
                         int64_t columns, T* panel) {  // [depth, kPanel]
  const Conv conv = flattened(given);
  const int64_t* out = conv.out;
  OutputPiece pieces[kMaxCopiedRows];
  int64_t count = 0;
  OutputPiece piece = {{first % out[2], 0},
                       first / out[2] % out[1],
                       first / (out[2] * out[1]) % out[0],
                       first / (out[2] * out[1] * out[0])};
  for (int64_t k = 0; k < depth; k += piece.w.length(), piece.w.begin = 0) {
    if (k > 0 && ++piece.h == out[1]) {
      piece.h = 0;
      if (++piece.d == out[0]) piece.d = 0, ++piece.image;
    }
    piece.w.end = min(out[2], piece.w.begin + depth - k);
    pieces[count++] = piece;
  }

  alignas(64) T copy[kLanes<T> * kCopiedStride<T>];
  PatchColumns column(conv, begin);
  for (int64_t group = 0; group < columns; group += kLanes<T>) {
    for (int64_t c = 0; c < kLanes<T>; ++c) {
      T* to = copy + c * kCopiedStride<T>;
      if (group + c >= columns) {
        for (int64_t k = 0; k < depth; ++k) to[k] = T(0);
        continue;
      }
      const Source* channel = x + column.channel() * conv.channel_stride;
      const Range inside = outputs_inside(conv, column.at(2));
      for (int64_t i = 0; i < count; ++i) {
        const OutputPiece& here = pieces[i];
        const int64_t y = padded_index(here.h * conv.stride[1] + column.at(1), conv.size[1], conv.mode);
        const int64_t z = padded_index(here.d * conv.stride[0] + column.at(0), conv.size[0], conv.mode);
        const Source* line =
            channel + here.image * conv.batch_stride + z * conv.spatial_stride[0] + y * conv.spatial_stride[1];
        copy_line(conv, y >= 0 && z >= 0 ? line : nullptr, here.w, column.at(2), inside, to);
        to += here.w.length();
      }
      column.next();
    }
    transpose_to_panel(copy, depth, panel + group);
  }
  const int64_t last = min(kPanel<T>, max(round_up(columns + 1, kLanes<T>), round_up(columns + 1, kTileRows<T>)));
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = round_up(columns, kLanes<T>); c < last; ++c) panel[k * kPanel<T> + c] = T(0);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
