// Shared by the native tests: a counter of checks, random numbers, memory with guarded borders.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/ops.h"

namespace kfac_fast::test {

struct Tally {
  int64_t passed = 0, failed = 0;

  void check(bool ok, const std::string& what) {
    ok ? ++passed : ++failed;
    if (!ok && failed <= 20) std::printf("FAILED %s\n", what.c_str());
  }
};

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double normal() { return normal_(engine_); }
  int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Exactly the bytes an op asked for, aligned to 256 and filled with NaN patterns, so that reading what was never
// written shows. AddressSanitizer guards its end; without it more of the pattern follows, which must still be there
// when the op has ended: wide vectors, which only the builds without sanitizers have, reach further past an end.
class Workspace {
 public:
  explicit Workspace(WorkspaceSize size)
      : bytes_((size.device_bytes + 255) / 256 * 256),
        data_(std::aligned_alloc(256, bytes_ + kGuard + (bytes_ == 0 ? 256 : 0))) {
    std::memset(data_, 0xff, bytes_ + kGuard);
  }
  ~Workspace() {
    const unsigned char* guard = static_cast<const unsigned char*>(data_) + bytes_;
    for (size_t i = 0; i < kGuard; ++i) {
      if (guard[i] == 0xff) continue;
      std::fprintf(stderr, "an op wrote %zu bytes behind its workspace of %zu\n", i + 1, bytes_);
      std::abort();
    }
    std::free(data_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 1 << 14;
#endif
  size_t bytes_;
  void* data_;
};

// One op of one table with a fresh workspace.
template <typename Op>
inline void run(WorkspaceSize (*size)(const Op&, const Context&), const char* (*op)(const Op&, const Context&),
                const Op& arguments, int threads) {
  Context context;
  context.threads = threads;
  const Workspace workspace(size(arguments, context));
  context.workspace = workspace.data();
  op(arguments, context);
}

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// A typed array of any of the four element types, read and written as double.
class Array {
 public:
  Array(DType dtype, int64_t count) : dtype_(dtype), bytes_(static_cast<size_t>(count) * width()) {}

  size_t width() const { return dtype_ == DType::f64 ? 8 : dtype_ == DType::f32 ? 4 : 2; }
  DType dtype() const { return dtype_; }
  void* at(int64_t i) { return bytes_.data() + static_cast<size_t>(i) * width(); }
  double get(int64_t i) const;
  void set(int64_t i, double value);

 private:
  DType dtype_;
  std::vector<unsigned char> bytes_;
};

// Value of a 16-bit float with the given number of exponent and mantissa bits, by the definition.
inline double decode(uint16_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double fraction = std::ldexp(bits & ((1 << mantissa_bits) - 1), -mantissa_bits);
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return fraction == 0 ? sign * INFINITY : NAN;
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1 + fraction, exponent - bias);
}

inline double Array::get(int64_t i) const {
  const unsigned char* p = bytes_.data() + static_cast<size_t>(i) * width();
  if (dtype_ == DType::f64) {
    double value;
    std::memcpy(&value, p, 8);
    return value;
  }
  if (dtype_ == DType::f32) {
    float value;
    std::memcpy(&value, p, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return dtype_ == DType::f16 ? decode(bits, 5, 10) : decode(bits, 8, 7);
}

// 16-bit types: the nearest value, found by bisection over the ordered positive encodings.
inline void Array::set(int64_t i, double value) {
  unsigned char* p = bytes_.data() + static_cast<size_t>(i) * width();
  if (dtype_ == DType::f64) {
    std::memcpy(p, &value, 8);
    return;
  }
  const float single = static_cast<float>(value);
  if (dtype_ == DType::f32) {
    std::memcpy(p, &single, 4);
    return;
  }
  const int exponent_bits = dtype_ == DType::f16 ? 5 : 8, mantissa_bits = 15 - exponent_bits;
  const auto infinity = static_cast<uint16_t>(((1 << exponent_bits) - 1) << mantissa_bits);
  uint16_t low = 0, high = infinity;  // decode(low) <= |value| < decode(high), unless |value| is not finite
  while (high - low > 1) {
    const auto middle = static_cast<uint16_t>((low + high) / 2);
    (decode(middle, exponent_bits, mantissa_bits) <= std::fabs(value) ? low : high) = middle;
  }
  const double below = decode(low, exponent_bits, mantissa_bits);
  // The value that infinity's encoding would have: rounding to it is overflow.
  const double step = below - decode(static_cast<uint16_t>(low - 1), exponent_bits, mantissa_bits);
  const double above = high == infinity ? below + step : decode(high, exponent_bits, mantissa_bits);
  const double to_below = std::fabs(value) - below, to_above = above - std::fabs(value);
  uint16_t bits = to_below < to_above || (to_below == to_above && low % 2 == 0) ? low : high;
  if (std::isnan(value)) bits = static_cast<uint16_t>(infinity | 1);
  if (std::signbit(value)) bits = static_cast<uint16_t>(bits | 0x8000);
  std::memcpy(p, &bits, 2);
}

// Equal bit by bit, NaNs included.
template <typename T>
inline bool identical(const T* x, const T* y, int64_t count) {
  return count == 0 || std::memcmp(x, y, sizeof(T) * static_cast<size_t>(count)) == 0;
}

template <typename T>
inline bool identical(const std::vector<T>& x, const std::vector<T>& y) {
  return x.size() == y.size() && identical(x.data(), y.data(), static_cast<int64_t>(x.size()));
}

inline bool close(double value, double expected, double tolerance) {
  return std::isnan(expected) ? std::isnan(value) : value == expected || std::fabs(value - expected) <= tolerance;
}

// Bitwise.
template <typename T>
bool is_symmetric(const T* c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      if (std::memcmp(&c[i * n + j], &c[j * n + i], sizeof(T)) != 0) return false;
    }
  }
  return true;
}

}  // namespace kfac_fast::test
