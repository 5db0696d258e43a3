// Every CPU table that this machine can run, against straightforward double loops.
//   cpu_ops_test               a sample of sizes (a few seconds)
//   cpu_ops_test --exhaustive  every block size 1..300
//   cpu_ops_test --threads N   at most N threads (default 4)
#include <sys/wait.h>
#include <unistd.h>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../../csrc/cpu/parallel.h"

#include "factor_update_test.h"
#include "inverse_test.h"
#include "precondition_test.h"
#include "split_float_test.h"

namespace kfac_fast::test {
namespace {

constexpr DType kElements[] = {DType::f32, DType::f64, DType::f16, DType::bf16};

struct Options {
  bool exhaustive = false;
  int threads = 4;
};

std::vector<int32_t> block_sizes(const Options& options) {
  if (!options.exhaustive)
    return {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 48, 49, 63, 64, 65, 97, 128, 145, 200, 259};
  std::vector<int32_t> sizes;
  for (int32_t n = 1; n <= 300; ++n) sizes.push_back(n);
  return sizes;
}

template <typename T>
void test_inverse(Tally& tally, const OpTable& table, const Options& options) {
  std::vector<int32_t> sizes = block_sizes(options);
  check_inverse<T>(tally, table, {}, options.threads);
  check_inverse<T>(tally, table, {0, 1, 0}, options.threads);
  check_inverse<T>(tally, table, sizes, options.threads);
  check_inverse<T>(tally, table, std::vector<int32_t>(37, 13), options.threads);  // many alike
  check_inverse<T>(tally, table, {540, 3, 390}, options.threads);                 // threads within a block
  for (const int32_t n : {1, 5, 8, 16, 23, 40, 64, 100, 150}) check_failures<T>(tally, table, n, options.threads);
  for (const int32_t n : {20, 100, 150, 290}) {
    for (const int power : {-116, 100}) check_scales<T>(tally, table, n, power);
  }
}

template <typename T>
void test_rows(Tally& tally, const OpTable& table, const Options& options) {
  Random random(4);
  for (const DType element : kElements) {
    if (element == DType::f64 && sizeof(T) == 4) continue;
    for (int layout = 0; layout < 5; ++layout) {
      std::vector<RowsCase> cases;
      const int64_t m[] = {0, 1, 3, 64, 200, 333};
      for (int64_t d = 0; d < 70; d += options.exhaustive ? 1 : 7) {
        cases.push_back(plain_rows(element, m[d % 6], d, d % 3 != 0, layout, random));
      }
      const std::string name =
          "rows " + std::to_string(static_cast<int>(element)) + " layout " + std::to_string(layout);
      check_factor_update<T>(tally, table, cases, name, options.threads, layout % 2 == 1);
    }
  }
  std::vector<RowsCase> none;
  check_factor_update<T>(tally, table, none, "no blocks", options.threads, false);
  for (const DType element : {DType::f32, DType::bf16}) {
    std::vector<RowsCase> long_rows;
    long_rows.push_back(plain_rows(element, 5000, 30, true, 0, random));    // several segments, one thread each
    long_rows.push_back(plain_rows(element, 4100, 100, false, 0, random));  // several segments, side by side
    long_rows.push_back(plain_rows(element, 700, 260, true, 0, random));    // tiles side by side
    long_rows.push_back(plain_rows(element, 300, 520, true, 1, random));
    for (const bool weighted : {false, true}) {
      check_factor_update<T>(tally, table, long_rows, "long rows", options.threads, weighted);
    }
  }
}

template <typename T>
void test_nonfinite(Tally& tally, const OpTable& table, const Options& options) {
  Random random(8);
  // 1e25 overflows the square in f32 and not in f64.
  for (const double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY), 1e25}) {
    std::vector<RowsCase> cases;
    for (int b = 0; b < 12; ++b) {
      cases.push_back(plain_rows(DType::f32, 40, 5 + 4 * b, b % 2 == 0, 0, random));
      if (b % 4 != 0) continue;
      RowsCase& given = cases.back();
      const int64_t r = b % 40, c = given.rows.d - 1 - b / 4;
      given.data->set(1 + r * given.rows.row_stride + c, poison);
      given.values[r * (given.rows.d + given.rows.bias) + c] = poison == 1e25 ? static_cast<float>(poison) : poison;
    }
    check_factor_update<T>(tally, table, cases, "nonfinite", options.threads, false, poison);
  }
}

