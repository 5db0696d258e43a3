// factor_update and commit against plain double loops over the rows, convolutions included.
#pragma once

#include <memory>

#include "support.h"

namespace kfac_fast::test {

// The rows of one block with everything they borrow, and their values in double.
struct RowsCase {
  Rows rows;
  Conv conv;
  std::unique_ptr<Array> data;
  std::vector<double> values;  // [m, d + bias], before weighting
};

inline RowsCase plain_rows(DType dtype, int64_t m, int64_t d, bool bias, int layout, Random& random) {
  RowsCase out;
  Rows& rows = out.rows;
  rows.dtype = dtype;
  rows.m = m;
  rows.d = d;
  rows.bias = bias;
  switch (layout) {
    case 0:  // contiguous
      rows.row_stride = d, rows.col_stride = 1;
      break;
    case 1:  // a view of wider rows
      rows.row_stride = d + 3, rows.col_stride = 1;
      break;
    case 2:  // transposed
      rows.row_stride = 1, rows.col_stride = m + 1;
      break;
    case 3:  // one row expanded
      rows.row_stride = 0, rows.col_stride = 1;
      break;
    default:  // nothing contiguous
      rows.row_stride = 2 * d + 5, rows.col_stride = 2;
  }
  const int64_t last = m > 0 && d > 0 ? (m - 1) * rows.row_stride + (d - 1) * rows.col_stride : -1;
  out.data = std::make_unique<Array>(dtype, last + 2);
  for (int64_t i = 0; i <= last + 1; ++i) out.data->set(i, random.normal());
  rows.data = out.data->at(1);  // off any alignment
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < d; ++c) out.values.push_back(out.data->get(1 + r * rows.row_stride + c * rows.col_stride));
    if (bias) out.values.push_back(1.0);
  }
  return out;
}

// Reflection and so on by walking, one step at a time; -1 for a padded zero.
inline int64_t reference_index(int64_t i, int64_t size, PaddingMode mode) {
  while (i < 0 || i >= size) {
    if (mode == PaddingMode::zeros) return -1;
    if (mode == PaddingMode::replicate) i = i < 0 ? 0 : size - 1;
    if (mode == PaddingMode::circular) i += i < 0 ? size : -size;
    if (mode == PaddingMode::reflect) i = i < 0 ? -i : 2 * (size - 1) - i;
  }
  return i;
}

// The patches of a case whose rows, convolution and data are there.
inline void add_conv_values(RowsCase& given) {
  const Conv& conv = given.conv;
  const int64_t base = conv.channels * conv.channel_stride;
  for (int64_t r = 0; r < given.rows.m; ++r) {
    for (int64_t c = 0; c < given.rows.d; ++c) {
      int64_t row = r, column = c, place = base;
      bool padded = false;
      for (int axis = 2; axis >= 0; --axis) {
        const int64_t i = reference_index(row % conv.out[axis] * conv.stride[axis] - conv.pad[axis] +
                                              column % conv.kernel[axis] * conv.dilation[axis],
                                          conv.size[axis], conv.mode);
        padded = padded || i < 0;
        place += i * conv.spatial_stride[axis];
        row /= conv.out[axis];
        column /= conv.kernel[axis];
      }
      place += row * conv.batch_stride + column * conv.channel_stride;
      given.values.push_back(padded ? 0.0 : given.data->get(place));
    }
    if (given.rows.bias) given.values.push_back(1.0);
  }
}

inline RowsCase conv_rows(DType dtype, Conv conv, bool bias, bool channels_last, Random& random) {
  RowsCase out;
  const int64_t groups = 2;  // the block is the second group of the input's channels
  const int64_t all = groups * conv.channels;
  const int64_t space = conv.size[0] * conv.size[1] * conv.size[2];
  conv.channel_stride = channels_last ? 1 : space;
  conv.spatial_stride[2] = channels_last ? all : 1;
  conv.spatial_stride[1] = conv.spatial_stride[2] * conv.size[2];
  conv.spatial_stride[0] = conv.spatial_stride[1] * conv.size[1];
  conv.batch_stride = all * space;
  out.data = std::make_unique<Array>(dtype, conv.batch * conv.batch_stride);
  for (int64_t i = 0; i < conv.batch * conv.batch_stride; ++i) out.data->set(i, random.normal());
  const int64_t base = conv.channels * conv.channel_stride;
  out.rows.data = out.data->at(base);
  out.rows.dtype = dtype;
  out.rows.m = conv.batch * conv.out[0] * conv.out[1] * conv.out[2];
  out.rows.d = conv.channels * conv.kernel[0] * conv.kernel[1] * conv.kernel[2];
  out.rows.bias = bias;
  out.conv = conv;
  add_conv_values(out);
  return out;
}

// The output size of each axis from the rest, with the same padding on both sides.
inline Conv with_output(Conv conv) {
  for (int axis = 0; axis < 3; ++axis) {
    const int64_t reach = conv.dilation[axis] * (conv.kernel[axis] - 1);
    conv.out[axis] = (conv.size[axis] + 2 * conv.pad[axis] - reach - 1) / conv.stride[axis] + 1;
  }
  return conv;
}

