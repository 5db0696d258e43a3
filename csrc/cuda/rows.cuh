// factor_update's operand: the rows of X of one block, wherever they come from.
#pragma once

#include <type_traits>

#include "tile.cuh"

namespace kfac_fast {

// Rows, as the kernels see them.
struct RowsEntry {
  const void* data;
  const void* weights;
  int64_t m, row_stride, col_stride;
  int64_t factor;               // offset of C in the buffer of factors
  int64_t partial;              // offset of this block's partial products in scratch memory
  int64_t trace;                // offset of the parts of the trace in their scratch memory
  int64_t chunk_rows;           // rows of one partial product
  int32_t d, size;              // columns without and with the bias column
  int32_t side, tiles, chunks;  // side of a tile, tiles per side of C, partial products per tile
  int32_t outer_chunks;         // of a convolution by shifted images: partial products per tile outside of the cores
  int32_t run;                  // pixels that its rows are filled up to multiples of
  int32_t diagonal;             // CTAs of the last step that hold a part of the diagonal
  int32_t conv;                 // index of the Conv, or -1
  int32_t index;                // in the arrays with one element per block
  DType dtype;
  bool bias, along_k;
  bool vectors;  // rows can be read 16 bytes at a time
  float one;     // 1, for copies in the background to read
};

// One CTA's share of factor_update: one tile of a block's lower triangle over one chunk of its rows.
struct RowsItem {
  int ti, tj;          // tile
  int64_t begin, end;  // rows
  int64_t partial;     // offset of the partial product

  __device__ RowsItem(const RowsEntry& rows, int item) {
    const int pairs = lower_pairs(rows.tiles), chunk = item / pairs;
    lower_pair(item % pairs, ti, tj);
    begin = chunk * rows.chunk_rows;
    end = min(begin + rows.chunk_rows, rows.m);
    partial = rows.partial + static_cast<int64_t>(item) * rows.side * rows.side;
  }
};

struct RowsTables {
  const RowsEntry* entries;  // [count] of one kind and tile size
  const int32_t* first;      // [count + 1] items before each
  const Conv* convs;
};

// What a patch column means: its channel's offset in the image and its displacement from the output position.
struct PatchColumn {
  int64_t offset;
  int32_t shift[3];
};

__device__ inline PatchColumn patch_column(const Conv& conv, int column) {
  PatchColumn result;
  int rest = column;
#pragma unroll
  for (int axis = 2; axis >= 0; --axis) {
    const int kernel = static_cast<int>(conv.kernel[axis]);
    result.shift[axis] = rest % kernel * static_cast<int>(conv.dilation[axis]) - static_cast<int>(conv.pad[axis]);
    rest /= kernel;
  }
  result.offset = rest * conv.channel_stride;
  return result;
}

// Columns of the two operands' tiles of a convolution, for the loaders. All threads call.
template <int kSide>
__device__ void prepare_patch_columns(const Conv* conv, const RowsItem& item, PatchColumn* columns) {  // [2, kSide]
  if (conv == nullptr) return;
  for (int c = static_cast<int>(threadIdx.x); c < 2 * kSide; c += static_cast<int>(blockDim.x)) {
    columns[c] = patch_column(*conv, c < kSide ? item.ti * kSide + c : item.tj * kSide + c - kSide);
  }
  __syncthreads();
}

// Moves a position outside of [0, size) to the one whose value it shows; false where that is zero.
__device__ inline bool pad_position(PaddingMode mode, int64_t size, int64_t& position) {
  if (position >= 0 && position < size) return true;
  switch (mode) {
    case PaddingMode::zeros:
      return false;
    case PaddingMode::reflect:
      position = position < 0 ? -position : 2 * (size - 1) - position;
      break;
    case PaddingMode::replicate:
      position = position < 0 ? 0 : size - 1;
      break;
    case PaddingMode::circular:
      position += position < 0 ? size : -size;
      break;
  }
  return true;
}

// Calls f with a null pointer of the type of rows that are computed with in T: E where it is known, else void.
template <typename T, typename E, typename F>
__device__ __forceinline__ void with_row_type(DType dtype, F&& f) {
  if constexpr (!std::is_void_v<E>) {
    f(static_cast<E*>(nullptr));
  } else if constexpr (sizeof(T) == sizeof(double)) {
    f(static_cast<double*>(nullptr));
  } else {
    with_single_dtype(dtype, f);
  }
}

// Brings in sqrt(w_k) X[k, column0 + ...] for the rows k before `end`.
// E: type of the rows where it is known, else void.
template <typename Tile, typename T, typename E = void>
struct RowsLoader {
  const RowsEntry& rows;
  const Conv* conv;            // null for plain rows
  const PatchColumn* columns;  // [kSide] in shared memory, convolutions only
  int column0;
  int64_t end;
  LoadSlots<Tile> slots;

