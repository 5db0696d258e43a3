// U = G^-1 V A^-1 of many layers, as T^T = V^T G^-1 and U = T A^-1. In this form, and because the inverses are
// symmetric, every operand is packed by copying rows and the first product comes out packed for the second one.
// Limit: multiply-adds, and packing A^-1 and G^-1 for layers of few rows or columns.
#include <algorithm>
#include <cmath>
#include <vector>

#include "direct_precondition.h"
#include "kernels.h"
#include "pack.h"
#include "split_precondition.h"
#include "support.h"
#include "symmetric_update.h"
#include "team.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {
namespace {

// Where all threads work on one layer, as much time as this many multiply-adds take, times the root of the layer's,
// goes to barriers and uneven shares (measured on two threads).
template <typename T>
constexpr double kTeamCost = kHasMatrixTiles<T> ? 3e3 : 2.5e3;

// Depth of the products done at a time: a panel of it stays in the first-level cache.
constexpr int64_t kDepth = 192;

// Output tiles of a task, at most this many squared: so many panels of both operands stay in the second-level cache.
constexpr int64_t kMaxGroup = 4;
constexpr int64_t kTasksPerThread = 8;

// From here on, where there are matrix instructions, products of split numbers are faster (docs/performance.md).
constexpr int64_t kMinSplitSize = 128;

struct Shape {
  int64_t m, n;  // of V, with the bias column

  template <typename T>
  bool split() const {
    return kHasMatrixTiles<T> && min(m, n) >= kMinSplitSize;
  }
  bool direct() const { return max(m, n) <= kMaxDirectSize; }
  double work() const { return static_cast<double>(m * n * (m + n)); }  // multiply-adds
};

Shape shape_of(const Precondition& op, int layer) { return {op.g_plan.size(layer), op.a_plan.size(layer)}; }

// Layers that all threads work on together.
template <typename T>
class Team {
 public:
  Team(const Precondition& op, int threads) {
    double total = 0;
    for (int layer = 0; layer < op.g_plan.count(); ++layer) {
      const double work = shape_of(op, layer).work();
      total += work;
      if (work / threads + cost(work) < work) layers_.push_back(layer);
    }
    const auto work = [&](size_t x) { return x < layers_.size() ? shape_of(op, layers_[x]).work() : 0.0; };
    std::stable_sort(layers_.begin(), layers_.end(),
                     [&](int32_t x, int32_t y) { return shape_of(op, x).work() > shape_of(op, y).work(); });
    layers_.resize(team_tasks(threads, [&] { return total; }, work, cost));
  }
  const std::vector<int32_t>& layers() const { return layers_; }
  bool has(int32_t layer) const { return std::find(layers_.begin(), layers_.end(), layer) != layers_.end(); }

 private:
  static double cost(double work) { return kTeamCost<T> * std::sqrt(work); }

  std::vector<int32_t> layers_;
};

template <typename T>
int64_t panels(int64_t columns) {
  return ceil_div(columns, kPanel<T>);
}

// All operands in panels [panels of columns, depth, kPanel]. V is kept until the end: U may overwrite the gradient.
template <typename T>
struct Scratch {
  T* v = nullptr;          // [m, n]
  T* g_inverse = nullptr;  // [m, m]
  T* a_inverse = nullptr;  // [n, n]
  T* product = nullptr;    // [n, m] T^T
  T* dots = nullptr;       // [panels(m), panels(n)] <V, U> of each output tile
  DirectScratch<T> direct;
  SplitScratch split;
};

// Elements of those arrays.
template <typename T>
struct Sizes {
  int64_t v = 0, g_inverse = 0, a_inverse = 0, product = 0, dots = 0, direct_m = 0, direct_n = 0;
  SplitSizes split;

