// Products of shifted images: the partial products that shifted_finish.cuh makes X^T X of.
#pragma once

#include "pipeline.cuh"
#include "shifted_gram.cuh"

namespace kfac_fast {

// One CTA's share: one tile of channels by channels, of one core, border or strip, over a chunk of pixels.
struct ShiftedItem {
  ShiftedRegion region;
  int shift[3];
  int ti, tj, channels;  // tile; channels on either side, the one of ones among them
  int same;              // 0 or 1: both operands are the same numbers
  int64_t begin, end;    // pixels of all images
  int64_t partial;       // offset of the partial product

  __device__ ShiftedItem(const RowsEntry& rows, const Conv& conv, int item)
      : ShiftedItem(rows, conv, ShiftedShape(conv, rows.bias, rows.side), item) {}

 private:
  struct Choice {
    ShiftedKind kind;
    int chunk, chunks, tile;
    bool zero;  // shift 0
    int shift[3], offset[3];

    __device__ Choice(const RowsEntry& rows, const ShiftedShape& shape, int item) : offset{0, 0, 0} {
      const int cores = rows.chunks * shape.core_items(), borders = shape.items(ShiftedKind::border);
      const bool core = item < cores;
      if (!core) item -= cores;
      const int per_chunk = core ? shape.core_items() : shape.outer_items(), square = shape.tiles * shape.tiles;
      chunk = item / per_chunk;
      chunks = core ? rows.chunks : rows.outer_chunks;
      tile = item % per_chunk;
      kind = core ? ShiftedKind::core : tile < borders ? ShiftedKind::border : ShiftedKind::left;
      if (kind == ShiftedKind::left) tile -= borders;
      const int zeros = shape.zeros(kind), rest = tile - zeros * shape.zero_pairs;
      zero = rest < 0;
      const int number = zero ? tile / shape.zero_pairs : zeros + rest / square;
      tile = zero ? tile % shape.zero_pairs : rest % square;
      if (kind == ShiftedKind::core) {
        shape.shift(number, shift);
      } else if (kind == ShiftedKind::border) {
        int a, b;
        shape.border(number, a, b);
        shape.offset(a, offset);
        shape.offset(b, shift);
        for (int i = 0; i < 3; ++i) shift[i] -= offset[i];
      } else {
        bool right;
        shape.strip(number, shift, offset[2], right);
        if (right) kind = ShiftedKind::right;
      }
    }
  };

  __device__ ShiftedItem(const RowsEntry& rows, const Conv& conv, const ShiftedShape& shape, int item)
      : ShiftedItem(rows, conv, shape, Choice(rows, shape, item), item) {}

  __device__ ShiftedItem(const RowsEntry& rows, const Conv& conv, const ShiftedShape& shape, const Choice& choice,
                         int item)
      : region(conv, choice.shift, choice.offset, choice.kind) {
    for (int i = 0; i < 3; ++i) shift[i] = choice.shift[i];
    if (choice.zero) {
      lower_pair(choice.tile, ti, tj);
    } else {
      ti = choice.tile / shape.tiles;
      tj = choice.tile % shape.tiles;
    }
    channels = shape.channels + (choice.zero ? shape.ones : 0);
    same = choice.zero && ti == tj;
    region.fill_up(conv, rows.run);
    const int64_t pixels = conv.batch * region.pixels();
    const int64_t per_chunk = ceil_div(ceil_div(pixels, choice.chunks), 64) * 64;
    begin = min(choice.chunk * per_chunk, pixels);
    end = min(begin + per_chunk, pixels);
    partial = rows.partial + static_cast<int64_t>(item) * rows.side * rows.side;
  }
};

// Where the pixels of the next stages lie in memory, for both operands: a few threads find them for all.
// A stage's offsets are found two calls of the loaders before they are used, behind a barrier, and the place of a
// stage is taken again two calls after.
template <int kDepth>
struct Pixels {
  static constexpr int kPlaces = 4, kAhead = 2;
  static constexpr size_t kSharedBytes = sizeof(int64_t) * kPlaces * 2 * kDepth + sizeof(ShiftedItem);

