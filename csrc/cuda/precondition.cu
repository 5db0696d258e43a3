// precondition: U = G^-1 V A^-1 for all layers at once, and dot = <V, U>.
//
// Both products have the form P^T Q with operands read row by row: first T^T = V^T G^-1 (G^-1 is symmetric), kept
// transposed in scratch memory, then U = (T^T)^T A^-1. U's CTA reads V's elements for the dot before it overwrites
// them.
#include <vector>

#include "tile.cuh"

namespace kfac_fast {
namespace {

struct LayerEntry {
  Matrix v, u;
  int64_t g, a;                   // offsets of the inverses
  int64_t intermediate;           // offset of T^T in scratch memory
  int64_t dots;                   // offset of the partial dots, one per tile of U
  int32_t rows, columns, stride;  // of V, with the bias column; of T^T, a multiple of 4
  int32_t row_tiles, column_tiles;
  int32_t index;
};

struct LayerTables {
  const LayerEntry* layers;  // [count] of one tile size
  const int32_t* first;      // [count + 1] tiles before each
};

// Rows of a dense row-major matrix.
template <typename Tile, typename T>
struct DenseLoader {
  const T* data;  // [rows, columns]
  int64_t stride;
  int rows, columns, column0;
  LoadSlots<Tile> slots;

  __device__ __forceinline__ void load(T (&values)[Tile::kLoads], int64_t k0) const {
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      const int64_t row = k0 + slots.k(i);
      const int column = column0 + slots.column(i);
      values[i] = row < rows && column < columns ? data[row * stride + column] : T(0);
    }
  }
};

// Element (row, column) of a layer's matrix, its last column possibly apart.
template <typename E>
__device__ E* element(const Matrix& matrix, int columns, int64_t row, int column, E*) {
  if (matrix.bias != nullptr && column == columns - 1) return static_cast<E*>(matrix.bias) + row * matrix.bias_stride;
  return static_cast<E*>(matrix.data) + row * matrix.row_stride + column * matrix.col_stride;
}

template <typename Tile, typename T>
struct GradientLoader {
  const LayerEntry& layer;
  int column0;
  LoadSlots<Tile> slots;

  __device__ __forceinline__ void load(T (&values)[Tile::kLoads], int64_t k0) const {
    with_dtype(layer.v.dtype, [&](auto* type) {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) {
        const int64_t row = k0 + slots.k(i);
        const int column = column0 + slots.column(i);
        const bool inside = row < layer.rows && column < layer.columns;
        values[i] = inside ? load_as<T>(element(layer.v, layer.columns, row, column, type)) : T(0);
      }
    });
  }
};