  void include(Shape shape, int threads) {
    if (shape.split<T>()) return split.include(shape.m, shape.n, threads);
    if (shape.direct()) {
      direct_m = max(direct_m, shape.m), direct_n = max(direct_n, shape.n);
      return;
    }
    const int64_t m_width = round_up(shape.m, kPanel<T>), n_width = round_up(shape.n, kPanel<T>);
    v = max(v, shape.m * n_width);
    g_inverse = max(g_inverse, shape.m * m_width);
    a_inverse = max(a_inverse, shape.n * n_width);
    product = max(product, n_width * m_width);
    dots = max(dots, panels<T>(shape.m) * panels<T>(shape.n));
  }

  Scratch<T> take(Arena& arena) const {
    Scratch<T> scratch;
    scratch.v = arena.take<T>(v);
    scratch.g_inverse = arena.take<T>(g_inverse);
    scratch.a_inverse = arena.take<T>(a_inverse);
    scratch.product = arena.take<T>(product);
    scratch.dots = arena.take<T>(dots);
    scratch.direct = DirectScratch<T>::take(arena, direct_m, direct_n);
    scratch.split = split.take(arena);
    return scratch;
  }
};

// out <- a^T b on one tile of up to kPanel rows and as many columns as `vectors` hold.
template <typename T>
void multiply_panels(int64_t depth, int64_t rows, int vectors, const T* a, const T* b,  // [depth, kPanel]
                     T* out, int64_t ld) {                                              // [kPanel, kPanel]
  for (int64_t k = 0; k < depth || k == 0; k += kDepth) {
    for (int64_t r = 0; r < rows; r += kTileRows<T>) {
      const T* a_tile = a + k * kPanel<T> + r;
      const T* b_tile = b + k * kPanel<T>;
      if (k == 0) {
        update_tile<T, Store::assign>(vectors, min(kDepth, depth), a_tile, b_tile, out + r * ld, ld);
      } else {
        update_tile<T, Store::add>(vectors, min(kDepth, depth - k), a_tile, b_tile, out + r * ld, ld);
      }
    }
  }
}

// Vectors that the columns of panel `index` fill.
template <typename T>
int vectors_of(int64_t columns, int64_t index) {
  return static_cast<int>(ceil_div(min(kPanel<T>, columns - index * kPanel<T>), kLanes<T>));
}

// Panel `index` of V: columns of the weight's gradient, then perhaps the bias' gradient.
template <typename T>
void pack_gradient(const Matrix& v, int64_t m, int64_t n, int64_t index, T* panel) {  // [m, kPanel]
  const int64_t begin = index * kPanel<T>;
  const int64_t bias = n - 1 - begin;
  const int64_t columns = max(0, min(kPanel<T>, n - (v.bias != nullptr) - begin));
  with_element(v.dtype, [&](auto element) {
    using Source = decltype(element);
    pack_strided<T>(static_cast<const Source*>(v.data) + begin * v.col_stride, v.row_stride, v.col_stride, m, columns,
                    panel);
    if (v.bias == nullptr || bias < 0 || bias >= kPanel<T>) return;
    const Source* source = static_cast<const Source*>(v.bias);
    for (int64_t i = 0; i < m; ++i) panel[i * kPanel<T> + bias] = convert<T>(source[i * v.bias_stride]);
  });
}

// Writes a tile of U whose first element is (row, column), and returns its scalar product with V.
template <typename T>
T store_result(const Matrix& u, int64_t m, int64_t n, int64_t row, int64_t column,
               const T* tile,       // [kPanel, kPanel]
               const T* v_panel) {  // [m, kPanel]
  const int64_t rows = min(kPanel<T>, m - row);
  const int64_t weights = min(kPanel<T>, n - (u.bias != nullptr) - column);
  const int64_t bias = n - 1 - column;
  with_element(u.dtype, [&](auto element) {
    using Target = decltype(element);
    for (int64_t i = 0; i < rows; ++i) {
      Target* out = static_cast<Target*>(u.data) + (row + i) * u.row_stride + column * u.col_stride;
      for (int64_t j = 0; j < weights; ++j) narrow(tile[i * kPanel<T> + j], out + j * u.col_stride);
    }
    if (u.bias == nullptr || bias >= kPanel<T>) return;
    Target* out = static_cast<Target*>(u.bias) + row * u.bias_stride;
    for (int64_t i = 0; i < rows; ++i) narrow(tile[i * kPanel<T> + bias], out + i * u.bias_stride);
  });

  // Columns past n within the last vector are zero in V and, since A^-1's padding is zero, in the tile.
  const int vectors = vectors_of<T>(n, column / kPanel<T>);
  Vec<T> sum = {};
  for (int64_t i = 0; i < rows; ++i) {
    const T* v = v_panel + (row + i) * kPanel<T>;
    for (int x = 0; x < vectors; ++x) sum += load(tile + i * kPanel<T> + x * kLanes<T>) * load(v + x * kLanes<T>);
  }
  T dot = T(0);
  for (int lane = 0; lane < kLanes<T>; ++lane) dot += sum[lane];
  return dot;
}

// body(i, j) for all i < rows and j < columns, in square groups side by side on all threads.
template <typename Body>
void for_each_tile(int threads, int64_t rows, int64_t columns, Body&& body) {
  int64_t group = kMaxGroup;
  while (group > 1 && ceil_div(rows, group) * ceil_div(columns, group) < kTasksPerThread * threads) --group;
  const int64_t across = ceil_div(columns, group);
  parallel_for(threads, ceil_div(rows, group) * across, [&](int64_t task, int) {
    const int64_t i = task / across * group, j = task % across * group;
    for (int64_t y = i; y < min(i + group, rows); ++y) {
      for (int64_t x = j; x < min(j + group, columns); ++x) body(y, x);
    }
  });
}

// What a layer will touch; nothing if there is no such layer.
template <typename T>
Ahead memory_of(const Precondition& op, int layer) {
  Ahead ahead;
  if (layer < 0) return ahead;
  const Shape shape = shape_of(op, layer);
  const int64_t size = static_cast<int64_t>(sizeof(T));
  ahead.add(op.gradients[layer].data, shape.m * shape.n * size);
  ahead.add(static_cast<const T*>(op.g_inverse) + op.g_plan.offset(layer), shape.m * shape.m * size);
  ahead.add(static_cast<const T*>(op.a_inverse) + op.a_plan.offset(layer), shape.n * shape.n * size);
  ahead.add(op.results[layer].data, shape.m * shape.n * size);
  return ahead;
}

template <typename T>
void precondition_layer(const Precondition& op, int layer, int next, const Scratch<T>& s, int threads) {
  const Shape shape = shape_of(op, layer);
  const int64_t m = shape.m, n = shape.n;
  if constexpr (kHasMatrixTiles<T>) {
    if (shape.split<T>()) {
      Ahead ahead = memory_of<T>(op, next);
      static_cast<T*>(op.dot)[layer] =
          precondition_split(static_cast<const T*>(op.g_inverse) + op.g_plan.offset(layer),
                             static_cast<const T*>(op.a_inverse) + op.a_plan.offset(layer), op.gradients[layer],
                             op.results[layer], m, n, s.split, threads, ahead);
      return;
    }
  }
  if (shape.direct()) {
    Ahead ahead = memory_of<T>(op, next);
    static_cast<T*>(op.dot)[layer] = precondition_direct(static_cast<const T*>(op.g_inverse) + op.g_plan.offset(layer),
                                                         static_cast<const T*>(op.a_inverse) + op.a_plan.offset(layer),
                                                         op.gradients[layer], op.results[layer], m, n, s.direct, ahead);
    return;
  }
  const int64_t m_panels = panels<T>(m), n_panels = panels<T>(n);
  const T* g_inverse = static_cast<const T*>(op.g_inverse) + op.g_plan.offset(layer);
  const T* a_inverse = static_cast<const T*>(op.a_inverse) + op.a_plan.offset(layer);

  parallel_for(threads, m_panels + 2 * n_panels, [&](int64_t task, int) {
    if (task < n_panels) {
      pack_gradient(op.gradients[layer], m, n, task, s.v + task * m * kPanel<T>);
    } else if (task < 2 * n_panels) {
      const int64_t p = task - n_panels;
      pack_strided<T>(a_inverse + p * kPanel<T>, n, 1, n, min(kPanel<T>, n - p * kPanel<T>),
                      s.a_inverse + p * n * kPanel<T>);
    } else {
      const int64_t p = task - 2 * n_panels;
      pack_strided<T>(g_inverse + p * kPanel<T>, m, 1, m, min(kPanel<T>, m - p * kPanel<T>),
                      s.g_inverse + p * m * kPanel<T>);
    }
  });
  const int64_t product_panel = round_up(n, kPanel<T>) * kPanel<T>;
  for_each_tile(threads, m_panels, n_panels, [&](int64_t i, int64_t j) {
    multiply_panels(m, min(kPanel<T>, n - j * kPanel<T>), vectors_of<T>(m, i), s.v + j * m * kPanel<T>,
                    s.g_inverse + i * m * kPanel<T>, s.product + i * product_panel + j * kPanel<T> * kPanel<T>,
                    kPanel<T>);
  });
  for_each_tile(threads, m_panels, n_panels, [&](int64_t i, int64_t j) {
    alignas(64) T tile[kPanel<T> * kPanel<T>];
    multiply_panels(n, min(kPanel<T>, m - i * kPanel<T>), vectors_of<T>(n, j), s.product + i * product_panel,
                    s.a_inverse + j * n * kPanel<T>, tile, kPanel<T>);
    s.dots[i * n_panels + j] =
        store_result(op.results[layer], m, n, i * kPanel<T>, j * kPanel<T>, tile, s.v + j * m * kPanel<T>);
  });
  T dot = T(0);
  for (int64_t task = 0; task < m_panels * n_panels; ++task) dot += s.dots[task];
  static_cast<T*>(op.dot)[layer] = dot;
}

template <typename T>
void lay_out(const Precondition& op, const Team<T>& team, int threads, Arena& arena, Scratch<T>* scratch) {
  Sizes<T> own, all;
  for (int layer = 0; layer < op.g_plan.count(); ++layer) {
    const Shape shape = shape_of(op, layer);
    const bool together = team.has(layer);
    all.include(shape, together ? threads : 1);
    if (!together) own.include(shape, 1);
  }
  for (int thread = 0; thread < threads; ++thread) {
    const Scratch<T> mine = (thread == 0 ? all : own).take(arena);
    if (scratch != nullptr) scratch[thread] = mine;
  }
}

template <typename T>
void run(const Precondition& op, const Context& ctx) {
  const int threads = usable_threads(ctx.threads);
  Arena arena(ctx.workspace);
  auto* scratch = arena.take<Scratch<T>>(threads);
  const Team<T> team(op, threads);
  lay_out(op, team, threads, arena, scratch);

  for (const int32_t layer : team.layers()) precondition_layer<T>(op, layer, -1, scratch[0], threads);
  const int32_t* order = op.a_plan.by_decreasing_size().data();
  const int count = op.a_plan.count();
  parallel_for(threads, count, [&](int64_t task, int thread) {
    if (!team.has(order[task]))
      precondition_layer<T>(op, order[task], task + threads < count ? order[task + threads] : -1, scratch[thread], 1);
  });
}

template <typename T>
size_t bytes_for(const Precondition& op, int threads) {
  Arena arena(nullptr);
  arena.take<Scratch<T>>(threads);
  lay_out<T>(op, Team<T>(op, threads), threads, arena, nullptr);
  return arena.used();
}

}  // namespace

WorkspaceSize precondition_workspace(const Precondition& op, const Context& ctx) {
  return workspace_for(op.dtype, ctx.threads,
                       [&](auto element, int threads) { return bytes_for<decltype(element)>(op, threads); });
}

const char* precondition(const Precondition& op, const Context& ctx) {
  with_factor_type(op.dtype, [&](auto element) { run<decltype(element)>(op, ctx); });
  return nullptr;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
