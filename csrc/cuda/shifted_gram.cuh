// How X^T X of a stride-1 convolution splits into products of shifted images.
//
// Block (a, b) of X^T X, a and b kernel offsets, sums x(q) x(q + (b - a) dilation)^T over the pixels q of a's window.
// All windows of one shift b - a share a box of pixels, the core, whose product is made once for all of them; what else
// a window has, its border, is a product of its own. Where padding is zero, pixels that it would multiply belong to no
// window: borders are then a pixel or two wide, and most shifts have none. Nothing is subtracted, so nothing cancels.
// A 3 x 3 kernel takes 13 products of the channels over the image and borders, where its patches take 45.
#pragma once

#include "rows.cuh"

namespace kfac_fast {

constexpr int kMaxShiftedOffsets = 27;  // of the kernel: the last step keeps all blocks of a few channels

// Pixels along one axis of the padded input: of a window and of its shift's core, which lies inside.
struct ShiftedAxis {
  int window, window_length, core, core_length;
};

__host__ __device__ inline ShiftedAxis shifted_axis(const Conv& conv, int axis, int shift, int offset) {
  const int kernel = static_cast<int>(conv.kernel[axis]), dilation = static_cast<int>(conv.dilation[axis]);
  const int out = static_cast<int>(conv.out[axis]), pad = static_cast<int>(conv.pad[axis]);
  const int padded = out + (kernel - 1) * dilation, move = shift * dilation;
  // Pixels that are not a padded zero, nor moved to one.
  const bool zeros = conv.mode == PaddingMode::zeros;
  const int first = zeros ? pad : 0, last = zeros ? min(padded, pad + static_cast<int>(conv.size[axis])) : padded;
  const int low = max(first, first - move), high = min(last, last - move);
  const int least = max(0, -shift), most = min(kernel, kernel - shift) - 1;  // offsets with this shift
  const int window = max(offset * dilation, low), core = max(most * dilation, low);
  return {window, min(offset * dilation + out, high) - window, core, min(least * dilation + out, high) - core};
}

// A set of pixels of every image: a core, or the border of a window. A border is cut into three parts, by the first
// axis in which the pixel is outside of the core.
struct ShiftedRegion {
  ShiftedAxis axis[3];
  int core;       // 0 or 1; a whole word, because vectors of words are read
  int row, lead;  // pixels in a row of a core, and those before its own

  __host__ __device__ ShiftedRegion(const Conv& conv, const int (&shift)[3], const int (&offset)[3], bool core_)
      : core(core_), lead(0) {
    for (int i = 0; i < 3; ++i) axis[i] = shifted_axis(conv, i, shift[i], offset[i]);
    row = axis[2].core_length;
  }
  // Fills the rows of a core up with pixels that don't count, so that they begin and end where runs of `run` pixels in
  // memory do: for at most a quarter more pixels, whole sectors are read.
  __host__ __device__ void fill_up(const Conv& conv, int run) {
    const int before = (axis[2].core - static_cast<int>(conv.pad[2])) & (run - 1);
    const int filled = (before + axis[2].core_length + run - 1) & -run;
    if (core == 0 || 4 * filled > 5 * axis[2].core_length) return;
    row = filled;
    lead = before;
  }
  __host__ __device__ int length(int i, int part) const {
    return i < part    ? i == 2 ? row : axis[i].core_length
           : i == part ? axis[i].window_length - axis[i].core_length
                       : axis[i].window_length;
  }
  __host__ __device__ int pixels(int part) const { return length(0, part) * length(1, part) * length(2, part); }
  __host__ __device__ int pixels() const { return core ? pixels(3) : pixels(0) + pixels(1) + pixels(2); }

  // Place of pixel number `index` in the padded input; false if it does not count.
  __device__ bool pixel(int index, int (&q)[3]) const {
    int part = core ? 3 : 0;
    while (part < 2 && index >= pixels(part)) index -= pixels(part++);
#pragma unroll
    for (int i = 2; i >= 0; --i) {
      const int n = length(i, part), at = index % n;
      index /= n;
      const bool behind = i == part && at >= axis[i].core - axis[i].window;
      q[i] = (i < part ? axis[i].core : axis[i].window) + at + (behind ? axis[i].core_length : 0);
    }
    q[2] -= lead;
    return core == 0 || (q[2] >= axis[2].core && q[2] < axis[2].core + axis[2].core_length);
  }
};

// The products of one convolution, and where in its scratch memory they go: tiles [side, side] of channels by channels,
// one after the other; first those of every chunk of the cores, then those of every chunk of the borders. Shift 0 has
// lower tiles only, and the bias as a channel of ones.
struct ShiftedShape {
  int kernel[3];
  int offsets, shifts, channels, ones, tiles, zero_pairs;

