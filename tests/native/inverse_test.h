// damped_inverse against the definition: (C + damping I) inverse = I, and the promises about failure.
#pragma once

#include "support.h"

namespace kfac_fast::test {

// Random Gram matrix of 2 n rows: condition number about 30.
inline std::vector<double> random_covariance(int64_t n, Random& random) {
  const int64_t m = 2 * n;
  std::vector<double> x(m * n), c(n * n, 0.0);
  for (double& value : x) value = random.normal();
  for (int64_t k = 0; k < m; ++k) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) c[i * n + j] += x[k * n + i] * x[k * n + j] / m;
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) c[j * n + i] = c[i * n + j];
  }
  return c;
}

// Largest entry of (C + damping I) inverse - I, C given by its lower triangle.
template <typename T>
double residual(const T* c, double damping, const T* inverse, int64_t n) {
  std::vector<double> row(n);
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::fill(row.begin(), row.end(), 0.0);
    for (int64_t k = 0; k < n; ++k) {
      const double value = (k <= i ? c[i * n + k] : c[k * n + i]) + (i == k ? damping : 0.0);
      for (int64_t j = 0; j < n; ++j) row[j] += value * inverse[k * n + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      const double error = std::fabs(row[j] - (i == j));
      worst = error <= worst ? worst : error;  // a NaN becomes the worst
    }
  }
  return worst;
}

template <typename T>
struct InverseCase {
  Plan plan;
  std::vector<T> blocks, damping, inverse;
  std::vector<int32_t> info;

  InverseCase(std::vector<int32_t> sizes, uint64_t seed)
      : plan(std::move(sizes)),
        blocks(plan.numel(), T(0)),
        damping(plan.count()),
        inverse(plan.numel(), T(7)),
        info(plan.count(), -1) {
    Random random(seed);
    for (int b = 0; b < plan.count(); ++b) {
      const int64_t n = plan.size(b);
      const std::vector<double> c = random_covariance(n, random);
      for (int64_t i = 0; i < n; ++i) {
        // Only the lower triangle may be read.
        for (int64_t j = 0; j < n; ++j) block(b)[i * n + j] = j <= i ? static_cast<T>(c[i * n + j]) : T(NAN);
      }
      damping[b] = static_cast<T>(0.01 * (1 + b % 7));
    }
  }

  T* block(int b) { return blocks.data() + plan.offset(b); }
  T* result(int b) { return inverse.data() + plan.offset(b); }

  void invert(const OpTable& table, int threads, bool retry_failed = false, bool nan_on_failure = true,
              bool in_place = false) {
    const DampedInverse op{
        plan,        dtype_of<T>(), blocks.data(), damping.data(), in_place ? blocks.data() : inverse.data(),
        info.data(), retry_failed,  nan_on_failure};
    run(table.damped_inverse_workspace, table.damped_inverse, op, threads);
  }
};

template <typename T>
void check_inverse(Tally& tally, const OpTable& table, const std::vector<int32_t>& sizes, int threads) {
  InverseCase<T> given(sizes, 1);
  given.invert(table, threads);
  const std::string where = std::string(table.name) + (sizeof(T) == 8 ? " f64" : " f32") + " inverse ";
  for (int b = 0; b < given.plan.count(); ++b) {
    const int64_t n = given.plan.size(b);
    const double tolerance = (sizeof(T) == 8 ? 1e-13 : 2e-5) * (1 + 0.02 * n);
    const std::string what = where + "n=" + std::to_string(n);
    tally.check(given.info[b] == 0, what + " info");
    tally.check(residual(given.block(b), given.damping[b], given.result(b), n) < tolerance, what + " residual");
    tally.check(is_symmetric(given.result(b), n), what + " symmetric");
  }

  InverseCase<T> alone(sizes, 1);
  alone.invert(table, 1);
  tally.check(identical(alone.inverse, given.inverse), where + "does not depend on threads");
  InverseCase<T> in_place(sizes, 1);
  in_place.invert(table, threads, false, true, true);
  bool same = true;
  for (int b = 0; b < given.plan.count(); ++b) {
    const int64_t n = given.plan.size(b);
    same = same && identical(in_place.block(b), given.result(b), n * n);
  }
  tally.check(same, where + "in place");
}