  // An offset in memory, and what the pixel is: one of the image; a zero beside it; none, for the sum of ones either.
  enum Kind : int { kInside, kPadded, kNone };
  __device__ static int64_t offset_of(int64_t word) { return word >> 2; }
  __device__ static Kind kind_of(int64_t word) { return Kind{static_cast<int>(word) & 3}; }

  int64_t* words;  // [kPlaces, 2, kDepth] in shared memory, and the item
  const Conv& conv;

  __device__ const ShiftedItem& item() const {
    return *reinterpret_cast<const ShiftedItem*>(words + kPlaces * 2 * kDepth);
  }
  __device__ int64_t* of(int64_t k0, bool second) const {
    const int stage = static_cast<int>(k0 - item().begin) / kDepth;
    return words + (stage % kPlaces * 2 + second) * kDepth;
  }
  // Of the stage from pixel k0 on.
  __device__ void find(int64_t k0) const {
    for (int t = static_cast<int>(threadIdx.x); t < 2 * kDepth; t += static_cast<int>(blockDim.x)) {
      of(k0, t >= kDepth)[t % kDepth] = word(k0 + t % kDepth, t >= kDepth);
    }
  }
  __device__ void find_first() const {
    for (int stage = 0; stage < kAhead; ++stage) find(item().begin + stage * kDepth);
    __syncthreads();
  }

 private:
  __device__ int64_t word(int64_t pixel, bool second) const {
    const ShiftedItem& own = item();
    if (pixel >= own.end) return kNone;
    const int pixels = own.region.pixels();
    const int64_t image =
        pixel >> 32 == 0 ? static_cast<uint32_t>(pixel) / static_cast<uint32_t>(pixels) : pixel / pixels;
    int q[3];
    const bool counts = own.region.pixel(static_cast<int>(pixel - image * pixels), q);
    int64_t at = image * conv.batch_stride;
    bool inside = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      int64_t position = q[axis] - conv.pad[axis] + (second ? own.shift[axis] * conv.dilation[axis] : 0);
      inside = pad_position(conv.mode, conv.size[axis], position) && inside;
      at += position * conv.spatial_stride[axis];
    }
    return at * 4 + (counts ? inside ? kInside : kPadded : kNone);
  }
};

// The item of this CTA, in shared memory at `words`. All threads call.
template <int kDepth>
__device__ Pixels<kDepth> find_item(const RowsEntry& rows, const Conv& conv, int item, void* words) {
  const Pixels<kDepth> pixels = {static_cast<int64_t*>(words), conv};
  if (threadIdx.x == 0) {
    *reinterpret_cast<ShiftedItem*>(pixels.words + Pixels<kDepth>::kPlaces * 2 * kDepth) =
        ShiftedItem(rows, conv, item);
  }
  __syncthreads();
  return pixels;
}

// Loads along k begin where `turn` says, so that runs of lanes are sectors of memory.
template <typename Tile>
struct PixelSlots : LoadSlots<Tile> {
  int turn;
  __device__ int k(int i) const {
    const int own = LoadSlots<Tile>::k(i);
    return this->along_k ? (own + turn) & (Tile::kDepth - 1) : own;
  }
};

// Brings in channels column0 + ... of a stage's pixels.
// E: type of the rows where it is known, else void. kFinds: also finds the pixels of the stage after the next.
template <typename Tile, typename T, typename E, bool kFinds>
struct PixelLoader {
  const RowsEntry& rows;
  const Pixels<Tile::kDepth>& pixels;
  int column0;
  bool second;
  PixelSlots<Tile> slots;

  template <int kCount>
  __device__ __forceinline__ void load(T (&values)[kCount], int64_t k0, int first) const {
    with_row_type<T, E>(rows.dtype, [&](auto* type) { load_typed(values, k0, first, type); });
    if constexpr (kFinds) {
      if (!second) pixels.find(k0 + 2 * Tile::kDepth);
    }
  }

