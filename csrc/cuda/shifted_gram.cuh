// How X^T X of a stride-1 convolution splits into products of shifted images.
//
// Block (a, b) of X^T X, a and b kernel offsets, sums x(q) x(q + (b - a) dilation)^T over the pixels q of a's window.
// All windows of one shift b - a share a box of pixels, the core, whose product is made once for all of them. What else
// a window has are rows that the core does not have, its border, a product of its own; and strips of columns on either
// side of the core, in its rows, whose products serve all windows that have the same strip. Where padding is zero,
// pixels that it would multiply belong to no window: borders and strips are then a pixel or two wide, and most shifts
// have none. Nothing is subtracted, so nothing cancels. A 3 x 3 kernel takes 13 products of the channels over the image
// and what is beside the cores, where its patches take 45.
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

enum class ShiftedKind : int { core, border, left, right };  // the last two are strips

// A set of pixels of every image. Rows are along the last axis. A border is cut into two parts, by the first axis in
// which the row is outside of the core.
struct ShiftedRegion {
  ShiftedAxis axis[2];
  int border;         // 0 or 1: not the core's rows; a whole word, because vectors of words are read
  int first, length;  // of a row
  int row, lead;      // pixels that a row is filled up to, and those before its own

  // Of the window of kernel offset `offset`, or of those that share the core or strip. Strips are empty where the
  // window before has the same.
  __host__ __device__ ShiftedRegion(const Conv& conv, const int (&shift)[3], const int (&offset)[3], ShiftedKind kind)
      : border(kind == ShiftedKind::border), lead(0) {
    for (int i = 0; i < 2; ++i) axis[i] = shifted_axis(conv, i, shift[i], offset[i]);
    const ShiftedAxis own = shifted_axis(conv, 2, shift[2], offset[2]);
    first = kind == ShiftedKind::core ? own.core : kind == ShiftedKind::right ? own.core + own.core_length : own.window;
    const int end = kind == ShiftedKind::core   ? own.core + own.core_length
                    : kind == ShiftedKind::left ? own.core
                                                : own.window + own.window_length;
    length = row = end - first;
    if (kind == ShiftedKind::core || kind == ShiftedKind::border) return;
    if (strip_offset(conv, shift[2], offset[2], kind) != offset[2]) length = row = 0;
  }
  // The first kernel offset along the last axis whose window has the same strip as that of `offset`.
  __host__ __device__ static int strip_offset(const Conv& conv, int shift, int offset, ShiftedKind kind) {
    const auto bound = [&](int a) {
      const ShiftedAxis own = shifted_axis(conv, 2, shift, a);
      return kind == ShiftedKind::left ? own.window : own.window + own.window_length;
    };
    const int least = max(0, -shift);
    while (offset > least && bound(offset - 1) == bound(offset)) --offset;
    return offset;
  }
  // Fills rows up with pixels that don't count, so that they begin and end where runs of `run` pixels of the image do:
  // for at most a quarter more pixels, whole sectors are read.
  __host__ __device__ void fill_up(const Conv& conv, int run) {
    const int before = ((first - static_cast<int>(conv.pad[2])) % run + run) % run;
    const int filled = (before + length + run - 1) / run * run;
    if (4 * filled > 5 * length) return;
    row = filled;
    lead = before;
  }
  __host__ __device__ int rows(int i, int part) const {
    return i < part    ? axis[i].core_length
           : i == part ? axis[i].window_length - axis[i].core_length
                       : axis[i].window_length;
  }
  __host__ __device__ int pixels(int part) const { return rows(0, part) * rows(1, part) * row; }
  __host__ __device__ int pixels() const { return border ? pixels(0) + pixels(1) : pixels(2); }

  // Place of pixel number `index` in the padded input; false if it does not count.
  __device__ bool pixel(int index, int (&q)[3]) const {
    int part = border ? 0 : 2;
    if (border && index >= pixels(0)) index -= pixels(part++);
    q[2] = first - lead + index % row;
    index /= row;
#pragma unroll
    for (int i = 1; i >= 0; --i) {
      const int n = rows(i, part), at = index % n;
      index /= n;
      const bool behind = i == part && at >= axis[i].core - axis[i].window;
      q[i] = (i < part ? axis[i].core : axis[i].window) + at + (behind ? axis[i].core_length : 0);
    }
    return q[2] >= first && q[2] < first + length;
  }
};