template <typename T>
void test_conv(Tally& tally, const OpTable& table, const Options& options) {
  Random random(9);
  const PaddingMode modes[] = {PaddingMode::zeros, PaddingMode::reflect, PaddingMode::replicate, PaddingMode::circular};
  for (const PaddingMode mode : modes) {
    for (const DType element : {DType::f32, DType::bf16}) {
      std::vector<RowsCase> cases;
      const int trials = options.exhaustive ? 60 : 12;
      for (int trial = 0; trial < trials; ++trial) {
        Conv conv;
        conv.mode = mode;
        conv.batch = random.between(1, 3);
        const bool wide = trial % 4 == 0;  // most windows overlap: no patches are formed
        conv.channels = random.between(1, wide ? 30 : 9);
        for (int axis = 2 - trial % 3; axis < 3; ++axis) {
          conv.kernel[axis] = random.between(1, trial % 3 == 2 ? 3 : 4);
          conv.stride[axis] = trial % 2 == 0 ? 1 : random.between(1, 3);
          conv.dilation[axis] = trial % 8 < 4 ? 1 : random.between(1, 3);
          const int64_t reach = conv.dilation[axis] * (conv.kernel[axis] - 1);
          conv.pad[axis] = random.between(0, 3);
          conv.size[axis] = reach + 1 + random.between(conv.pad[axis], 6) + (wide ? 4 * reach : 0);
        }
        cases.push_back(conv_rows(element, with_output(conv), trial % 2 == 0, trial % 5 == 0, random));
      }
      const std::string name = "conv mode " + std::to_string(static_cast<int>(mode));
      for (const bool weighted : {false, true}) {
        check_factor_update<T>(tally, table, cases, name, options.threads, weighted);
      }
    }
  }
  // Large enough for threads within the block.
  std::vector<RowsCase> cases;
  for (const int64_t stride : {1, 2}) {
    Conv conv;
    conv.batch = 8 * stride, conv.channels = 24, conv.size[1] = conv.size[2] = 14, conv.kernel[1] = conv.kernel[2] = 3;
    conv.pad[1] = conv.pad[2] = 1, conv.stride[1] = stride;
    cases.push_back(conv_rows(DType::f32, with_output(conv), true, false, random));
  }
  check_factor_update<T>(tally, table, cases, "large conv", options.threads, false);
}