 private:
  template <int kCount, typename S>
  __device__ __forceinline__ void load_typed(T (&values)[kCount], int64_t k0, int first, S*) const {
    const int64_t* const words = pixels.of(k0, second);
    const int channels = static_cast<int>(pixels.conv.channels), all = pixels.item().channels;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t word = words[slots.k(first + i)];
      const int channel = column0 + slots.column(first + i);
      const auto kind = pixels.kind_of(word);
      values[i] = T(0);
      if (channel < channels) {
        if (kind == pixels.kInside) {
          const S* const data = static_cast<const S*>(rows.data);
          values[i] = load_as<T>(data + pixels.offset_of(word) + channel * pixels.conv.channel_stride);
        }
      } else if (channel < all && kind != pixels.kNone) {
        values[i] = T(1);
      }
    }
  }
};

// Writes a CTA's tile. `visit` and `staged`: see hand_around.
template <int kSide, int kThreads, typename T, typename Visit>
__device__ __forceinline__ void store_partial(const ShiftedItem& item, T* partials, T* staged, Visit&& visit) {
  T* const partial = partials + item.partial;
  const auto write = [&](int r, int c, T value) {
    const int row = item.ti * kSide + r, column = item.tj * kSide + c;
    if (row >= item.channels || column >= item.channels || (item.same && c > r)) return;
    partial[r * kSide + c] = value;
  };
  hand_around<kSide, kThreads>(staged, visit, write, [](int) {});
}

// Partial products of shifted images by FMA, see factor_update_fma_kernel.
// One CTA per (tile, core, border or strip, chunk); pixels pass through shared memory, each thread holds 4x4 elements.
template <typename T, int kSide>
__global__ void __launch_bounds__(Tile<T, kSide>::kThreads, Tile<T, kSide>::kResident)
    shifted_gram_fma_kernel(RowsTables tables, int count, T* partials) {
  using Tile = Tile<T, kSide>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  T* const stages = shared_memory<T>();
  const Pixels<Tile::kDepth> pixels =
      find_item<Tile::kDepth>(rows, tables.convs[rows.conv], static_cast<int>(blockIdx.x) - tables.first[owner],
                              stages + Tile::kSharedBytes / sizeof(T));
  const ShiftedItem& item = pixels.item();
  if (item.region.pixels() == 0) return;
  pixels.find_first();
  const PixelSlots<Tile> slots = {{rows.along_k}, 0};
  using Loader = PixelLoader<Tile, T, void, true>;
  const Loader p = {rows, pixels, item.ti * kSide, false, slots}, q = {rows, pixels, item.tj * kSide, true, slots};
  T acc[Tile::kMicro][Tile::kMicro] = {};
  multiply<Tile>(acc, p, q, item.same, item.begin, item.end, stages);
  store_partial<kSide, Tile::kThreads>(item, partials, stages, [&](auto&& put) {
#pragma unroll
    for (int r = 0; r < Tile::kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kMicro; ++c) put(Tile::row(r), Tile::column(c), acc[r][c]);
    }
  });
}

// Starts to bring channels column0 + ... of a stage's pixels, which lie along k, into the stage. `channels`: with that
// of ones.
template <typename Tile>
__device__ __forceinline__ void copy_pixels(float* stage, const int64_t* words, const PixelSlots<Tile>& slots,
                                            const RowsEntry& rows, const Conv& conv, int channels, int column0) {
  using Slots = PixelSlots<Tile>;
  using Pixels = Pixels<Tile::kDepth>;
  const float* const data = static_cast<const float*>(rows.data);
  const int own = static_cast<int>(conv.channels) - column0, all = channels - column0;
  const int64_t step = (slots.column(1) - slots.column(0)) * conv.channel_stride;
#pragma unroll
  for (int run = 0; run < Slots::kRuns / Slots::kWarps; ++run) {
    const int k = slots.k(run * Slots::kPerRun);
    const auto kind = Pixels::kind_of(words[k]);
    const bool inside = kind == Pixels::kInside;
    const float* from = data;
    if (inside) from += Pixels::offset_of(words[k]) + (column0 + slots.column(0)) * conv.channel_stride;
#pragma unroll
    for (int i = 0; i < Slots::kPerRun; ++i) {
      const int column = slots.column(i);
      const bool one = column >= own && column < all && kind != Pixels::kNone;
      const bool copy = column < own && inside;
      copy_async<4>(stage + Tile::place(k, column), one ? &rows.one : copy ? from : data, one || copy);
      from += step;
    }
  }
}