// T^T = V^T G^-1.
// One CTA per tile of T^T; V is read where the framework left it, in its own type and with its bias column apart.
// FMA for large layers, latency of the few stages for small ones.
template <typename T, int kSide>
__global__ void __launch_bounds__(Tile<T, kSide>::kThreads, Tile<T, kSide>::kResident)
    precondition_left_kernel(LayerTables tables, int count,
                             const T* g_inverse,  // [numel]
                             T* intermediate) {   // per layer: [columns, stride]
  using Tile = Tile<T, kSide>;
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const LayerEntry& layer = tables.layers[owner];
  const int local = item - tables.first[owner];
  const int i0 = local / layer.row_tiles * kSide, j0 = local % layer.row_tiles * kSide;  // of T^T
  const LoadSlots<Tile> by_row = {false};
  const GradientLoader<Tile, T> p = {layer, i0, {layer.v.col_stride > layer.v.row_stride}};
  const DenseLoader<Tile, T> q = {g_inverse + layer.g, layer.rows, layer.rows, layer.rows, j0, by_row};
  T acc[Tile::kMicro][Tile::kMicro] = {};
  multiply<Tile>(acc, p, q, false, 0, layer.rows, shared_memory<T>());

  T* const out = intermediate + layer.intermediate;
#pragma unroll
  for (int r = 0; r < Tile::kMicro; ++r) {
    const int64_t row = i0 + Tile::row(r);
#pragma unroll
    for (int g = 0; g < Tile::kGroups; ++g) {
      const int column = j0 + Tile::column(4 * g);
      T v[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = acc[r][4 * g + c];
      if (row < layer.columns && column < layer.stride) store4(out + row * layer.stride + column, v);
    }
  }
}

// U = (T^T)^T A^-1, and this tile's part of <V, U>.
// One CTA per tile of U.
// FMA for large layers, latency of the few stages for small ones.
template <typename T, int kSide>
__global__ void __launch_bounds__(Tile<T, kSide>::kThreads, Tile<T, kSide>::kResident)
    precondition_right_kernel(LayerTables tables, int count,
                              const T* a_inverse,     // [numel]
                              const T* intermediate,  // per layer: [columns, stride]
                              T* dots) {              // per layer: [tiles of U]
  using Tile = Tile<T, kSide>;
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const LayerEntry& layer = tables.layers[owner];
  const int local = item - tables.first[owner];
  const int i0 = local / layer.column_tiles * kSide, j0 = local % layer.column_tiles * kSide;  // of U
  const LoadSlots<Tile> by_row = {false};
  const DenseLoader<Tile, T> p = {
      intermediate + layer.intermediate, layer.stride, layer.columns, layer.rows, i0, by_row};
  const DenseLoader<Tile, T> q = {a_inverse + layer.a, layer.columns, layer.columns, layer.columns, j0, by_row};
  T acc[Tile::kMicro][Tile::kMicro] = {};
  multiply<Tile>(acc, p, q, false, 0, layer.columns, shared_memory<T>());

  // Through shared memory, so that neighbouring threads have neighbouring elements of V and U.
  T* const staged = shared_memory<T>();  // [kPassRows, kStride]
  constexpr int kPassRows = kSide / Tile::kGroups;
  T dot = T(0);
#pragma unroll
  for (int g = 0; g < Tile::kGroups; ++g) {
    __syncthreads();  // what the memory held before is done with
#pragma unroll
    for (int r = 0; r < 4; ++r) {
#pragma unroll
      for (int h = 0; h < Tile::kGroups; ++h) {
        T v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = acc[4 * g + r][4 * h + c];
        store4_shared(staged + Tile::row(r) * Tile::kStride + Tile::column(4 * h), v);
      }
    }
    __syncthreads();
    const auto for_each_element = [&](auto&& f) {
#pragma unroll 4
      for (int e = static_cast<int>(threadIdx.x); e < kPassRows * kSide; e += Tile::kThreads) {
        const int r = e / kSide, c = e % kSide, row = i0 + g * kPassRows + r, column = j0 + c;
        if (row < layer.rows && column < layer.columns) f(row, column, staged[r * Tile::kStride + c]);
      }
    };
    with_dtype(layer.v.dtype, [&](auto* type) {
      for_each_element([&](int row, int column, T value) {
        dot += load_as<T>(element(layer.v, layer.columns, row, column, type)) * value;
      });
    });
    with_dtype(layer.u.dtype, [&](auto* type) {
      for_each_element(
          [&](int row, int column, T value) { store_as(element(layer.u, layer.columns, row, column, type), value); });
    });
  }
  __syncthreads();  // the stages are done with
  dot = sum_over_threads(dot, shared_memory<T>());
  if (threadIdx.x == 0) dots[layer.dots + local] = dot;
}

// dot_i = sum of the tiles' parts, one warp per layer in a fixed order.
// Lane l adds the parts l, l + 32, ..., then the lanes are added up.
// Latency: a handful of loads.
template <typename T>
__global__ void __launch_bounds__(kWarpSize) precondition_dot_kernel(const LayerEntry* layers,  // [gridDim.x]
                                                                     const T* dots,
                                                                     T* dot) {  // [b]
  const LayerEntry& layer = layers[blockIdx.x];
  const int parts = layer.row_tiles * layer.column_tiles;
  T sum = T(0);
  for (int i = static_cast<int>(threadIdx.x); i < parts; i += kWarpSize) sum += dots[layer.dots + i];
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (threadIdx.x == 0) dot[layer.index] = sum;
}

// Tables and scratch of one call; layers are sorted into tile sizes, within one by decreasing work.
template <typename T>
struct Layout {
  static constexpr int kSides[] = {128, 64, 32};
  Arena arena;
  LayerEntry* layers;
  int32_t* first;  // [b + 3] tiles, per tile size
  int begin[4];
  T* intermediate;
  T* dots;

  // Smaller tiles where large ones would mostly stand empty or leave the device idle.
  static int side(int64_t rows, int64_t columns) {
    if (rows <= 32 && columns <= 32) return 32;
    return std::min(rows, columns) < 512 || sizeof(T) > 4 ? 64 : 128;
  }

  Layout(const Precondition& op, const Context& ctx) : arena(ctx) {
    const int count = op.g_plan.count();
    layers = arena.table<LayerEntry>(count);
    first = arena.table<int32_t>(count + 3);
    const auto work = [&](int i) {
      const int64_t rows = op.g_plan.size(i), columns = op.a_plan.size(i);
      return rows * columns * (rows + columns);
    };
    std::vector<int32_t> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
      const int side_x = side(op.g_plan.size(x), op.a_plan.size(x)),
                side_y = side(op.g_plan.size(y), op.a_plan.size(y));
      return side_x != side_y ? side_x > side_y : work(x) > work(y);
    });
    int at = 0;
    int64_t intermediate_numel = 0, dot_numel = 0;
    for (int c = 0; c < 3; ++c) {
      begin[c] = at;
      int32_t items = 0;
      for (; at < count && side(op.g_plan.size(order[at]), op.a_plan.size(order[at])) == kSides[c]; ++at) {
        const int index = order[at];
        const int32_t rows = op.g_plan.size(index), columns = op.a_plan.size(index), stride = (rows + 3) / 4 * 4;
        const auto row_tiles = static_cast<int32_t>(ceil_div(rows, kSides[c]));
        const auto column_tiles = static_cast<int32_t>(ceil_div(columns, kSides[c]));
        if (layers != nullptr) {
          first[at + c] = items;
          layers[at] = {op.gradients[index],
                        op.results[index],
                        op.g_plan.offset(index),
                        op.a_plan.offset(index),
                        intermediate_numel,
                        dot_numel,
                        rows,
                        columns,
                        stride,
                        row_tiles,
                        column_tiles,
                        index};
        }
        items += row_tiles * column_tiles;
        dot_numel += row_tiles * column_tiles;
        intermediate_numel += static_cast<int64_t>(columns) * stride;
      }
      if (layers != nullptr) first[at + c] = items;
    }
    begin[3] = at;
    intermediate = arena.scratch<T>(intermediate_numel);
    dots = arena.scratch<T>(dot_numel);
  }
};

