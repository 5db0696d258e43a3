// precondition of csrc/cuda in the shim, against plain loops in double precision.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"

namespace {

using namespace kfac_fast;

template <typename T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// A gradient in memory: data [rows, columns - bias], bias [rows].
struct Gradient {
  int rows, columns;
  bool bias, transposed;
  DType dtype;
  std::vector<char> data, bias_data;

  int64_t width() const { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

  Gradient(int rows_, int columns_, bool bias_, bool transposed_, DType dtype_)
      : rows(rows_), columns(columns_), bias(bias_), transposed(transposed_), dtype(dtype_) {
    data.assign(static_cast<size_t>(rows) * (columns - bias) * width(), 0);
    if (bias) bias_data.assign(static_cast<size_t>(rows) * 2 * width(), 0);
  }
  Matrix matrix() {
    Matrix m;
    m.data = data.data();
    m.dtype = dtype;
    m.row_stride = transposed ? 1 : columns - bias;
    m.col_stride = transposed ? rows : 1;
    m.bias = bias ? bias_data.data() : nullptr;
    m.bias_stride = 2;
    return m;
  }
  void* place(int i, int j) {
    const Matrix m = matrix();
    const bool apart = bias && j == columns - 1;
    const int64_t at = apart ? i * m.bias_stride : i * m.row_stride + j * m.col_stride;
    return (apart ? bias_data.data() : data.data()) + at * width();
  }
  double get(int i, int j) {
    void* p = place(i, j);
    switch (dtype) {
      case DType::f32:
      case DType::tf32:
        return *static_cast<float*>(p);
      case DType::f64:
        return *static_cast<double*>(p);
      case DType::f16:
        return __half2float(*static_cast<__half*>(p));
      case DType::bf16:
        break;
    }
    return __bfloat162float(*static_cast<__nv_bfloat16*>(p));
  }
  void set(int i, int j, double value) {
    void* p = place(i, j);
    switch (dtype) {
      case DType::f32:
      case DType::tf32:
        *static_cast<float*>(p) = static_cast<float>(value);
        break;
      case DType::f64:
        *static_cast<double*>(p) = value;
        break;
      case DType::f16:
        *static_cast<__half*>(p) = __float2half(static_cast<float>(value));
        break;
      case DType::bf16:
        *static_cast<__nv_bfloat16*>(p) = __float2bfloat16(static_cast<float>(value));
        break;
    }
  }
};

template <typename T>
std::vector<T> symmetric_blocks(const Plan& plan) {
  std::vector<T> values(plan.numel(), std::numeric_limits<T>::quiet_NaN());
  for (int b = 0; b < plan.count(); ++b) {
    const int n = plan.size(b);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        values[plan.offset(b) + i * n + j] = values[plan.offset(b) + j * n + i] =
            static_cast<T>(check::normal() + 2 * (i == j));
      }
    }
  }
  return values;
}

