// damped_inverse of csrc/cuda in the shim, against Gauss-Jordan elimination in double precision.
#include "check.h"

namespace {

using namespace kfac_fast;

template <typename T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
template <typename T>
const T kNaN = std::numeric_limits<T>::quiet_NaN();

// [n, n] symmetric, positive definite once damped.
std::vector<double> covariance(int n, int rank) {
  std::vector<double> x(static_cast<size_t>(rank) * n), c(static_cast<size_t>(n) * n);
  for (double& v : x) v = check::normal();
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j) {
      double sum = 0;
      for (int k = 0; k < rank; ++k) sum += x[k * n + i] * x[k * n + j];
      c[i * n + j] = c[j * n + i] = sum / rank;
    }
  }
  return c;
}

std::vector<double> inverse_of(std::vector<double> a, int n) {
  for (int k = 0; k < n; ++k) {
    const double pivot = 1 / a[k * n + k];
    a[k * n + k] = 1;
    for (int j = 0; j < n; ++j) a[k * n + j] *= pivot;
    for (int i = 0; i < n; ++i) {
      if (i == k) continue;
      const double factor = a[i * n + k];
      a[i * n + k] = 0;
      for (int j = 0; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
    }
  }
  return a;
}

// One call's arguments. The upper triangles hold NaN: only the lower ones may be read.
template <typename T>
struct Problem {
  Plan plan;
  std::vector<T> blocks, damping, inverse;
  std::vector<int32_t> info;
  std::vector<std::vector<double>> damped;  // exact, per block

  explicit Problem(std::vector<int32_t> sizes)
      : plan(std::move(sizes)),
        blocks(plan.numel(), kNaN<T>),
        damping(plan.count()),
        inverse(plan.numel(), T(7)),
        info(plan.count(), -1) {
    for (int b = 0; b < plan.count(); ++b) {
      const int n = plan.size(b);
      damping[b] = T(0.25) + T(b % 4) / 8;
      damped.push_back(covariance(n, n / 2 + 3));
      for (int i = 0; i < n; ++i) {
        for (int j = 0; j <= i; ++j) {
          blocks[plan.offset(b) + i * n + j] = static_cast<T>(damped[b][i * n + j]);
          damped[b][i * n + j] = damped[b][j * n + i] = static_cast<T>(damped[b][i * n + j]);
        }
        damped[b][i * n + i] += damping[b];
      }
    }
  }
  T& at(int b, int i, int j) { return blocks[plan.offset(b) + static_cast<int64_t>(i) * plan.size(b) + j]; }

  std::string run(bool retry_failed, bool nan_on_failure, bool in_place = false) {
    T* const out = in_place ? blocks.data() : inverse.data();
    const DampedInverse op = {plan, kDType<T>,   blocks.data(), damping.data(),
                              out,  info.data(), retry_failed,  nan_on_failure};
    return check::call(cuda_table().damped_inverse_workspace, cuda_table().damped_inverse, op);
  }
};

template <typename T>
bool block_is(const Problem<T>& p, int b, const std::vector<T>& values, bool (*predicate)(T)) {
  const auto begin = values.begin() + p.plan.offset(b);
  return std::all_of(begin, begin + p.plan.size(b) * static_cast<int64_t>(p.plan.size(b)), predicate);
}

template <typename T>
bool correct(const Problem<T>& p, const std::vector<T>& result, int b) {
  const int n = p.plan.size(b);
  const std::vector<double> expected = inverse_of(p.damped[b], n);
  double error = 0, scale = 0;
  bool symmetric = true;
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      const T value = result[p.plan.offset(b) + static_cast<int64_t>(i) * n + j];
      symmetric = symmetric && value == result[p.plan.offset(b) + static_cast<int64_t>(j) * n + i];
      error = std::max(error, std::abs(static_cast<double>(value) - expected[i * n + j]));
      scale = std::max(scale, std::abs(expected[i * n + j]));
      if (std::isnan(value)) return false;
    }
  }
  return symmetric && error <= scale * (sizeof(T) == 8 ? 1e-13 : 2e-5);
}