// One bad pivot per block, at every kind of position; the neighbours must not notice.
template <typename T>
void check_failures(Tally& tally, const OpTable& table, int32_t n, int threads) {
  const std::string what =
      std::string(table.name) + (sizeof(T) == 8 ? " f64" : " f32") + " failing n=" + std::to_string(n);
  const double bad[] = {-1.0, 0.0, NAN, INFINITY};
  for (int kind = 0; kind < 4; ++kind) {
    const std::vector<int32_t> sizes(11, n);
    InverseCase<T> given(sizes, 2), expected(sizes, 2);
    expected.invert(table, 1);
    Random random(3 + kind);
    std::vector<int64_t> at(sizes.size());
    for (size_t b = 1; b < sizes.size(); b += 2) {
      at[b] = b == 1 ? 0 : b == 3 ? n - 1 : random.between(0, n - 1);
      const int64_t k = at[b];
      for (int64_t j = 0; j < k; ++j) given.block(b)[k * n + j] = T(0);
      given.block(b)[k * n + k] = static_cast<T>(bad[kind] - (kind < 2 ? given.damping[b] : T(0)));
    }
    given.invert(table, threads, false, kind % 2 == 0);
    for (size_t b = 0; b < sizes.size(); ++b) {
      const T* result = given.result(static_cast<int>(b));
      const int64_t numel = int64_t{n} * n;
      if (b % 2 == 0) {
        tally.check(given.info[b] == 0 && identical(result, expected.result(static_cast<int>(b)), numel),
                    what + " neighbours untouched");
        continue;
      }
      tally.check(given.info[b] == at[b] + 1, what + " info of kind " + std::to_string(kind) + ": " +
                                                  std::to_string(given.info[b]) + " for " + std::to_string(at[b] + 1));
      bool filled = true;
      for (int64_t i = 0; i < numel; ++i)
        filled = filled && (kind % 2 == 0 ? std::isnan(result[i]) : result[i] == T(7));
      tally.check(filled, what + " NaN or untouched");
    }

    // A second attempt with the failures repaired works on these only.
    const std::vector<T> before = given.inverse;
    for (size_t b = 1; b < sizes.size(); b += 2) {
      std::memcpy(given.block(static_cast<int>(b)), expected.block(static_cast<int>(b)), sizeof(T) * n * n);
    }
    given.damping[0] = T(100);
    given.invert(table, threads, true);
    tally.check(given.inverse == expected.inverse, what + " retry");
    tally.check(given.info == expected.info, what + " info after retry");
  }
}

// Rows and columns times powers of two: the inverse is divided by the same, down to the end of the range of float32.
template <typename T>
void check_scales(Tally& tally, const OpTable& table, int32_t n, int power) {
  InverseCase<T> given({n}, 6), scaled({n}, 6);
  const auto exponent = [&](int64_t i, int64_t j) { return power + static_cast<int>(i % 5 + j % 5) - 4; };
  for (int64_t i = 0; i < n; ++i) {
    given.block(0)[i * n + i] += given.damping[0];
    for (int64_t j = 0; j <= i; ++j) scaled.block(0)[i * n + j] = std::ldexp(given.block(0)[i * n + j], exponent(i, j));
  }
  given.damping[0] = scaled.damping[0] = T(0);
  given.invert(table, 1);
  scaled.invert(table, 1);
  double largest = 0, error = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double expected = given.result(0)[i * n + j];
      const double difference = std::fabs(std::ldexp(double(scaled.result(0)[i * n + j]), exponent(i, j)) - expected);
      largest = std::max(largest, std::fabs(expected));
      error = difference <= error ? error : difference;  // a NaN becomes the error
    }
  }
  tally.check(scaled.info[0] == 0 && error <= 1e-6 * largest,
              std::string(table.name) + " inverse n=" + std::to_string(n) + " times 2^" + std::to_string(power));
}

}  // namespace kfac_fast::test