// The products of one convolution, and where in its scratch memory they go: tiles [side, side] of channels by channels,
// one after the other; first those of every chunk of the cores, then those of every chunk of the borders and strips.
// Those of a kind are numbered, shift 0 first, which has lower tiles only, and the bias as a channel of ones.
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
  // Products of a kind (for strips: on both sides), of shift 0 and of the others.
  __host__ __device__ int zeros(ShiftedKind kind) const {
    return kind == ShiftedKind::core ? 1 : kind == ShiftedKind::border ? offsets : 2 * (kernel[2] - 1);
  }
  __host__ __device__ int others(ShiftedKind kind) const {
    return kind == ShiftedKind::core     ? shifts - 1
           : kind == ShiftedKind::border ? lower_pairs(offsets - 1)
                                         : 2 * (lower_pairs(kernel[2] - 2) + (shift_rows() - 1) * strip_pairs());
  }
  __host__ __device__ int items(ShiftedKind kind) const {
    return zeros(kind) * zero_pairs + others(kind) * tiles * tiles;
  }
  __host__ __device__ int core_items() const { return items(ShiftedKind::core); }
  __host__ __device__ int outer_items() const { return items(ShiftedKind::border) + items(ShiftedKind::left); }
  // Item of tile (i, j) of the product with this number, among those of a chunk.
  __device__ int item(ShiftedKind kind, int number, int i, int j) const {
    const int rest = number - zeros(kind), before = kind <= ShiftedKind::border ? 0 : items(ShiftedKind::border);
    return before + (rest < 0 ? number * zero_pairs + lower_pairs(i) + j
                              : zeros(kind) * zero_pairs + (rest * tiles + i) * tiles + j);
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
  // Of the window of offset a in the block (a, b), a <= b.
  __device__ int border_number(int a, int b) const { return a == b ? a : offsets + lower_pairs(b - 1) + a; }
  __device__ void border(int number, int& a, int& b) const {
    if (number < offsets) {
      a = b = number;
      return;
    }
    lower_pair(number - offsets, b, a);
    b += 1;
  }
  // Of shift d and the windows of offset a along the last axis. On the left, neither offset of the block is the last
  // one, on the right neither is the first: a strip would be empty. So a pair of offsets below the last counts for
  // both sides; along the first axes only the shift matters.
  __device__ int strip_number(const int (&d)[3], int a, bool right) const {
    const int u = a - right, v = u + d[2], line = d[0] * (2 * kernel[1] - 1) + d[1], zero = kernel[2] - 1;
    const int pair = line > 0   ? zero + lower_pairs(zero - 1) + (line - 1) * strip_pairs() + u * zero + v
                     : d[2] > 0 ? zero + lower_pairs(v - 1) + u
                                : u;
    return 2 * pair + right;
  }
  __device__ void strip(int number, int (&d)[3], int& a, bool& right) const {
    const int zero = kernel[2] - 1, inner = lower_pairs(zero - 1);
    int pair = number / 2, line = 0, u, v;
    right = number % 2 != 0;
    if (pair < zero) {
      u = v = pair;
    } else if (pair < zero + inner) {
      lower_pair(pair - zero, v, u);
      v += 1;
    } else {
      pair -= zero + inner;
      line = 1 + pair / strip_pairs();
      u = pair % strip_pairs() / zero;
      v = pair % zero;
    }
    line += kernel[1] - 1;
    d[0] = line / (2 * kernel[1] - 1);
    d[1] = line % (2 * kernel[1] - 1) - (kernel[1] - 1);
    d[2] = v - u;
    a = u + right;
  }

 private:
  __host__ __device__ int shift_rows() const { return ((2 * kernel[0] - 1) * (2 * kernel[1] - 1) + 1) / 2; }
  __host__ __device__ int strip_pairs() const { return (kernel[2] - 1) * (kernel[2] - 1); }
};

// How a convolution's update is cut; chunks == 0: not in this way.
struct ShiftedChunks {
  int chunks = 0, outer_chunks = 0;  // of cores, and of what is outside of them
};

// Whether the formula holds and pays: no weights, cores that are not empty, fewer products than `direct` multiply-adds,
// and partial products within `traffic` bytes.
inline ShiftedChunks shifted_chunks(const Rows& rows, int side, int64_t width, double direct, int64_t traffic) {
  constexpr int64_t kWantedItems = 128, kMinRows = 512, kMaxRows = 8192;
  ShiftedChunks result;
  if (rows.conv == nullptr || rows.weights != nullptr || rows.m == 0) return result;
  const Conv& conv = *rows.conv;
  if (conv.channels == 0 || conv.stride[0] * conv.stride[1] * conv.stride[2] != 1) return result;
  const ShiftedShape shape(conv, rows.bias, side);
  if (shape.offsets == 1 || shape.offsets > kMaxShiftedOffsets) return result;
  int64_t pixels = 0, most = 0, outer = 0;  // of an image; of what is outside of cores, the most, and how many
  const auto add = [&](const ShiftedRegion& region) {
    const int64_t own = region.pixels();
    pixels += own;
    most = std::max(most, own);
    outer += own > 0;
  };
  for (int s = 0; s < shape.shifts; ++s) {
    int d[3];
    shape.shift(s, d);
    const ShiftedRegion core(conv, d, {0, 0, 0}, ShiftedKind::core);
    if (core.axis[0].core_length <= 0 || core.axis[1].core_length <= 0 || core.length <= 0) return result;
    pixels += core.pixels();
    for (int a = std::max(0, -d[2]); a < std::min(shape.kernel[2], shape.kernel[2] - d[2]); ++a) {
      add({conv, d, {0, 0, a}, ShiftedKind::left});
      add({conv, d, {0, 0, a}, ShiftedKind::right});
    }
  }
  for (int b = 0; b < shape.offsets; ++b) {
    for (int a = 0; a <= b; ++a) {
      int from[3], to[3];
      shape.offset(a, from);
      shape.offset(b, to);
      add({conv, {to[0] - from[0], to[1] - from[1], to[2] - from[2]}, from, ShiftedKind::border});
    }
  }
  const double tile = static_cast<double>(shape.tiles) * shape.tiles * side * side;
  if (static_cast<double>(pixels * conv.batch) * tile > 0.75 * direct) return result;

  // Partial products are written once and read once.
  const int64_t bytes = 2 * width * shape.channels * shape.channels;
  const int64_t outer_chunks = std::max<int64_t>(ceil_div(most * conv.batch, kMaxRows), 1);
  const int64_t limit = (traffic - bytes * outer * outer_chunks) / (bytes * shape.shifts);
  const int64_t least = ceil_div(rows.m, kMaxRows);
  if (limit < least) return result;
  const int64_t wanted = std::min(ceil_div(kWantedItems, shape.core_items()), ceil_div(rows.m, kMinRows));
  result.chunks = static_cast<int>(std::max(std::min(wanted, limit), least));
  result.outer_chunks = static_cast<int>(outer_chunks);
  return result;
}

}  // namespace kfac_fast