template <typename T>
void test_sizes(std::vector<int32_t> sizes, const std::string& what) {
  Problem<T> p(sizes);
  Problem<T> in_place = p;
  check::same_bits_under_every_schedule(what, [&] {
    std::fill(p.inverse.begin(), p.inverse.end(), T(7));
    const std::string error = p.run(false, true);
    check::that(error.empty(), what + ": " + error);
    std::vector<char> bytes;
    check::append_bytes(bytes, p.inverse);
    check::append_bytes(bytes, p.info);
    return bytes;
  });
  for (int b = 0; b < p.plan.count(); ++b) {
    check::that(p.info[b] == 0 && correct(p, p.inverse, b), what + ": n = " + std::to_string(p.plan.size(b)));
    for (int64_t i = p.plan.offset(b) + static_cast<int64_t>(p.plan.size(b)) * p.plan.size(b);
         i < (b + 1 < p.plan.count() ? p.plan.offset(b + 1) : p.plan.numel()); ++i) {
      if (p.inverse[i] != T(7)) check::that(false, what + ": wrote between blocks");
    }
  }
  in_place.run(false, true, true);
  bool same = true;
  for (int b = 0; b < p.plan.count(); ++b) {
    const size_t bytes = sizeof(T) * p.plan.size(b) * p.plan.size(b);
    same = same && std::memcmp(&in_place.blocks[p.plan.offset(b)], &p.inverse[p.plan.offset(b)], bytes) == 0;
  }
  check::that(same, what + ": in place gives the same bits");
}

// Spoils block b of size n so that pivot k (0-based) fails.
template <typename T>
void spoil(Problem<T>& p, int b, int k, int how) {
  switch (how) {
    case 0:
      p.at(b, k, k) = T(-1e3);
      break;  // indefinite
    case 1:
      p.at(b, k, k) = kNaN<T>;
      break;
    case 2:
      p.at(b, k, k) = std::numeric_limits<T>::infinity();
      break;
    case 3:
      p.at(b, k, 0) = k > 0 ? kNaN<T> : -T(1e3);
      break;  // below the diagonal
  }
}

template <typename T>
void test_failures(const std::vector<int32_t>& sizes) {
  for (int how = 0; how < 4; ++how) {
    const std::string what = "damped_inverse failure " + std::to_string(how);
    Problem<T> p(sizes);
    std::vector<int32_t> expected(sizes.size(), 0);
    for (int b = 0; b < p.plan.count(); b += 2) {
      const int k = static_cast<int>(check::generator()() % p.plan.size(b));
      spoil(p, b, k, how);
      expected[b] = k + 1;
    }
    for (const bool nan_on_failure : {true, false}) {
      check::same_bits_under_every_schedule(what, [&] {
        std::fill(p.inverse.begin(), p.inverse.end(), T(7));
        check::that(p.run(false, nan_on_failure).empty(), what + " runs");
        std::vector<char> bytes;
        check::append_bytes(bytes, p.info);
        return bytes;
      });
      check::that(p.info == expected, what + ": info names the pivot");
      for (int b = 0; b < p.plan.count(); ++b) {
        const bool ok = b % 2 != 0       ? correct(p, p.inverse, b)
                        : nan_on_failure ? block_is<T>(p, b, p.inverse, [](T v) { return std::isnan(v); })
                                         : block_is<T>(p, b, p.inverse, [](T v) { return v == T(7); });
        check::that(ok, what + ": n = " + std::to_string(p.plan.size(b)));
      }
    }
    // Retry: blocks that succeeded keep everything, those that failed are worked on with what they hold now.
    std::fill(p.inverse.begin(), p.inverse.end(), T(7));
    Problem<T> healthy(sizes);
    p.blocks = healthy.blocks;
    p.damped = healthy.damped;
    check::that(p.run(true, true).empty(), what + " retry runs");
    for (int b = 0; b < p.plan.count(); ++b) {
      const bool ok = b % 2 == 0 ? p.info[b] == 0 && correct(p, p.inverse, b)
                                 : block_is<T>(p, b, p.inverse, [](T v) { return v == T(7); });
      check::that(ok, what + " retry: n = " + std::to_string(p.plan.size(b)));
    }
  }
}

