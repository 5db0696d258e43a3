// The patches of a convolution, gathered straight from its input: nothing larger than a panel is ever materialised.
#pragma once

#include "../ops.h"
#include "convert.h"
#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

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

// One output line (fixed image and all output coordinates but the last) of one patch column: `count` elements, the
// first belonging to output `w`, written kPanel apart. `line` is null when the whole line lies in the padding.
template <typename T, typename Source>
inline void gather_line(const Conv& conv, const Source* line, int64_t w, int64_t count, int64_t offset, T* out) {
  const int64_t step = conv.stride[2];
  const int64_t stride = conv.spatial_stride[2];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t position = (w + i) * step + offset;
    const int64_t index = line == nullptr ? -1 : padded_index(position, conv.size[2], conv.mode);
    out[i * kPanel<T>] = index < 0 ? T(0) : convert<T>(line[index * stride]);
  }
}

// Rows [first, first + depth) and columns [begin, begin + columns) of the patch matrix, as one panel.
template <typename T, typename Source>
inline void pack_patches(const Conv& conv, const Source* x, int64_t first, int64_t depth, int64_t begin,
                         int64_t columns, T* panel) {  // [depth, kPanel]
  const int64_t* kernel = conv.kernel;
  const int64_t* out = conv.out;
  for (int64_t c = 0; c < columns; ++c) {
    const int64_t column = begin + c;  // (channel, kernel offset)
    int64_t at[3];                     // kernel offset times dilation, less the padding
    at[2] = column % kernel[2] * conv.dilation[2] - conv.pad[2];
    at[1] = column / kernel[2] % kernel[1] * conv.dilation[1] - conv.pad[1];
    at[0] = column / (kernel[2] * kernel[1]) % kernel[0] * conv.dilation[0] - conv.pad[0];
    const Source* channel = x + column / (kernel[2] * kernel[1] * kernel[0]) * conv.channel_stride;

    for (int64_t k = 0; k < depth;) {
      const int64_t row = first + k;  // (image, output position)
      const int64_t w = row % out[2];
      const int64_t h = row / out[2] % out[1];
      const int64_t d = row / (out[2] * out[1]) % out[0];
      const int64_t image = row / (out[2] * out[1] * out[0]);
      const int64_t y = padded_index(h * conv.stride[1] + at[1], conv.size[1], conv.mode);
      const int64_t z = padded_index(d * conv.stride[0] + at[0], conv.size[0], conv.mode);
      const Source* line = nullptr;
      if (y >= 0 && z >= 0) {
        line = channel + image * conv.batch_stride + z * conv.spatial_stride[0] + y * conv.spatial_stride[1];
      }
      const int64_t count = min(out[2] - w, depth - k);
      gather_line(conv, line, w, count, at[2], panel + k * kPanel<T> + c);
      k += count;
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = columns; c < kPanel<T>; ++c) panel[k * kPanel<T> + c] = T(0);
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