// Batches large enough for groups of images, most windows overlapping.
template <typename T>
void test_image_groups(Tally& tally, const OpTable& table, const Options& options) {
  Random random(12);
  const PaddingMode modes[] = {PaddingMode::zeros, PaddingMode::reflect, PaddingMode::replicate, PaddingMode::circular};
  const auto images = [&](PaddingMode mode, int64_t batch, int64_t channels, const int64_t (&kernel)[2], int64_t step,
                          int64_t more) {
    Conv conv;
    conv.mode = mode, conv.batch = batch, conv.channels = channels;
    for (int axis = 1; axis < 3; ++axis) {
      conv.kernel[axis] = kernel[axis - 1], conv.dilation[axis] = conv.kernel[axis] > 1 ? step : 1;
      const int64_t reach = (conv.kernel[axis] - 1) * conv.dilation[axis];
      conv.pad[axis] = random.between(0, 2);
      const int64_t least = reach == 0 ? conv.pad[axis] : 0;  // no more is reflected than there is
      conv.size[axis] = 5 * reach + 1 + random.between(least, 2) + (axis == 2 ? more : 0);
    }
    return with_output(conv);
  };
  for (const DType element : kElements) {
    if (element == DType::f64 && sizeof(T) == 4) continue;
    std::vector<RowsCase> cases;
    for (int trial = 0; trial < (options.exhaustive ? 80 : 8); ++trial) {
      const int64_t channels[] = {16, 3, 32, 17, 5, 20, 1, 33};
      const Conv conv = images(modes[trial % 4], random.between(8, trial % 2 == 0 ? 12 : 70), channels[trial % 8],
                               {trial % 4 == 3 ? 1 : 2, 1 + trial % 3}, 1 + trial % 5 / 4, 0);
      if (conv.kernel[1] * conv.kernel[2] == 1) continue;
      cases.push_back(conv_rows(element, conv, trial % 3 == 0, trial % 5 == 1, random));
    }
    const bool few = !options.exhaustive && element != DType::f32;
    // Several blocks of channels, the last of ones alone; strips of a long line; a large kernel; bands of lines that
    // threads share.
    if (!few) cases.push_back(conv_rows(element, images(PaddingMode::zeros, 9, 80, {1, 2}, 1, 3), true, false, random));
    if (!few) cases.push_back(conv_rows(element, images(PaddingMode::zeros, 8, 64, {1, 2}, 1, 0), true, true, random));
    cases.push_back(conv_rows(element, images(PaddingMode::zeros, 35, 4, {1, 3}, 2, 130), false, false, random));
    cases.push_back(conv_rows(element, images(PaddingMode::replicate, 8, 2, {3, 3}, 4, 0), true, false, random));
    if (!few) cases.push_back(conv_rows(element, images(PaddingMode::zeros, 8, 2, {5, 5}, 1, 0), false, false, random));
    if (!few) cases.push_back(conv_rows(element, images(PaddingMode::zeros, 8, 2, {1, 7}, 30, 0), true, true, random));
    if (!few) {
      Conv conv = images(PaddingMode::zeros, 33, 33, {3, 3}, 1, 0);
      conv.size[1] = 34;
      cases.push_back(conv_rows(element, with_output(conv), true, false, random));
    }
    check_factor_update<T>(tally, table, cases, "groups of images " + std::to_string(static_cast<int>(element)),
                           options.threads, false);
  }
  for (const double poison : {0.0, static_cast<double>(NAN), static_cast<double>(INFINITY), 1e25}) {
    std::vector<RowsCase> cases;
    cases.push_back(conv_rows(DType::f32, images(PaddingMode::zeros, 33, 18, {3, 3}, 1, 0), true, false, random));
    RowsCase& given = cases.back();
    given.data->set(0, NAN);  // the other group's
    const int64_t image = 32 * given.conv.batch_stride, channel = given.conv.channels + 1;
    given.data->set(image + channel * given.conv.channel_stride + given.conv.size[2] + 1, poison);
    given.values.clear();
    add_conv_values(given);
    check_factor_update<T>(tally, table, cases, "groups of images, nonfinite", options.threads, false, poison);
  }
}

template <typename T>
void test_precondition(Tally& tally, const OpTable& table, const Options& options) {
  const std::vector<Layer> small = {{1, 1, false},    {1, 1, true},    {1, 9, true},    {8, 8, false},
                                    {24, 24, true},   {5, 25, true},   {31, 7, true},   {64, 65, true},
                                    {49, 100, false}, {130, 33, true}, {150, 129, true}};
  for (const DType from : kElements) {
    for (const DType to : kElements) {
      for (int layout = 0; layout < 3; ++layout) {
        check_precondition<T>(tally, table, small, from, to, layout, false, options.threads);
      }
    }
    for (int layout = 0; layout < 3; ++layout) {
      check_precondition<T>(tally, table, small, from, from, layout, true, options.threads);
    }
  }
  check_precondition<T>(tally, table, {}, DType::f32, DType::f32, 0, false, options.threads);
  for (const bool in_place : {false, true}) {
    check_precondition<T>(tally, table, {{260, 300, true}, {10, 10, true}, {330, 200, false}}, DType::f32, DType::f32,
                          0, in_place, options.threads);
  }
}

