// precondition: U = G^-1 V A^-1 for all layers at once, and dot = <V, U>.
//
// Both products have the form P^T Q with operands read row by row: first T^T = V^T G^-1 (G^-1 is symmetric), kept
// transposed in scratch memory, then U = (T^T)^T A^-1. U's CTA reads V's elements for the dot before it overwrites
// them.
#include <vector>

#include "pipeline.cuh"

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

// Whether 16-byte copies of 32-bit numbers reach every row from its first element on.
__device__ inline bool aligned(const void* data, int64_t stride) {
  return stride % 4 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

// Rows of a dense row-major matrix.
template <typename Tile, typename T>
struct DenseLoader {
  const T* data;  // [rows, columns]
  int64_t stride;
  int rows, columns, column0;
  LoadSlots<Tile> slots = {false};

  template <int kCount>
  __device__ __forceinline__ void load(T (&values)[kCount], int64_t k0, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = k0 + slots.k(first + i);
      const int column = column0 + slots.column(first + i);
      values[i] = row < rows && column < columns ? data[row * stride + column] : T(0);
    }
  }

  __device__ __forceinline__ void fill(T* stage, int64_t k0) const {
    if (aligned(data, stride)) {
      copy_vectors<Tile>(
          stage, data, column0, columns, false,
          [&](int k) { return k0 + k < rows ? data + (k0 + k) * stride : nullptr; }, [](int) { return T(0); });
    } else {
      copy_elements<Tile>(stage, slots, data, [&](int k, int c) {
        const bool inside = k0 + k < rows && column0 + c < columns;
        return inside ? data + (k0 + k) * stride + column0 + c : nullptr;
      });
    }
  }
};

// Element (row, column) of a layer's matrix, its last column possibly apart.
template <typename E>
__device__ E* element(const Matrix& matrix, int columns, int64_t row, int column, E*) {
  if (matrix.bias != nullptr && column == columns - 1) return static_cast<E*>(matrix.bias) + row * matrix.bias_stride;
  return static_cast<E*>(matrix.data) + row * matrix.row_stride + column * matrix.col_stride;
}

// Rows of V.
template <typename Tile, typename T>
struct GradientLoader {
  const LayerEntry& layer;
  int column0;
  LoadSlots<Tile> slots = {layer.v.col_stride > layer.v.row_stride};

  template <int kCount>
  __device__ __forceinline__ void load(T (&values)[kCount], int64_t k0, int first) const {
    with_dtype(layer.v.dtype, [&](auto* type) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t row = k0 + slots.k(first + i);
        const int column = column0 + slots.column(first + i);
        const bool inside = row < layer.rows && column < layer.columns;
        values[i] = inside ? load_as<T>(element(layer.v, layer.columns, row, column, type)) : T(0);
      }
    });
  }

  __device__ __forceinline__ void fill(T* stage, int64_t k0) const {
    const Matrix& v = layer.v;
    const int columns = layer.columns - (v.bias != nullptr);
    if (v.dtype == DType::f32 && v.col_stride == 1 && columns % 4 == 0 && aligned(v.data, v.row_stride)) {
      const float* const data = static_cast<const float*>(v.data);
      const float* const bias = static_cast<const float*>(v.bias);
      copy_vectors<Tile>(
          stage, data, column0, columns, bias != nullptr,
          [&](int k) { return k0 + k < layer.rows ? data + (k0 + k) * v.row_stride : nullptr; },
          [&](int k) { return k0 + k < layer.rows ? bias[(k0 + k) * v.bias_stride] : 0.0f; });
    } else if (v.dtype == DType::f32) {
      copy_elements<Tile>(stage, slots, static_cast<const float*>(v.data), [&](int k, int c) -> const float* {
        if (k0 + k >= layer.rows || column0 + c >= layer.columns) return nullptr;
        return element(v, layer.columns, k0 + k, column0 + c, static_cast<const float*>(nullptr));
      });
    } else {
      gather<Tile>(stage, *this, k0);
    }
  }
};

// The two ways to multiply: by FMA, and by three TF32 products.
template <typename T, int kSide>
struct FmaProduct {
  using Tile = kfac_fast::Tile<T, kSide>;
  T acc[Tile::kMicro][Tile::kMicro] = {};

  template <typename P, typename Q>
  __device__ __forceinline__ void multiply(const P& p, const Q& q, int rows, T* shared) {
    kfac_fast::multiply<Tile>(acc, p, q, false, 0, rows, shared);
  }
  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
#pragma unroll
    for (int r = 0; r < Tile::kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kMicro; ++c) f(Tile::row(r), Tile::column(c), acc[r][c]);
    }
  }
};
template <typename T, int kSide>
struct MmaProduct {
  using Tile = MmaTile<T, kSide>;
  MmaSums<Tile> sums;

