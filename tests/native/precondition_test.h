// precondition against plain double loops, for all element types and layouts of gradients.
#pragma once

#include <memory>

#include "support.h"

namespace kfac_fast::test {

// A gradient [rows, cols] in one of several layouts, its last column perhaps apart.
struct GradientCase {
  int64_t rows, cols;
  bool bias;
  std::unique_ptr<Array> data, bias_data;
  Matrix view;

  GradientCase(DType dtype, int64_t rows_, int64_t cols_, bool bias_, int layout, Random& random)
      : rows(rows_), cols(cols_), bias(bias_) {
    const int64_t d = cols - bias;
    view.dtype = dtype;
    view.row_stride = layout == 0 ? d : layout == 1 ? 1 : 2 * d + 1;
    view.col_stride = layout == 0 ? 1 : layout == 1 ? rows : 2;
    data = std::make_unique<Array>(dtype, (rows + 1) * (2 * d + 1) + 1);
    for (int64_t i = 0; i < (rows + 1) * (2 * d + 1) + 1; ++i) data->set(i, random.normal());
    view.data = data->at(1);
    bias_data = std::make_unique<Array>(dtype, 3 * rows + 1);
    for (int64_t i = 0; i < 3 * rows + 1; ++i) bias_data->set(i, random.normal());
    if (bias) view.bias = bias_data->at(0), view.bias_stride = 3;
  }

  double get(int64_t i, int64_t j) const {
    if (bias && j == cols - 1) return bias_data->get(3 * i);
    return data->get(1 + i * view.row_stride + j * view.col_stride);
  }
};

struct Layer {
  int64_t m, n;
  bool bias;
};

template <typename T>
std::vector<T> random_inverses(const Plan& plan, Random& random) {
  std::vector<T> out(plan.numel(), T(NAN));
  for (int b = 0; b < plan.count(); ++b) {
    const int64_t n = plan.size(b);
    T* block = out.data() + plan.offset(b);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) block[i * n + j] = block[j * n + i] = static_cast<T>(random.normal());
    }
  }
  return out;
}

template <typename T>
void check_precondition(Tally& tally, const OpTable& table, const std::vector<Layer>& layers, DType from, DType to,
                        int layout, bool in_place, int threads) {
  Random random(7);
  std::vector<int32_t> g_sizes, a_sizes;
  for (const Layer& layer : layers) {
    g_sizes.push_back(static_cast<int32_t>(layer.m));
    a_sizes.push_back(static_cast<int32_t>(layer.n));
  }
  const Plan g_plan(g_sizes), a_plan(a_sizes);
  const std::vector<T> g = random_inverses<T>(g_plan, random), a = random_inverses<T>(a_plan, random);
  std::vector<std::unique_ptr<GradientCase>> v, u;
  std::vector<Matrix> gradients, results;
  std::vector<std::vector<double>> values;
  for (const Layer& layer : layers) {
    v.push_back(std::make_unique<GradientCase>(from, layer.m, layer.n, layer.bias, layout, random));
    u.push_back(std::make_unique<GradientCase>(to, layer.m, layer.n, layer.bias, (layout + 1) % 3, random));
    gradients.push_back(v.back()->view);
    results.push_back(in_place ? v.back()->view : u.back()->view);
    values.emplace_back();
    for (int64_t i = 0; i < layer.m; ++i) {
      for (int64_t j = 0; j < layer.n; ++j) values.back().push_back(v.back()->get(i, j));
    }
  }
  std::vector<T> dot(layers.size(), T(-1)), dot_alone(layers.size());
  const auto call = [&](const std::vector<Matrix>& out, std::vector<T>& dots, int on_threads) {
    run(table.precondition_workspace, table.precondition,
        Precondition{g_plan, a_plan, dtype_of<T>(), g.data(), a.data(), gradients.data(), out.data(), dots.data()},
        on_threads);
  };
  if (!in_place) call(results, dot_alone, 1);
  call(results, dot, threads);
  const std::string where = std::string(table.name) + (sizeof(T) == 8 ? " f64" : " f32") + " precondition " +
                            std::to_string(static_cast<int>(from)) + std::to_string(static_cast<int>(to)) + " layout " +
                            std::to_string(layout) + (in_place ? " in place" : "");
  if (!in_place) tally.check(dot == dot_alone, where + " dot does not depend on threads");

  const DType target = in_place ? from : to;
  const double step = target == DType::bf16 ? 1.0 / 256 : target == DType::f16 ? 1.0 / 2048 : 0.0;
  const double epsilon = sizeof(T) == 8 && target != DType::f32 ? 1e-14 : 1e-6;
  for (size_t b = 0; b < layers.size(); ++b) {
    const int64_t m = layers[b].m, n = layers[b].n;
    const T* gi = g.data() + g_plan.offset(static_cast<int>(b));
    const T* ai = a.data() + a_plan.offset(static_cast<int>(b));
    std::vector<double> product(m * n, 0.0);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t k = 0; k < m; ++k) {
        for (int64_t j = 0; j < n; ++j) product[i * n + j] += double(gi[i * m + k]) * values[b][k * n + j];
      }
    }
    double expected_dot = 0, magnitude = 0;
    bool right = true;
    for (int64_t i = 0; i < m; ++i) {
      std::vector<double> row(n, 0.0);
      for (int64_t k = 0; k < n; ++k) {
        for (int64_t j = 0; j < n; ++j) row[j] += product[i * n + k] * double(ai[k * n + j]);
      }
      for (int64_t j = 0; j < n; ++j) {
        const double size = std::sqrt(double(m * n)) * 4;
        const double value = (in_place ? *v[b] : *u[b]).get(i, j);
        right = right &&
                close(value, row[j], epsilon * size * 10 + step * std::fabs(row[j]) + (step > 0 ? 1e-4 * size : 0));
        expected_dot += row[j] * values[b][i * n + j];
        magnitude += std::fabs(row[j] * values[b][i * n + j]);
      }
    }
    const std::string what = where + " m=" + std::to_string(m) + " n=" + std::to_string(n);
    tally.check(right, what + " values");
    tally.check(close(dot[b], expected_dot, (sizeof(T) == 8 ? 1e-13 : 1e-5) * (1 + magnitude)), what + " dot");
  }
}

}  // namespace kfac_fast::test
