// Blocks of rows for factor_update, in memory as the kernels read them and as plain doubles, and the check of its
// results against plain loops in double precision.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "check.h"

namespace factor_blocks {

using namespace kfac_fast;

template <typename T>
constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;
template <typename T>
const T kNaN = std::numeric_limits<T>::quiet_NaN();

// Rows begin with a sector of memory.
template <typename T>
struct InSectors {
  using value_type = T;
  static constexpr std::align_val_t kSector{32};
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kSector)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kSector); }
  bool operator==(const InSectors&) const { return true; }
  bool operator!=(const InSectors&) const { return false; }
};
using Data = std::vector<char, InSectors<char>>;

inline double stored(Data& data, DType dtype, int64_t at, double value) {
  switch (dtype) {
    case DType::f32:
    case DType::tf32:
      return reinterpret_cast<float*>(data.data())[at] = static_cast<float>(value);
    case DType::f64:
      return reinterpret_cast<double*>(data.data())[at] = value;
    case DType::f16:
      return __half2float(reinterpret_cast<__half*>(data.data())[at] = __float2half(static_cast<float>(value)));
    case DType::bf16:
      break;
  }
  auto& place = reinterpret_cast<__nv_bfloat16*>(data.data())[at];
  return __bfloat162float(place = __float2bfloat16(static_cast<float>(value)));
}