  template <typename P, typename Q>
  __device__ __forceinline__ void multiply(const P& p, const Q& q, int rows, T* shared) {
    T *const p_shared = shared, *const q_shared = shared + Tile::kStages * Tile::kStage;
    multiply_pipelined<Tile>(sums, 0, rows, p_shared, q_shared, [&](int stage, int64_t k0) {
      p.fill(p_shared + stage * Tile::kStage, k0);
      q.fill(q_shared + stage * Tile::kStage, k0);
    });
  }
  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    sums.visit(f);
  }
};

// T^T = V^T G^-1.
// One CTA per tile of T^T; V is read where the framework left it, in its own type and with its bias column apart.
// FMA or tensor cores for large layers, latency of the few stages for small ones.
template <template <typename, int> class Product, typename T, int kSide>
__global__ void __launch_bounds__(Product<T, kSide>::Tile::kThreads, Product<T, kSide>::Tile::kResident)
    precondition_left_kernel(LayerTables tables, int count,
                             const T* g_inverse,  // [numel]
                             T* intermediate) {   // per layer: [columns, stride]
  using Tile = typename Product<T, kSide>::Tile;
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const LayerEntry& layer = tables.layers[owner];
  const int local = item - tables.first[owner];
  const int i0 = local / layer.row_tiles * kSide, j0 = local % layer.row_tiles * kSide;  // of T^T
  const GradientLoader<Tile, T> p = {layer, i0};
  const DenseLoader<Tile, T> q = {g_inverse + layer.g, layer.rows, layer.rows, layer.rows, j0};
  Product<T, kSide> product;
  product.multiply(p, q, layer.rows, shared_memory<T>());

  T* const out = intermediate + layer.intermediate;
  const auto write = [&](int r, int c, T value) {
    const int64_t row = i0 + r;
    if (row < layer.columns && j0 + c < layer.stride) out[row * layer.stride + j0 + c] = value;
  };
  hand_around<kSide, Tile::kThreads>(shared_memory<T>(), [&](auto&& put) { product.visit(put); }, write, [](int) {});
}

