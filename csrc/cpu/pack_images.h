// Images packed for the matrix instructions so that a step of depth is one position of up to 32 images: moved by any
// number of positions, an operand still consists of whole steps.
#pragma once

#include "conv_rows.h"
#include "shifted_shape.h"
#include "split_float.h"
#include "transpose.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

constexpr int64_t kImages = kTileDepth;  // of a group

// Positions packed in one go, and the floats of their copies, image by image.
constexpr int64_t kAreaPositions = 256;
constexpr int64_t kCopyStride = kAreaPositions + kTileSide;  // an odd number of lines
constexpr int64_t kCopyNumel = kImages * kCopyStride;

#if defined(__AMX_BF16__)

template <int kParts>
constexpr int64_t kStepWords = kParts * kTileWords;  // of one position of 16 channels

inline __m512 load_floats(const float* x, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, x); }
inline __m512 load_floats(const Half* x, __mmask16 inside) {
  return _mm512_maskz_cvtph_ps(inside, _mm256_maskz_loadu_epi16(inside, x));
}
inline __m512 load_floats(const BFloat16* x, __mmask16 inside) {
  const __m512i wide = _mm512_maskz_cvtepu16_epi32(inside, _mm256_maskz_loadu_epi16(inside, x));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(inside, wide, 16));
}

// Up to 16 columns of up to 32 images, the images `stride` elements apart: column j becomes words of (image i, image
// i + 16), of each part, at words(j).
template <int kParts, typename Source, typename Words>
inline void pack_columns(const Source* x, int64_t stride, int64_t images, int64_t columns, Words&& words) {
  const __mmask16 inside = first_lanes(columns);
  Vec<float> low[kTileSide], high[kTileSide];
  KFAC_FAST_UNROLL
  for (int64_t i = 0; i < kTileSide; ++i) {
    low[i] = reinterpret_cast<Vec<float>>(load_floats(x + min(i, images - 1) * stride, i < images ? inside : 0));
  }
  transpose<float>(low);
  KFAC_FAST_UNROLL
  for (int64_t i = 0; i < kTileSide; ++i) {
    const int64_t image = i + kTileSide;
    high[i] =
        reinterpret_cast<Vec<float>>(load_floats(x + min(image, images - 1) * stride, image < images ? inside : 0));
  }
  transpose<float>(high);
  for (int64_t j = 0; j < columns; ++j) {
    split_pairs<kParts>(reinterpret_cast<__m512>(low[j]), reinterpret_cast<__m512>(high[j]), words(j));
  }
}

// Positions of the padded images: lines [y.begin, y.end), of each positions [x.begin, x.end).
struct Area {
  Range y, x;
  int64_t positions() const { return y.length() * x.length(); }
};

// A group of images of a two-dimensional convolution.
struct ImageGroup {
  const Rows& rows;
  int64_t first, count;  // images

  bool in_padding(int64_t y) const {
    return padded_index(y - rows.conv->pad[1], rows.conv->size[1], rows.conv->mode) < 0;
  }

  // Channels [16 tile, 16 tile + 16) of an area: left operands [kParts, channel, pair of images], those of position
  // number p at words[p].
  template <int kParts>
  void pack(int64_t tile, Area area, int32_t* const* words, float* copy) const {
    const Conv& conv = *rows.conv;
    const int64_t channel = tile * kTileSide, channels = min(kTileSide, conv.channels - channel);
    if (channels < kTileSide) {
      for (int64_t p = 0; p < area.positions(); ++p) {
        for (int64_t i = 0; i < kStepWords<kParts>; i += kTileSide) store(words[p] + i, Vec<int32_t>{});
        if (rows.bias && channel + channels == conv.channels) pack_ones(words[p] + channels * kTileSide);
      }
    }
    with_element(rows.dtype, [&](auto element) {
      const auto* source =
          static_cast<const decltype(element)*>(rows.data) + first * conv.batch_stride + channel * conv.channel_stride;
      if (conv.channel_stride == 1 && conv.spatial_stride[2] != 1 && channels > 0) {
        pack_positions<kParts>(source, channels, area, words, copy);
      } else {
        pack_channels<kParts>(source, channels, area, words, copy);
      }
    });
  }