// Every 16-bit pattern goes through a factor update of one row and through precondition with unit inverses.
void test_conversions(Tally& tally, const OpTable& table) {
  for (const DType element : {DType::f16, DType::bf16}) {
    const int64_t count = 1 << 16;
    Array from(element, count), to(DType::f32, count), back(element, count);
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = static_cast<uint16_t>(i);
      std::memcpy(from.at(i), &bits, 2);
    }
    const Plan one(std::vector<int32_t>(count, 1));
    const std::vector<float> unit(one.numel(), 1.0f);
    std::vector<float> dot(count);
    std::vector<Matrix> a(count), b(count), c(count);
    for (int64_t i = 0; i < count; ++i) {
      a[i].data = from.at(i), a[i].dtype = element;
      b[i].data = to.at(i), b[i].dtype = DType::f32;
      c[i].data = back.at(i), c[i].dtype = element;
    }
    const auto copy = [&](const std::vector<Matrix>& source, const std::vector<Matrix>& target) {
      run(table.precondition_workspace, table.precondition,
          Precondition{one, one, DType::f32, unit.data(), unit.data(), source.data(), target.data(), dot.data()}, 1);
    };
    copy(a, b);
    bool widened = true, exact = true, rounded = true;
    for (int64_t i = 0; i < count; ++i) widened = widened && close(to.get(i), from.get(i), 0.0);
    copy(b, c);
    for (int64_t i = 0; i < count; ++i) exact = exact && close(back.get(i), from.get(i), 0.0);
    Random random(10);
    Array expected(element, count);
    for (int64_t i = 0; i < count; ++i) {
      // Around neighbours of every encoding: halves are ties.
      const double here = from.get(i), quarter = static_cast<double>(random.between(-4, 4)) / 4;
      const uint16_t next_bits = static_cast<uint16_t>(i ^ 1);
      Array next(element, 1);
      std::memcpy(next.at(0), &next_bits, 2);
      to.set(i, here + (next.get(0) - here) * quarter);
      expected.set(i, to.get(i));
    }
    copy(b, c);
    for (int64_t i = 0; i < count; ++i) rounded = rounded && close(back.get(i), expected.get(i), 0.0);
    const std::string what = std::string(table.name) + (element == DType::f16 ? " f16" : " bf16");
    tally.check(widened, what + " widening is exact");
    tally.check(exact, what + " narrowing what fits is exact");
    tally.check(rounded, what + " narrowing rounds to nearest even");
  }
}

// OpenMP's threads do not survive a fork: the child must manage without them.
void test_fork(Tally& tally, const OpTable& table, const Options& options) {
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    Tally own;
    check_inverse<float>(own, table, {64, 32, 16, 64}, options.threads);
    _exit(own.failed == 0 ? 0 : 1);
  }
  int status = 1;
  tally.check(waitpid(child, &status, 0) == child && status == 0, std::string(table.name) + " after fork");
}

// Inside somebody else's parallel region every call keeps to its own thread.
void test_nested(Tally& tally, const OpTable& table) {
#if defined(_OPENMP) && !defined(KFAC_FAST_STD_THREADS)
  Tally inner[2];
  bool alone[2] = {false, false};
#pragma omp parallel num_threads(2)
  {
    const int thread = omp_get_thread_num();
    alone[thread] = cpu::usable_threads(4) == 1;
    check_inverse<float>(inner[thread], table, {400, 64, 16, 16}, 4);
  }
  for (int thread = 0; thread < 2; ++thread) {
    tally.check(alone[thread] && inner[thread].passed > 0 && inner[thread].failed == 0,
                std::string(table.name) + " nested");
  }
#else
  (void)tally, (void)table;
#endif
}

template <typename T>
void test_all(Tally& tally, const OpTable& table, const Options& options) {
  test_inverse<T>(tally, table, options);
  test_rows<T>(tally, table, options);
  test_nonfinite<T>(tally, table, options);
  test_conv<T>(tally, table, options);
  test_image_groups<T>(tally, table, options);
  test_precondition<T>(tally, table, options);
  check_commit<T>(tally, table, {3, 0, 1, 200, 17, 64}, options.threads);
  check_commit<T>(tally, table, {}, options.threads);
}

}  // namespace
}  // namespace kfac_fast::test

int main(int argc, char** argv) {
  using namespace kfac_fast;
  test::Options options;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--exhaustive") == 0) options.exhaustive = true;
    if (std::strcmp(argv[i], "--threads") == 0 && i + 1 < argc) options.threads = std::atoi(argv[++i]);
  }
  test::Tally tally;
  test::test_split_float(tally, options.exhaustive);
  for (const OpTable* table : cpu_tables()) {
    const int64_t failed_before = tally.failed;
    test::test_all<float>(tally, *table, options);
    test::test_all<double>(tally, *table, options);
    test::test_conversions(tally, *table);
    test::test_nested(tally, *table);
    test::test_fork(tally, *table, options);
    std::printf("%s: %s\n", table->name, tally.failed == failed_before ? "ok" : "FAILED");
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(tally.passed), static_cast<long long>(tally.failed));
  return tally.failed == 0 ? 0 : 1;
}