  __host__ __device__ ShiftedShape(const Conv& conv, bool bias, int side)
      : channels(static_cast<int>(conv.channels)), ones(bias), tiles((channels + side - 1) / side) {
    for (int i = 0; i < 3; ++i) kernel[i] = static_cast<int>(conv.kernel[i]);
    offsets = kernel[0] * kernel[1] * kernel[2];
    shifts = ((2 * kernel[0] - 1) * (2 * kernel[1] - 1) * (2 * kernel[2] - 1) + 1) / 2;
    zero_pairs = lower_pairs((channels + ones + side - 1) / side);
  }
  __host__ __device__ int core_items() const { return zero_pairs + (shifts - 1) * tiles * tiles; }
  __host__ __device__ int border_items() const {
    return offsets * zero_pairs + lower_pairs(offsets - 1) * tiles * tiles;
  }
  // Items of tile (i, j) of a shift, and of a window: that of offset a, for the block (a, b), a <= b.
  __device__ int core_item(int shift, int i, int j) const {
    return shift == 0 ? lower_pairs(i) + j : zero_pairs + ((shift - 1) * tiles + i) * tiles + j;
  }
  __device__ int border_item(int a, int b, int i, int j) const {
    return a == b ? a * zero_pairs + lower_pairs(i) + j
                  : offsets * zero_pairs + ((lower_pairs(b - 1) + a) * tiles + i) * tiles + j;
  }

  __host__ __device__ void offset(int number, int (&a)[3]) const {
    for (int i = 2; i >= 0; --i) {
      a[i] = number % kernel[i];
      number /= kernel[i];
    }
  }
  // Shifts are numbered in lexicographic order from 0 on.
  __host__ __device__ void shift(int number, int (&d)[3]) const {
    number += shifts - 1;
    for (int i = 2; i >= 0; --i) {
      d[i] = number % (2 * kernel[i] - 1) - (kernel[i] - 1);
      number /= 2 * kernel[i] - 1;
    }
  }
  __host__ __device__ int shift_number(const int (&d)[3]) const {
    return (d[0] * (2 * kernel[1] - 1) + d[1]) * (2 * kernel[2] - 1) + d[2];
  }
};

// How a convolution's update is cut; chunks == 0: not in this way.
struct ShiftedChunks {
  int chunks = 0, border_chunks = 0;
};

// Whether the formula holds and pays: no weights, cores that are not empty, fewer products than `direct` multiply-adds,
// and partial products within `traffic` bytes.
inline ShiftedChunks shifted_chunks(const Rows& rows, int side, int64_t width, double direct, int64_t traffic) {
  constexpr int64_t kWantedItems = 128, kMinRows = 512, kMaxRows = 8192;
  ShiftedChunks result;
  if (rows.conv == nullptr || rows.weights != nullptr || rows.m == 0) return result;
  const Conv& conv = *rows.conv;
  if (conv.stride[0] * conv.stride[1] * conv.stride[2] != 1) return result;
  const ShiftedShape shape(conv, rows.bias, side);
  if (shape.offsets == 1 || shape.offsets > kMaxShiftedOffsets) return result;
  int64_t core_pixels = 0, border_pixels = 0, most = 0, bordered = 0;
  for (int b = 0; b < shape.offsets; ++b) {
    for (int a = 0; a <= b; ++a) {
      int from[3], to[3];
      shape.offset(a, from);
      shape.offset(b, to);
      const int d[3] = {to[0] - from[0], to[1] - from[1], to[2] - from[2]};
      const ShiftedRegion border(conv, d, from, false);
      for (const ShiftedAxis& axis : border.axis) {
        if (axis.core_length <= 0) return result;
      }
      const int64_t pixels = border.pixels();
      border_pixels += pixels;
      bordered += pixels > 0;
      most = std::max(most, pixels);
    }
  }
  for (int s = 0; s < shape.shifts; ++s) {
    int d[3];
    shape.shift(s, d);
    core_pixels += ShiftedRegion(conv, d, {0, 0, 0}, true).pixels();
  }
  const double tile = static_cast<double>(shape.tiles) * shape.tiles * side * side;
  if (static_cast<double>((core_pixels + border_pixels) * conv.batch) * tile > 0.75 * direct) return result;

  // Partial products are written once and read once.
  const int64_t bytes = 2 * width * shape.channels * shape.channels;
  const int64_t rest = traffic - bytes * bordered;
  if (rest < bytes * shape.shifts) return result;
  const int64_t wanted =
      std::min({ceil_div(kWantedItems, shape.core_items()), ceil_div(rows.m, kMinRows), rest / (bytes * shape.shifts)});
  result.chunks = static_cast<int>(std::max(wanted, ceil_div(rows.m, kMaxRows)));
  result.border_chunks = static_cast<int>(std::max<int64_t>(ceil_div(most * conv.batch, kMaxRows), 1));
  return result;
}

}  // namespace kfac_fast