  template <int kCount>
  __device__ __forceinline__ void load(T (&values)[kCount], int64_t k0, int first) const {
    with_row_type<T, E>(rows.dtype, [&](auto* type) { load_typed(values, k0, first, type); });
  }

 private:
  __device__ T root_weight(int64_t row) const {
    return rows.weights == nullptr ? T(1) : square_root(static_cast<const T*>(rows.weights)[row]);
  }

  template <int kCount, typename S>
  __device__ __forceinline__ void load_typed(T (&values)[kCount], int64_t k0, int first, S* type) const {
    if (conv != nullptr) {
      load_patches(values, k0, first, type);
    } else {
      load_rows(values, k0, first, type);
    }
  }

  template <int kCount, typename S>
  __device__ __forceinline__ void load_rows(T (&values)[kCount], int64_t k0, int first, S*) const {
    const S* const data = static_cast<const S*>(rows.data);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = k0 + slots.k(first + i);
      const int column = column0 + slots.column(first + i);
      values[i] = T(0);
      if (row >= end || column >= rows.size) continue;
      values[i] = column < rows.d ? load_as<T>(data + row * rows.row_stride + column * rows.col_stride) : T(1);
      if (rows.weights != nullptr) values[i] *= root_weight(row);
    }
  }

  // Loads run along k: the output positions of a row of the image are neighbours in memory, patch columns are not.
  template <int kCount, typename S>
  __device__ __forceinline__ void load_patches(T (&values)[kCount], int64_t k0, int first, S*) const {
    const int64_t row = k0 + slots.k(0);
    const int64_t positions = conv->out[0] * conv->out[1] * conv->out[2];
    // Divisions of 32 bits take a fraction of the time.
    const bool narrow = ((row | positions) >> 32) == 0;
    const int64_t image = narrow ? static_cast<uint32_t>(row) / static_cast<uint32_t>(positions) : row / positions;
    int rest = static_cast<int>(row - image * positions);
    int64_t corner[3];  // of the patch, in the input
#pragma unroll
    for (int axis = 2; axis >= 0; --axis) {
      const int out = static_cast<int>(conv->out[axis]);
      corner[axis] = rest % out * conv->stride[axis];
      rest /= out;
    }
    const S* const data = static_cast<const S*>(rows.data) + image * conv->batch_stride;
    const T weight = row < end ? root_weight(row) : T(0);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int column = column0 + slots.column(first + i);
      values[i] = T(0);
      if (row >= end || column >= rows.size) continue;
      if (column == rows.d) {
        values[i] = weight;
        continue;
      }
      const PatchColumn& patch = columns[slots.column(first + i)];
      int64_t at = patch.offset;
      bool inside = true;
#pragma unroll
      for (int axis = 0; axis < 3; ++axis) {
        int64_t position = corner[axis] + patch.shift[axis];
        inside = pad_position(conv->mode, conv->size[axis], position) && inside;
        at += position * conv->spatial_stride[axis];
      }
      if (inside) values[i] = load_as<T>(data + at) * weight;
    }
  }
};

}  // namespace kfac_fast