// Rank n / 4 and mean eigenvalue 1: condition number about 4 / damping. LAPACK's spotrf + spotri are off by 2e-4 to
// 3e-4 here; sweeping with explicit inverses of pivot blocks would be off by 3e-3 and more.
void test_accuracy() {
  for (const int n : {16, 32, 64, 96, 128, 256, 400}) {
    Problem<float> p({n});
    const std::vector<double> c = covariance(n, n / 4);
    double trace = 0;
    for (int i = 0; i < n; ++i) trace += c[i * n + i];
    p.damping[0] = 1e-3f;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        p.at(0, i, j) = static_cast<float>(c[i * n + j] * n / trace);
        p.damped[0][i * n + j] = p.damped[0][j * n + i] = p.at(0, i, j) + (i == j ? static_cast<double>(1e-3f) : 0.0);
      }
    }
    check::that(p.run(false, true).empty(), "damped_inverse of an ill-conditioned block runs");
    const std::vector<double> expected = inverse_of(p.damped[0], n);
    double error = 0, size = 0;
    for (int i = 0; i < n * n; ++i) {
      error += (p.inverse[i] - expected[i]) * (p.inverse[i] - expected[i]);
      size += expected[i] * expected[i];
    }
    check::that(p.info[0] == 0 && error <= 6e-4 * 6e-4 * size, "accuracy, n = " + std::to_string(n));
  }
}

std::vector<int32_t> range(int begin, int end) {
  std::vector<int32_t> sizes;
  for (int n = begin; n <= end; ++n) sizes.push_back(n);
  return sizes;
}

}  // namespace

void test_damped_inverse() {
  test_accuracy();
  test_sizes<float>({}, "damped_inverse f32 of nothing");
  test_sizes<float>(range(1, 70), "damped_inverse f32 small");
  test_sizes<double>(range(1, 70), "damped_inverse f64 small");
  test_sizes<float>({0, 5, 0, 40}, "damped_inverse f32 with empty blocks");
  test_sizes<float>({300, 4, 193, 96, 97, 128, 8, 9, 129, 192, 256, 31, 304}, "damped_inverse f32 mixed");
  test_sizes<double>({208, 4, 193, 96, 97, 128, 8, 9, 129, 33, 144, 31}, "damped_inverse f64 mixed");
  simt_set_device(65536, 40, 75);
  test_sizes<float>({143, 144, 90}, "damped_inverse f32 with 64 KiB of shared memory");
  test_sizes<double>({96, 95}, "damped_inverse f64 with 64 KiB of shared memory");
  test_sizes<float>({145, 448, 20, 300, 256, 257, 191, 192, 193}, "damped_inverse f32 global class");
  test_sizes<double>({97, 256, 20, 129, 128, 191}, "damped_inverse f64 global class");
  test_failures<float>({300, 150, 200, 192, 145, 400});
  test_failures<double>({100, 150, 129, 192});
  simt_set_device(65536, 132, 90);
  test_sizes<float>({145, 448, 20, 257, 192}, "damped_inverse f32 global class on tensor cores");
  test_failures<float>({300, 150, 192, 400});
  simt_set_device(232448, 132, 90);
  test_failures<float>({1, 1, 7, 8, 12, 16, 5, 32, 32, 20, 50, 64, 33, 100, 150, 130, 200, 33});
  test_failures<double>({1, 2, 7, 8, 12, 16, 5, 32, 32, 20, 50, 64, 33, 100, 150, 33});
}
