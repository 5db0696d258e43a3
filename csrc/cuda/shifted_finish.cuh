// The last step of a convolution's update by shifted images: C <- decay C + scale S with S from the products of cores
// and what is around them, which lie channels by channels, while C's rows are (channel, kernel offset).
#pragma once

#include "factor_finish.cuh"
#include "shifted_gram.cuh"

namespace kfac_fast {

// Channels of a CTA's piece of C, per side: the piece has at most 72 rows.
__host__ __device__ inline int finish_channels(int offsets) { return offsets <= 9 ? 8 : offsets <= 18 ? 4 : 2; }

// Shared memory of a CTA: for each pair of offsets where its products are, and the piece.
struct OffsetPair {
  int8_t a, b, shift, bordered;
  int16_t left, right;  // numbers of the strips, -1 where there is none
};
constexpr int kShiftedFinishSide = 72;
template <typename T>
constexpr size_t kShiftedFinishBytes =
    sizeof(OffsetPair) * lower_pairs(kMaxShiftedOffsets) + sizeof(T) * kShiftedFinishSide * (kShiftedFinishSide + 1);

// Element (i, j) of block (a, b), i and j channels: its chunks in order, the core's before those of what is around it.
template <typename T>
__device__ T shifted_sum(const RowsEntry& rows, const ShiftedShape& shape, const OffsetPair& pair, int i, int j,
                         const T* partials) {
  const int64_t numel = static_cast<int64_t>(rows.side) * rows.side;
  const int ti = i / rows.side, tj = j / rows.side;
  const T* const core = partials + rows.partial + i % rows.side * rows.side + j % rows.side;
  const T* const outer = core + rows.chunks * shape.core_items() * numel;
  T sum = T(0);
  const auto add = [&](const T* first, int chunks, int per_chunk, ShiftedKind kind, int number) {
    first += shape.item(kind, number, ti, tj) * numel;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += first[chunk * per_chunk * numel];
  };
  add(core, rows.chunks, shape.core_items(), ShiftedKind::core, pair.shift);
  const auto add_outer = [&](ShiftedKind kind, int number) {
    add(outer, rows.outer_chunks, shape.outer_items(), kind, number);
  };
  if (pair.bordered != 0) add_outer(ShiftedKind::border, shape.border_number(pair.a, pair.b));
  if (pair.left >= 0) add_outer(ShiftedKind::left, pair.left);
  if (pair.right >= 0) add_outer(ShiftedKind::right, pair.right);
  return sum;
}

// C <- decay C + scale S, both triangles, whether S is finite, and the trace.
// One CTA per lower piece of a few channels by as many, with all their kernel offsets; it is put together in shared
// memory, where the elements of a row come from as many products as the kernel has offsets.
// Memory: reads every product, those of strips for each of their windows, reads half of C and writes all of it.
template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    shifted_gram_finish_kernel(RowsTables tables, int count, FinishArguments<T> to) {
  const int item = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const RowsEntry& rows = tables.entries[owner];
  const Conv& conv = tables.convs[rows.conv];
  const ShiftedShape shape(conv, rows.bias, rows.side);
  int gi, gj;
  lower_pair(item - tables.first[owner], gi, gj);
  const int offsets = shape.offsets, group = finish_channels(offsets), stride = group * offsets | 1;  // odd
  const int row_channel = gi * group, column_channel = gj * group;
  OffsetPair* const pairs = shared_memory<OffsetPair>();
  T* const piece = reinterpret_cast<T*>(pairs + lower_pairs(kMaxShiftedOffsets));  // [group * offsets, stride]

  for (int p = thread; p < lower_pairs(offsets); p += kFinishThreads) {
    int a, b, from[3], to_offset[3];
    lower_pair(p, b, a);
    shape.offset(a, from);
    shape.offset(b, to_offset);
    const int d[3] = {to_offset[0] - from[0], to_offset[1] - from[1], to_offset[2] - from[2]};
    const auto strip = [&](ShiftedKind kind) {
      const int first = ShiftedRegion::strip_offset(conv, d[2], from[2], kind);
      if (ShiftedRegion(conv, d, {0, 0, first}, kind).pixels() == 0) return -1;
      return shape.strip_number(d, first, kind == ShiftedKind::right);
    };
    const bool bordered = ShiftedRegion(conv, d, from, ShiftedKind::border).pixels() > 0;
    pairs[p] = {static_cast<int8_t>(a),
                static_cast<int8_t>(b),
                static_cast<int8_t>(shape.shift_number(d)),
                static_cast<int8_t>(bordered),
                static_cast<int16_t>(strip(ShiftedKind::left)),
                static_cast<int16_t>(strip(ShiftedKind::right))};
  }
  __syncthreads();

  // Blocks (a, b) with the piece's rows as first channel, then, where they are others, its columns. Neighbouring
  // threads take neighbouring second channels.
  const int elements = group * group, units = lower_pairs(offsets) * elements;
  for (int u = thread; u < (gi == gj ? 1 : 2) * units; u += kFinishThreads) {
    const bool turned = u >= units;
    const OffsetPair pair = pairs[u % units / elements];
    const int first = u % elements / group, second = u % group;
    const int i = (turned ? column_channel : row_channel) + first, j = (turned ? row_channel : column_channel) + second;
    const bool zero = pair.a == pair.b;
    const int limit = shape.channels + (zero ? shape.ones : 0);
    if (i >= limit || j >= limit || (zero && (turned || i < j))) continue;
    // A single row and column of C belongs to the ones, taken from the first offset where both channels are.
    if (j == shape.channels && pair.a > 0) continue;
    int row = first * offsets + (i == shape.channels ? 0 : pair.a);
    int column = second * offsets + (j == shape.channels ? 0 : pair.b);
    // Below the diagonal stands one of the two.
    const bool swap = turned || (gi == gj && row < column);
    // The square of the ones counts padded pixels too, which windows leave out.
    piece[(swap ? column : row) * stride + (swap ? row : column)] =
        j == shape.channels ? static_cast<T>(rows.m) : shifted_sum(rows, shape, pair, i, j, to.partials);
  }
  __syncthreads();

  const int row0 = row_channel * offsets, column0 = column_channel * offsets;
  const int height = min(group * offsets, rows.size - row0), width = min(group * offsets, rows.size - column0);
  const T keep = to.decay[rows.index], add = to.scale[rows.index];
  T* const c = to.factors + rows.factor;
  bool bad = false;
  T diagonal = T(0);
  // A warp keeps to a row, and to a column of the mirror image: then its lanes meet different banks.
  const int lane = thread % kWarpSize, warp = thread / kWarpSize;
  constexpr int kWarps = kFinishThreads / kWarpSize;
  for (int row = warp; row < height; row += kWarps) {
    const int end = min(width, row0 + row - column0 + 1);
    T* const at = c + static_cast<int64_t>(row0 + row) * rows.size + column0;
    for (int column = lane; column < end; column += kWarpSize) {
      T& value = piece[row * stride + column];
      bad = bad || !isfinite(value);
      at[column] = value = decayed(keep, at[column], add * value);
      if (row0 + row == column0 + column) diagonal += value;
    }
  }
  if (__syncthreads_or(bad) && thread == 0) atomicOr(to.nonfinite + rows.index, 1);
  for (int column = warp; column < width; column += kWarps) {  // the mirror image
    T* const at = c + static_cast<int64_t>(column0 + column) * rows.size + row0;
    for (int row = lane; row < height; row += kWarpSize) {
      if (row0 + row > column0 + column) at[row] = piece[row * stride + column];
    }
  }
  if (gi == gj) add_to_trace(rows, gi, diagonal, to, piece);
}

}  // namespace kfac_fast