// Launches one side of the product for one tile size.
template <typename T, int kSide>
cudaError_t multiply_layers(const Layout<T>& layout, int c, bool left, const Precondition& op, const Context& ctx) {
  const int begin = layout.begin[c], count = layout.begin[c + 1] - begin;
  const int32_t* const first = layout.first + begin + c;
  const LayerTables tables = {layout.arena.on_device(layout.layers + begin), layout.arena.on_device(first)};
  using Tile = Tile<T, kSide>;
  if (left) {
    return launch(precondition_left_kernel<T, kSide>, first[count], Tile::kThreads, Tile::kSharedBytes, ctx.stream,
                  tables, count, static_cast<const T*>(op.g_inverse), layout.intermediate);
  }
  return launch(precondition_right_kernel<T, kSide>, first[count], Tile::kThreads, Tile::kSharedBytes, ctx.stream,
                tables, count, static_cast<const T*>(op.a_inverse), layout.intermediate, layout.dots);
}

template <typename T>
cudaError_t run(const Precondition& op, const Context& ctx) {
  const Layout<T> layout(op, ctx);
  cudaError_t error = layout.arena.upload(ctx.stream);
  for (const bool left : {true, false}) {
    if constexpr (sizeof(T) == 4) {
      if (error == cudaSuccess) error = multiply_layers<T, 128>(layout, 0, left, op, ctx);
    }
    if (error == cudaSuccess) error = multiply_layers<T, 64>(layout, 1, left, op, ctx);
    if (error == cudaSuccess) error = multiply_layers<T, 32>(layout, 2, left, op, ctx);
  }
  if (error != cudaSuccess) return error;
  return launch(precondition_dot_kernel<T>, op.g_plan.count(), kWarpSize, 0, ctx.stream,
                layout.arena.on_device(layout.layers), layout.dots, static_cast<T*>(op.dot));
}

}  // namespace

WorkspaceSize cuda_precondition_workspace(const Precondition& op, const Context&) {
  return op.dtype == DType::f64 ? Layout<double>(op, Context()).arena.size()
                                : Layout<float>(op, Context()).arena.size();
}

const char* cuda_precondition(const Precondition& op, const Context& ctx) {
  if (op.g_plan.count() == 0) return nullptr;
  const DeviceGuard guard(ctx);
  if (guard.error() != cudaSuccess) return message(guard.error());
  return message(op.dtype == DType::f64 ? run<double>(op, ctx) : run<float>(op, ctx));
}

}  // namespace kfac_fast