template <typename T>
void test_layers(const std::string& what, std::vector<Gradient> v, int schedules = 5) {
  std::vector<int32_t> g_sizes, a_sizes;
  for (Gradient& gradient : v) {
    g_sizes.push_back(gradient.rows);
    a_sizes.push_back(gradient.columns);
    for (int i = 0; i < gradient.rows; ++i) {
      for (int j = 0; j < gradient.columns; ++j) gradient.set(i, j, check::normal());
    }
  }
  const Plan g_plan(g_sizes), a_plan(a_sizes);
  const std::vector<T> g_inverse = symmetric_blocks<T>(g_plan), a_inverse = symmetric_blocks<T>(a_plan);
  std::vector<T> dot(v.size(), T(7)), dot_in_place(v.size(), T(7));
  std::vector<Gradient> u = v, in_place = v;

  const auto run = [&](std::vector<Gradient>& from, std::vector<Gradient>& to, std::vector<T>& dots) {
    std::vector<Matrix> gradients, results;
    for (size_t i = 0; i < from.size(); ++i) {
      gradients.push_back(from[i].matrix());
      results.push_back(to[i].matrix());
    }
    const Precondition op = {g_plan,           a_plan,           kDType<T>,      g_inverse.data(),
                             a_inverse.data(), gradients.data(), results.data(), dots.data()};
    const std::string error = check::call(cuda_table().precondition_workspace, cuda_table().precondition, op);
    check::that(error.empty(), what + ": " + error);
  };
  check::same_bits_under_every_schedule(
      what,
      [&] {
        u = v;
        run(v, u, dot);
        std::vector<char> bytes;
        for (const Gradient& result : u) {
          check::append_bytes(bytes, result.data);
          check::append_bytes(bytes, result.bias_data);
        }
        check::append_bytes(bytes, dot);
        return bytes;
      },
      schedules);
  run(in_place, in_place, dot_in_place);

  for (size_t b = 0; b < v.size(); ++b) {
    const int rows = v[b].rows, columns = v[b].columns;
    const T* const g = g_inverse.data() + g_plan.offset(static_cast<int>(b));
    const T* const a = a_inverse.data() + a_plan.offset(static_cast<int>(b));
    std::vector<double> left(static_cast<size_t>(rows) * columns);
    for (int i = 0; i < rows; ++i) {
      for (int k = 0; k < rows; ++k) {
        for (int j = 0; j < columns; ++j)
          left[i * columns + j] += static_cast<double>(g[i * rows + k]) * v[b].get(k, j);
      }
    }
    double expected_dot = 0, dot_size = 0;
    bool close = true;
    const double unit = v[b].dtype == DType::bf16  ? 8e-3
                        : v[b].dtype == DType::f16 ? 1e-3
                        : sizeof(T) == 8           ? 1e-14
                                                   : 1e-6;
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < columns; ++j) {
        double expected = 0, size = 0;
        for (int k = 0; k < columns; ++k) {
          expected += left[i * columns + k] * a[k * columns + j];
          size += std::abs(left[i * columns + k] * a[k * columns + j]);
        }
        close = close && std::abs(u[b].get(i, j) - expected) <=
                             unit * std::abs(expected) + size * (sizeof(T) == 8 ? 1e-13 : 3e-6);
        expected_dot += v[b].get(i, j) * expected;
        dot_size += std::abs(v[b].get(i, j)) * size;
      }
    }
    const std::string layer = what + ", layer " + std::to_string(b);
    check::that(close, layer + ": value");
    check::that(std::abs(dot[b] - expected_dot) <= dot_size * 1e-5 + 1e-30, layer + ": dot");
    check::that(in_place[b].data == u[b].data && in_place[b].bias_data == u[b].bias_data && dot[b] == dot_in_place[b],
                layer + ": in place gives the same bits");
  }
}

template <typename T>
void test_precondition_of() {
  const std::string type = sizeof(T) == 8 ? "precondition f64" : "precondition f32";
  const DType own = kDType<T>;
  test_layers<T>(type + " of nothing", {});
  test_layers<T>(type + " small", {{1, 1, false, false, own},
                                   {5, 9, true, false, own},
                                   {32, 32, false, true, own},
                                   {3, 33, true, true, own},
                                   {40, 70, true, false, own},
                                   {130, 20, false, false, own},
                                   {1, 2, true, false, own}});
  test_layers<T>(
      type + " other dtypes",
      {{20, 40, true, false, DType::bf16}, {70, 15, true, false, DType::f16}, {12, 12, false, true, DType::bf16}});
}

}  // namespace

void test_precondition() {
  test_precondition_of<float>();
  test_precondition_of<double>();
  test_layers<float>("precondition f32 whole vectors",
                     {{64, 69, true, false, DType::f32}, {68, 72, false, false, DType::f32}});
  test_layers<float>("precondition f32 large tiles", {{512, 515, true, false, DType::f32}}, 2);
  simt_set_device(65536, 40, 75);  // by FMA
  test_precondition_of<float>();
  test_layers<float>("precondition f32 large tiles by FMA", {{512, 513, true, false, DType::f32}}, 2);
  simt_set_device(232448, 132, 90);
}