 private:
  // Channel by channel: copied so that the lines of an image are read in one go, from pages that may be far apart.
  template <int kParts, typename Source>
  void pack_channels(const Source* source, int64_t channels, Area area, int32_t* const* words, float* copy) const {
    const Conv& conv = *rows.conv;
    const int64_t positions = area.positions();
    for (int64_t c = 0; c < channels; ++c) {
      const Source* channel = source + c * conv.channel_stride;
      for (int64_t i = 0; i < count; ++i) {
        copy_lines(channel + i * conv.batch_stride, area, c == 0, copy + i * kCopyStride);
      }
      for (int64_t p = 0; p < positions; p += kTileSide) {
        const int64_t columns = min(kTileSide, positions - p);
        pack_columns<kParts>(copy + p, kCopyStride, count, columns,
                             [&](int64_t j) { return words[p + j] + c * kTileSide; });
      }
    }
  }

  // The area of one channel of one image. The zeros of the padding are there already if not `fresh`.
  template <typename Source>
  void copy_lines(const Source* image, Area area, bool fresh, float* out) const {
    const Conv& conv = *rows.conv;
    const Range inside = Range{conv.pad[2], conv.pad[2] + conv.size[2]}.within(area.x);
    for (int64_t y = area.y.begin; y < area.y.end; ++y, out += area.x.length()) {
      const int64_t source_y = padded_index(y - conv.pad[1], conv.size[1], conv.mode);
      if (source_y < 0) {
        for (int64_t x = 0; x < (fresh ? area.x.length() : 0); ++x) out[x] = 0.0f;
        continue;
      }
      const Source* line = image + source_y * conv.spatial_stride[1];
      if (fresh || conv.mode != PaddingMode::zeros) {
        copy_padding(line, {area.x.begin, min(area.x.end, inside.begin)}, area.x.begin, out);
        copy_padding(line, {max(area.x.begin, inside.end), area.x.end}, area.x.begin, out);
      }
      const Source* from = line + (inside.begin - conv.pad[2]) * conv.spatial_stride[2];
      float* to = out + inside.begin - area.x.begin;
      if constexpr (sizeof(Source) <= sizeof(float)) {
        if (conv.spatial_stride[2] == 1) {
          for (int64_t x = 0; x < inside.length(); x += kTileSide) {
            const __mmask16 there = first_lanes(inside.length() - x);
            _mm512_mask_storeu_ps(to + x, there, load_floats(from + x, there));
          }
          continue;
        }
      }
      for (int64_t x = 0; x < inside.length(); ++x) to[x] = convert<float>(from[x * conv.spatial_stride[2]]);
    }
  }

  template <typename Source>
  void copy_padding(const Source* line, Range x, int64_t begin, float* out) const {
    const Conv& conv = *rows.conv;
    for (int64_t at = x.begin; at < x.end; ++at) {
      const int64_t index = padded_index(at - conv.pad[2], conv.size[2], conv.mode);
      out[at - begin] = index < 0 ? 0.0f : convert<float>(line[index * conv.spatial_stride[2]]);
    }
  }

  // Position by position, where channels lie side by side.
  template <int kParts, typename Source>
  void pack_positions(const Source* source, int64_t channels, Area area, int32_t* const* words, float* copy) const {
    const Conv& conv = *rows.conv;
    for (int64_t p = 0; p < area.positions(); ++p) {
      const int64_t y = area.y.begin + p / area.x.length(), x = area.x.begin + p % area.x.length();
      const int64_t source_y = padded_index(y - conv.pad[1], conv.size[1], conv.mode);
      const int64_t source_x = padded_index(x - conv.pad[2], conv.size[2], conv.mode);
      const bool there = source_y >= 0 && source_x >= 0;
      const Source* place = source + source_y * conv.spatial_stride[1] + source_x * conv.spatial_stride[2];
      const auto row_of = [&](int64_t channel) { return words[p] + channel * kTileSide; };
      if constexpr (sizeof(Source) <= sizeof(float)) {
        if (there) {
          pack_columns<kParts>(place, conv.batch_stride, count, channels, row_of);
          continue;
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          copy[i * kTileSide + c] = there ? convert<float>(place[i * conv.batch_stride + c]) : 0.0f;
        }
      }
      pack_columns<kParts>(copy, kTileSide, count, channels, row_of);
    }
  }

  // The channel of ones, whose row of words this is.
  void pack_ones(int32_t* words) const {
    for (int64_t i = 0; i < kTileSide; ++i) {
      words[i] = (i < count ? 0x3f80 : 0) | (i + kTileSide < count ? 0x3f800000 : 0);
    }
  }
};

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