// Runs all cases as the blocks of one call, and checks every promise of the op.
template <typename T>
void check_factor_update(Tally& tally, const OpTable& table, std::vector<RowsCase>& cases, const std::string& name,
                         int threads, bool weighted, double poison = 0.0) {
  std::vector<int32_t> sizes;
  std::vector<Rows> rows;
  std::vector<std::vector<T>> weights;
  Random random(5);
  for (RowsCase& given : cases) {
    if (given.conv.channels > 0) given.rows.conv = &given.conv;
    sizes.push_back(static_cast<int32_t>(given.rows.d + given.rows.bias));
    weights.emplace_back();
    for (int64_t r = 0; r < given.rows.m; ++r) weights.back().push_back(static_cast<T>(random.between(0, 9) / 4.0));
    given.rows.weights = weighted ? weights.back().data() : nullptr;
    rows.push_back(given.rows);
  }
  const Plan plan(sizes);
  const int count = plan.count();
  std::vector<T> before(plan.numel(), T(0)), decay(count), scale(count), trace(count, T(-1));
  std::vector<int32_t> nonfinite(count, -1);
  for (int b = 0; b < count; ++b) {
    const int64_t n = plan.size(b);
    decay[b] = static_cast<T>(b % 3 == 0 ? 0.0 : 0.9);
    scale[b] = static_cast<T>(1.0 / (1 + rows[b].m));
    for (int64_t i = 0; i < n * n; ++i) {
      before[plan.offset(b) + i] = b % 3 == 0 ? T(NAN) : static_cast<T>((i % n) * (i / n) % 5);
    }
  }
  std::vector<T> factors = before, again = before;
  run(table.factor_update_workspace, table.factor_update,
      FactorUpdate{plan, dtype_of<T>(), factors.data(), rows.data(), decay.data(), scale.data(), trace.data(),
                   nonfinite.data()},
      threads);
  std::vector<T> other_trace(count);
  std::vector<int32_t> other_nonfinite(count);
  run(table.factor_update_workspace, table.factor_update,
      FactorUpdate{plan, dtype_of<T>(), again.data(), rows.data(), decay.data(), scale.data(), other_trace.data(),
                   other_nonfinite.data()},
      1);
  const std::string where = std::string(table.name) + (sizeof(T) == 8 ? " f64 " : " f32 ") + name;
  tally.check(identical(factors, again), where + " does not depend on threads");

  for (int b = 0; b < count; ++b) {
    const int64_t n = plan.size(b), m = rows[b].m;
    const std::string what =
        where + " block " + std::to_string(b) + " m=" + std::to_string(m) + " n=" + std::to_string(n);
    std::vector<double> sum(n * n, 0.0);
    for (int64_t r = 0; r < m; ++r) {
      const double* x = cases[b].values.data() + r * n;
      const double weight = weighted ? static_cast<double>(weights[b][r]) : 1.0;
      for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) sum[i * n + j] += weight * x[i] * x[j];
      }
    }
    const T* c = factors.data() + plan.offset(b);
    double worst = 0, expected_trace = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const double s = sum[i * n + j];
        const double old = b % 3 == 0 ? 0.0 : before[plan.offset(b) + i * n + j];
        const double expected = static_cast<double>(decay[b]) * old + static_cast<double>(scale[b]) * s;
        finite = finite && std::isfinite(s) && std::fabs(s) < (sizeof(T) == 8 ? 1.7e308 : 3.4e38);
        if (std::isfinite(expected)) worst = std::fmax(worst, std::fabs(c[i * n + j] - expected));
        if (i == j) expected_trace += expected;
      }
    }
    const double tolerance = sizeof(T) == 8 ? 1e-13 : 3e-6;
    tally.check(nonfinite[b] == !finite, what + " nonfinite flag");
    tally.check(is_symmetric(c, n), what + " symmetric");
    if (!finite || poison != 0.0) continue;
    tally.check(worst <= tolerance * 6, what + " values, off by " + std::to_string(worst));
    tally.check(close(trace[b], expected_trace, tolerance * 8 * (1 + std::fabs(expected_trace))), what + " trace");
  }
}

template <typename T>
void check_commit(Tally& tally, const OpTable& table, const std::vector<int32_t>& sizes, int threads) {
  const Plan plan(sizes);
  const int count = plan.count();
  Random random(6);
  for (const int32_t gate : {1, 0}) {
    std::vector<T> c(plan.numel(), T(0)), s(plan.numel(), T(0)), decay(count), scale(count), trace(count, T(-1));
    for (T& value : c) value = static_cast<T>(random.normal());
    for (T& value : s) value = static_cast<T>(random.normal());
    for (int b = 0; b < count; ++b)
      decay[b] = static_cast<T>(b % 2 == 0 ? 0.5 : 0.0), scale[b] = static_cast<T>(0.25 * b);
    const std::vector<T> old = c, pending = s;
    run(table.commit_workspace, table.commit,
        Commit{plan, dtype_of<T>(), c.data(), s.data(), decay.data(), scale.data(), &gate, trace.data()}, threads);
    bool right = true;
    for (int b = 0; b < count; ++b) {
      const int64_t n = plan.size(b);
      double expected_trace = 0;
      for (int64_t i = 0; i < n * n; ++i) {
        const int64_t at = plan.offset(b) + i;
        const double expected = gate ? double(decay[b]) * old[at] + double(scale[b]) * pending[at] : double(old[at]);
        right = right && close(c[at], expected, 1e-6 * (1 + std::fabs(expected))) && s[at] == T(0);
        if (i % (n + 1) == 0) expected_trace += expected;
      }
      right = right && close(trace[b], expected_trace, 1e-5 * (1 + n));
    }
    tally.check(right, std::string(table.name) + " commit with gate " + std::to_string(gate));
  }
}

}  // namespace kfac_fast::test