// Long stages: of a run of pixels that starts anywhere in memory, a sector is read in vain.
template <typename E, int kSide>
using ShiftedTile = MmaTile<E, kSide, 4>;

// CTAs that registers are left for: no more than shared memory has room for, of which these devices have 100 KB.
template <typename Tile>
constexpr int shifted_resident() {
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
  constexpr int kRoom = static_cast<int>((100 << 10) / (Tile::kSharedBytes + (1 << 10)));
  return Tile::kResident < kRoom ? Tile::kResident : kRoom;
#else
  return Tile::kResident;
#endif
}

// Partial products of shifted images on tensor cores, see factor_update_mma_kernel.
// One CTA per (tile, core, border or strip, chunk); pixels pass through two stages of shared memory.
template <typename E, int kSide>
__global__ void __launch_bounds__(ShiftedTile<E, kSide>::kThreads, shifted_resident<ShiftedTile<E, kSide>>())
    shifted_gram_mma_kernel(RowsTables tables, int count, float* partials) {
  using Tile = ShiftedTile<E, kSide>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  E* const p = shared_memory<E>();
  const Pixels<Tile::kDepth> pixels =
      find_item<Tile::kDepth>(rows, tables.convs[rows.conv], static_cast<int>(blockIdx.x) - tables.first[owner],
                              p + 2 * Tile::kStages * Tile::kStage);
  const ShiftedItem& item = pixels.item();
  if (item.region.pixels() == 0) return;
  pixels.find_first();
  E* const q = item.same ? p : p + Tile::kStages * Tile::kStage;

  const auto fill_operand = [&](E* stage, int tile, bool second, int64_t k0) {
    const Conv& conv = pixels.conv;
    const int64_t* const words = pixels.of(k0, second);
    const auto offset = [&](int k) { return pixels.offset_of(words[k]); };
    const auto kind = [&](int k) { return pixels.kind_of(words[k]); };
    const E* const data = static_cast<const E*>(rows.data);
    const int column0 = tile * kSide, channels = static_cast<int>(conv.channels);
    if (rows.vectors) {
      copy_vectors<Tile>(
          stage, data, column0, channels, item.channels > channels,
          [&](int k) { return kind(k) == pixels.kInside ? data + offset(k) : nullptr; },
          [&](int k) { return kind(k) == pixels.kNone ? 0.0f : 1.0f; });
      return;
    }
    PixelSlots<Tile> slots = {{rows.along_k}, 0};
    // Where the thread's first channel of the first pixel lies within its sector.
    const int64_t first = offset(0) + (column0 + slots.column(0)) * conv.channel_stride;
    slots.turn = -static_cast<int>(reinterpret_cast<uintptr_t>(data + first) / sizeof(E)) & (Tile::kRun - 1);
    if constexpr (sizeof(E) == sizeof(float)) {
      const float* const numbers = static_cast<const float*>(rows.data);
      float* const to = reinterpret_cast<float*>(stage);
      if (rows.along_k) {
        copy_pixels<Tile>(to, words, slots, rows, conv, item.channels, column0);
        return;
      }
      copy_elements<Tile>(to, slots, numbers, [&](int k, int c) -> const float* {
        const int channel = column0 + c;
        if (channel < channels) {
          return kind(k) == pixels.kInside ? numbers + offset(k) + channel * conv.channel_stride : nullptr;
        }
        return channel < item.channels && kind(k) != pixels.kNone ? &rows.one : nullptr;
      });
    } else {
      const PixelLoader<Tile, float, E, false> loader = {rows, pixels, column0, second, slots};
      gather<Tile>(stage, loader, k0);
    }
  };
  MmaSums<Tile> sums;
  multiply_pipelined<Tile>(sums, item.begin, item.end, p, q, [&](int stage, int64_t k0) {
    fill_operand(p + stage * Tile::kStage, item.ti, false, k0);
    if (!item.same) fill_operand(q + stage * Tile::kStage, item.tj, true, k0);
    pixels.find(k0 + 2 * Tile::kDepth);
  });
  store_partial<kSide, Tile::kThreads>(item, partials, shared_memory<float>(), [&](auto&& put) { sums.visit(put); });
}

}  // namespace kfac_fast