inline int64_t width(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// One block's rows, in memory as the kernel reads them and as plain doubles.
template <typename T>
struct Block {
  Rows rows;
  Conv conv;
  Data data;
  std::vector<T> weights;
  std::vector<double> x;  // [m, n] with the bias column, sqrt(weight) applied

  int n() const { return static_cast<int>(rows.d + rows.bias); }

  void weigh(bool weighted) {
    if (!weighted) return;
    for (int64_t r = 0; r < rows.m; ++r) {
      weights.push_back(static_cast<T>(r % 5 == 0 ? 0.0 : 0.3 + 0.1 * (r % 7)));
      for (int c = 0; c < n(); ++c) x[r * n() + c] *= std::sqrt(static_cast<double>(weights[r]));
    }
  }
};

template <typename T>
Block<T> plain_rows(DType dtype, int64_t m, int64_t d, bool bias, bool weighted, bool transposed, int64_t gap) {
  Block<T> b;
  b.rows.dtype = dtype;
  b.rows.m = m;
  b.rows.d = d;
  b.rows.bias = bias;
  b.rows.row_stride = transposed ? 1 : d + gap;
  b.rows.col_stride = transposed ? m + gap : 1;
  b.data.resize(static_cast<size_t>(m == 0 ? 0 : (m - 1) * b.rows.row_stride + (d - 1) * b.rows.col_stride + 1) *
                width(dtype));
  b.x.resize(m * b.n(), 1.0);
  for (int64_t r = 0; r < m; ++r) {
    for (int64_t c = 0; c < d; ++c) {
      b.x[r * b.n() + c] = stored(b.data, dtype, r * b.rows.row_stride + c * b.rows.col_stride, check::normal() + 0.3);
    }
  }
  b.weigh(weighted);
  return b;
}

template <typename T>
Block<T> conv_rows(DType dtype, PaddingMode mode, std::vector<int64_t> size, std::vector<int64_t> kernel,
                   std::vector<int64_t> stride, std::vector<int64_t> pad, std::vector<int64_t> dilation, bool bias,
                   bool weighted, int64_t channels = 3, bool channels_last = false) {
  Block<T> b;
  Conv& conv = b.conv;
  conv.batch = 2;
  conv.channels = channels;
  conv.mode = mode;
  const size_t dims = size.size(), skip = 3 - dims;
  for (size_t i = 0; i < dims; ++i) {
    conv.size[skip + i] = size[i];
    conv.kernel[skip + i] = kernel[i];
    conv.stride[skip + i] = stride[i];
    conv.pad[skip + i] = pad[i];
    conv.dilation[skip + i] = dilation[i];
    conv.out[skip + i] = (size[i] + 2 * pad[i] - dilation[i] * (kernel[i] - 1) - 1) / stride[i] + 1;
  }
  conv.spatial_stride[2] = 1;
  conv.spatial_stride[1] = conv.size[2];
  conv.spatial_stride[0] = conv.size[2] * conv.size[1];
  conv.channel_stride = conv.spatial_stride[0] * conv.size[0];
  conv.batch_stride = conv.channel_stride * (conv.channels + 2);  // a group of a wider image
  if (channels_last) {
    conv.batch_stride = conv.channel_stride * conv.channels;
    for (int64_t& s : conv.spatial_stride) s *= conv.channels;
    conv.channel_stride = 1;
  }
  const int64_t offsets = conv.kernel[0] * conv.kernel[1] * conv.kernel[2];
  const int64_t positions = conv.out[0] * conv.out[1] * conv.out[2];
  b.rows.dtype = dtype;
  b.rows.m = conv.batch * positions;
  b.rows.d = conv.channels * offsets;
  b.rows.bias = bias;
  const int64_t elements = conv.batch * conv.batch_stride;
  b.data.resize(elements * width(dtype));
  std::vector<double> image(elements);
  for (int64_t i = 0; i < elements; ++i) image[i] = stored(b.data, dtype, i, check::normal());

  const auto position = [&](int axis, int64_t o, int64_t k) -> int64_t {
    const int64_t n = conv.size[axis], p = o * conv.stride[axis] - conv.pad[axis] + k * conv.dilation[axis];
    if (p >= 0 && p < n) return p;
    if (mode == PaddingMode::zeros) return -1;
    if (mode == PaddingMode::replicate) return p < 0 ? 0 : n - 1;
    if (mode == PaddingMode::circular) return (p + n) % n;
    return p < 0 ? -p : 2 * n - 2 - p;
  };
  for (int64_t r = 0; r < b.rows.m; ++r) {
    const int64_t o = r % positions, oz = o / (conv.out[1] * conv.out[2]), oy = o / conv.out[2] % conv.out[1];
    for (int64_t c = 0; c < b.rows.d; ++c) {
      const int64_t k = c % offsets, kz = k / (conv.kernel[1] * conv.kernel[2]);
      const int64_t z = position(0, oz, kz), y = position(1, oy, k / conv.kernel[2] % conv.kernel[1]),
                    x = position(2, o % conv.out[2], k % conv.kernel[2]);
      const bool outside = z < 0 || y < 0 || x < 0;
      b.x.push_back(outside
                        ? 0.0
                        : image[r / positions * conv.batch_stride + c / offsets * conv.channel_stride +
                                z * conv.spatial_stride[0] + y * conv.spatial_stride[1] + x * conv.spatial_stride[2]]);
    }
    if (bias) b.x.push_back(1.0);
  }
  b.weigh(weighted);
  return b;
}

// `compute`: FactorUpdate.dtype.
template <typename T>
void test_blocks(const std::string& what, std::vector<Block<T>> blocks, DType compute = kDType<T>) {
  std::vector<int32_t> sizes;
  std::vector<Rows> rows;
  for (Block<T>& b : blocks) {
    sizes.push_back(b.n());
    b.rows.data = b.data.data();
    b.rows.weights = b.weights.empty() ? nullptr : b.weights.data();
    b.rows.conv = b.conv.batch > 0 ? &b.conv : nullptr;
    rows.push_back(b.rows);
  }
  const Plan plan(sizes);
  std::vector<T> start(plan.numel(), T(7)), factors, decay, scale, trace(plan.count());
  std::vector<int32_t> nonfinite(plan.count(), 9);
  for (int b = 0; b < plan.count(); ++b) {
    decay.push_back(b % 3 == 0 ? T(0) : T(0.75));
    scale.push_back(T(1.0 / (b + 2)));
    for (int i = 0; i < sizes[b]; ++i) {
      for (int j = 0; j <= i; ++j) {
        const T value = b % 3 == 0 ? kNaN<T> : static_cast<T>(check::normal());  // no decay: overwritten
        start[plan.offset(b) + i * sizes[b] + j] = start[plan.offset(b) + j * sizes[b] + i] = value;
      }
    }
  }
  check::same_bits_under_every_schedule(what, [&] {
    factors = start;
    const FactorUpdate op = {plan,         compute,      factors.data(), rows.data(),
                             decay.data(), scale.data(), trace.data(),   nonfinite.data()};
    const std::string error = check::call(cuda_table().factor_update_workspace, cuda_table().factor_update, op);
    check::that(error.empty(), what + ": " + error);
    std::vector<char> bytes;
    check::append_bytes(bytes, factors);
    check::append_bytes(bytes, trace);
    check::append_bytes(bytes, nonfinite);
    return bytes;
  });
  for (int b = 0; b < plan.count(); ++b) {
    const int n = sizes[b];
    const int64_t m = rows[b].m;
    bool close = true, symmetric = true, finite = true;
    double trace_expected = 0;
    std::vector<double> columns(n * m);
    for (int64_t r = 0; r < m; ++r) {
      for (int i = 0; i < n; ++i) columns[i * m + r] = blocks[b].x[r * n + i];
    }
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {  // the others are the same, bit by bit
        double sum = 0, size = 0;
        for (int64_t r = 0; r < m; ++r) {
          const double product = columns[i * m + r] * columns[j * m + r];
          sum += product;
          size += std::abs(product);
        }
        const int64_t at = plan.offset(b) + static_cast<int64_t>(i) * n + j;
        const double before = decay[b] == T(0) ? 0.0 : static_cast<double>(decay[b]) * start[at];
        const double expected = before + static_cast<double>(scale[b]) * sum;
        const double tolerance = (sizeof(T) == 8 ? 1e-14 : 2e-6) * std::max(1.0, std::sqrt(m / 250.0)) *
                                 (std::abs(before) + scale[b] * size + 1e-3);
        finite = finite && std::isfinite(sum);
        close = close && !(std::abs(factors[at] - expected) > tolerance);
        symmetric = symmetric && std::memcmp(&factors[at], &factors[plan.offset(b) + static_cast<int64_t>(j) * n + i],
                                             sizeof(T)) == 0;
        if (i == j) trace_expected += factors[at];
      }
    }
    const std::string block = what + ", block " + std::to_string(b);
    check::that(close && symmetric, block + ": value");
    check::that(nonfinite[b] == !finite, block + ": nonfinite");
    check::that(!finite || std::abs(trace[b] - trace_expected) <= 1e-5 * (1 + std::abs(trace_expected)),
                block + ": trace");
  }
  for (int b = 0; b < plan.count(); ++b) {
    for (int64_t i = plan.offset(b) + static_cast<int64_t>(sizes[b]) * sizes[b];
         i < (b + 1 < plan.count() ? plan.offset(b + 1) : plan.numel()); ++i) {
      if (factors[i] != T(7)) check::that(false, what + ": wrote between blocks");
    }
  }
}

}  // namespace factor_blocks