// U = (T^T)^T A^-1, and this tile's part of <V, U>.
// One CTA per tile of U.
// FMA or tensor cores for large layers, latency of the few stages for small ones.
template <template <typename, int> class Product, typename T, int kSide>
__global__ void __launch_bounds__(Product<T, kSide>::Tile::kThreads, Product<T, kSide>::Tile::kResident)
    precondition_right_kernel(LayerTables tables, int count,
                              const T* a_inverse,     // [numel]
                              const T* intermediate,  // per layer: [columns, stride]
                              T* dots) {              // per layer: [tiles of U]
  using Tile = typename Product<T, kSide>::Tile;
  const int item = static_cast<int>(blockIdx.x);
  const int owner = find_owner(tables.first, count, item);
  const LayerEntry& layer = tables.layers[owner];
  const int local = item - tables.first[owner];
  const int i0 = local / layer.column_tiles * kSide, j0 = local % layer.column_tiles * kSide;  // of U
  const DenseLoader<Tile, T> p = {intermediate + layer.intermediate, layer.stride, layer.columns, layer.rows, i0};
  const DenseLoader<Tile, T> q = {a_inverse + layer.a, layer.columns, layer.columns, layer.columns, j0};
  Product<T, kSide> product;
  product.multiply(p, q, layer.columns, shared_memory<T>());

  T dot = T(0);
  with_dtype(layer.v.dtype, [&](auto* v_type) {
    with_dtype(layer.u.dtype, [&](auto* u_type) {
      const auto write = [&](int r, int c, T value) {
        const int row = i0 + r, column = j0 + c;
        if (row >= layer.rows || column >= layer.columns) return;
        dot += load_as<T>(element(layer.v, layer.columns, row, column, v_type)) * value;
        store_as(element(layer.u, layer.columns, row, column, u_type), value);
      };
      hand_around<kSide, Tile::kThreads>(
          shared_memory<T>(), [&](auto&& put) { product.visit(put); }, write, [](int) {});
    });
  });
  __syncthreads();  // the staged elements are done with
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

// Ways to multiply, with their tiles; a layer goes by its size and the device.
enum Class : int { kMma128, kMma64, kFma128, kFma64, kFma32, kClasses };
constexpr int kSides[kClasses] = {128, 64, 128, 64, 32};

// Tables and scratch of one call; layers are sorted into classes, within one by decreasing work.
template <typename T>
struct Layout {
  Arena arena;
  LayerEntry* layers;
  int32_t* first;  // [b + kClasses] tiles, per class
  int begin[kClasses + 1];
  T* intermediate;
  T* dots;

  // Smaller tiles where large ones would mostly stand empty or leave the device idle.
  static Class class_of(int64_t rows, int64_t columns, bool tensor_cores) {
    const int64_t least = std::min(rows, columns);
    if (rows <= 32 && columns <= 32) return kFma32;
    if (sizeof(T) > 4) return kFma64;
    if (tensor_cores && least > 32) return least < 512 ? kMma64 : kMma128;
    return least < 512 ? kFma64 : kFma128;
  }

  Layout(const Precondition& op, const Context& memory, int device) : arena(memory) {
    const int count = op.g_plan.count();
    const bool tensor_cores = three_tf32_products_pay(compute_capability(device));
    layers = arena.table<LayerEntry>(count);
    first = arena.table<int32_t>(count + kClasses);
    const auto work = [&](int i) {
      const int64_t rows = op.g_plan.size(i), columns = op.a_plan.size(i);
      return rows * columns * (rows + columns);
    };
    const auto class_at = [&](int i) { return class_of(op.g_plan.size(i), op.a_plan.size(i), tensor_cores); };
    std::vector<int32_t> order(count);
    for (int i = 0; i < count; ++i) order[i] = i;
    std::stable_sort(order.begin(), order.end(), [&](int32_t x, int32_t y) {
      return class_at(x) != class_at(y) ? class_at(x) < class_at(y) : work(x) > work(y);
    });
    int at = 0;
    int64_t intermediate_numel = 0, dot_numel = 0;
    for (int c = 0; c < kClasses; ++c) {
      begin[c] = at;
      int32_t items = 0;
      for (; at < count && class_at(order[at]) == c; ++at) {
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
    begin[kClasses] = at;
    intermediate = arena.scratch<T>(intermediate_numel);
    dots = arena.scratch<T>(dot_numel);
  }
};

// Launches one side of the product for one class.
template <template <typename, int> class Product, int kSide, typename T>
cudaError_t multiply_layers(const Layout<T>& layout, int c, bool left, const Precondition& op, const Context& ctx) {
  using Tile = typename Product<T, kSide>::Tile;
  const int begin = layout.begin[c], count = layout.begin[c + 1] - begin;
  if (count == 0) return cudaSuccess;
  const int32_t* const first = layout.first + begin + c;
  const LayerTables tables = {layout.arena.on_device(layout.layers + begin), layout.arena.on_device(first)};
  if (left) {
    return launch(precondition_left_kernel<Product, T, kSide>, first[count], Tile::kThreads, Tile::kSharedBytes,
                  ctx.stream, tables, count, static_cast<const T*>(op.g_inverse), layout.intermediate);
  }
  return launch(precondition_right_kernel<Product, T, kSide>, first[count], Tile::kThreads, Tile::kSharedBytes,
                ctx.stream, tables, count, static_cast<const T*>(op.a_inverse), layout.intermediate, layout.dots);
}

template <typename T>
cudaError_t run(const Precondition& op, const Context& ctx) {
  const Layout<T> layout(op, ctx, ctx.device);
  cudaError_t error = layout.arena.upload(ctx.stream);
  for (const bool left : {true, false}) {
    if constexpr (sizeof(T) == 4) {
      if (error == cudaSuccess) error = multiply_layers<MmaProduct, 128>(layout, kMma128, left, op, ctx);
      if (error == cudaSuccess) error = multiply_layers<MmaProduct, 64>(layout, kMma64, left, op, ctx);
      if (error == cudaSuccess) error = multiply_layers<FmaProduct, 128>(layout, kFma128, left, op, ctx);
    }
    if (error == cudaSuccess) error = multiply_layers<FmaProduct, 64>(layout, kFma64, left, op, ctx);
    if (error == cudaSuccess) error = multiply_layers<FmaProduct, 32>(layout, kFma32, left, op, ctx);
  }
  if (error != cudaSuccess) return error;
  return launch(precondition_dot_kernel<T>, op.g_plan.count(), kWarpSize, 0, ctx.stream,
                layout.arena.on_device(layout.layers), layout.dots, static_cast<T*>(op.dot));
}

}  // namespace

WorkspaceSize cuda_precondition_workspace(const Precondition& op, const Context& ctx) {
  return op.dtype == DType::f64 ? Layout<double>(op, Context(), ctx.device).arena.size()
                                : Layout<float>(op, Context(), ctx.device).arena.size();
}

const char* cuda_precondition(const Precondition& op, const Context& ctx) {
  if (op.g_plan.count() == 0) return nullptr;
  const DeviceGuard guard(ctx);
  if (guard.error() != cudaSuccess) return message(guard.error());
  return message(op.dtype == DType::f64 ? run<double>(op, ctx) : run<float>(op, ctx));
}

}  // namespace kfac_fast
