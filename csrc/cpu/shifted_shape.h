// X^T X of a stride-1 convolution without forming its patches: the geometry.
//
// With x padded once, block (a, b) of X^T X, a and b kernel offsets, is the sum over the output window W_a of
// x(q) x(q + (b - a) dilation)^T: blocks of the same shift b - a sum the same products over windows that differ only at
// the border. Each axis is cut where some window begins or ends. For every shift the products of each cell of that grid
// are summed once, and a block is the sum of its window's cells. A 3 x 3 kernel takes 13 products of [channels, q]
// matrices over the image, where the patches take 45. Nothing is subtracted, so nothing cancels.
#pragma once

#include "conv_rows.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kMaxShiftedKernel = 7;    // per axis
constexpr int64_t kMaxShiftedCells = 169;   // 2 k - 1 per axis
constexpr int64_t kMaxShiftedOffsets = 49;  // of the kernel

// Whether the formula holds and pays: windows that overlap in most of the image.
inline bool shifted_gram_applies(const Rows& rows) {
  if (rows.conv == nullptr || rows.weights != nullptr) return false;
  const Conv& conv = *rows.conv;
  int64_t cells = 1, offsets = 1;
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t border = (conv.kernel[axis] - 1) * conv.dilation[axis];
    if (conv.kernel[axis] == 1) {
      if (conv.stride[axis] != 1) return false;
      continue;
    }
    if (conv.stride[axis] != 1 || conv.kernel[axis] > kMaxShiftedKernel || conv.out[axis] < 4 * border) return false;
    cells *= 2 * conv.kernel[axis] - 1;
    offsets *= conv.kernel[axis];
  }
  return offsets > 1 && offsets <= kMaxShiftedOffsets && cells <= kMaxShiftedCells && conv.batch > 0 &&
         conv.channels > 0;
}

struct ShiftedShape {
  const Conv& conv;
  bool bias;

  int64_t channels() const { return conv.channels + (bias ? 1 : 0); }  // with a channel of ones
  int64_t reach(int axis) const { return (conv.kernel[axis] - 1) * conv.dilation[axis]; }
  int64_t padded(int axis) const { return conv.out[axis] + reach(axis); }
  int64_t positions() const { return padded(0) * padded(1) * padded(2); }
  int64_t offsets() const { return conv.kernel[0] * conv.kernel[1] * conv.kernel[2]; }
  int64_t span(int axis) const { return 2 * conv.kernel[axis] - 1; }  // shifts of one axis, and cells
  int64_t shifts() const { return (span(0) * span(1) * span(2) + 1) / 2; }
  // Pairs of offsets (a, b) with b - a at or after 0 in lexicographic order, one block of sums each.
  int64_t pairs() const { return offsets() * (offsets() + 1) / 2; }

  // Cell `index` of an axis: kernel - 1 pieces where windows begin, the core, kernel - 1 pieces where they end.
  Range cell(int axis, int64_t index) const {
    const int64_t k = conv.kernel[axis], step = conv.dilation[axis];
    if (index < k - 1) return {index * step, (index + 1) * step};
    if (index == k - 1) return {index * step, conv.out[axis]};
    return {conv.out[axis] + (index - k) * step, conv.out[axis] + (index - k + 1) * step};
  }

  // Offsets a for which both a and a + d lie in the kernel.
  Range first_offsets(int axis, int64_t d) const { return {max(0, -d), min(conv.kernel[axis], conv.kernel[axis] - d)}; }

  // Shift number `index`, in lexicographic order from 0 on.
  void shift(int64_t index, int64_t (&d)[3]) const {
    int64_t rest = index + shifts() - 1;
    for (int axis = 2; axis >= 0; --axis) {
      d[axis] = rest % span(axis) - (conv.kernel[axis] - 1);
      rest /= span(axis);
    }
  }

  int64_t offset_number(const int64_t (&a)[3]) const { return (a[0] * conv.kernel[1] + a[1]) * conv.kernel[2] + a[2]; }
  int64_t pair_number(int64_t a, int64_t b) const { return b * (b + 1) / 2 + a; }  // of offsets a <= b

  // The rows of one channel of the lower triangle of X^T X, whose columns are (channel, offset) and then the bias.
  // at(a, b, c, e): sum over W_a of channel c at offset a times channel e at offset b, for offsets a <= b.
  template <typename T, typename At>
  void write_rows(int64_t channel, T* sum, int64_t ld, At&& at) const {
    const int64_t k = offsets();
    if (channel == conv.channels) {  // of ones
      T* row = sum + channel * k * ld;
      for (int64_t e = 0; e < conv.channels; ++e) {
        for (int64_t b = 0; b < k; ++b) row[e * k + b] = at(b, b, channel, e);
      }
      row[channel * k] = T(conv.batch * conv.out[0] * conv.out[1] * conv.out[2]);
      return;
    }
    for (int64_t x = 0; x < k; ++x) {
      T* row = sum + (channel * k + x) * ld;
      for (int64_t a = 0; a <= x; ++a) {
        for (int64_t e = 0; e <= channel; ++e) row[e * k + a] = at(a, x, e, channel);
      }
      for (int64_t b = x + 1; b < k; ++b) {
        for (int64_t e = 0; e < channel; ++e) row[e * k + b] = at(x, b, channel, e);
      }
    }
  }
};

// What lies right of the diagonal up to the end of its vector.
template <typename T, typename Shape>
inline void clear_beyond_diagonal(T* sum, const Shape& shape) {
  for (int64_t i = 0; i < shape.n; ++i) {
    for (int64_t j = i + 1; j % kLanes<T> != 0; ++j) sum[i * shape.ld() + j] = T(0);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
