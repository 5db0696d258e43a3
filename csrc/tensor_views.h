// Reads pointers, shapes, strides and types out of a list of torch tensors without including torch: through the
// C exchange API of DLPack (about 30 ns a tensor), which torch publishes as Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace kfac_fast {

constexpr int kMaxDimensions = 5;  // [N, C, D, H, W]

inline int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 8;
    case DType::f32:
    case DType::tf32:
      return 4;
    default:
      return 2;
  }
}

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t device = -1;                                              // type << 32 | index, as DLPack numbers them
  int ndim = -1;                                                    // -1: not a dense tensor this package can read
  int64_t shape[kMaxDimensions] = {}, stride[kMaxDimensions] = {};  // in elements

  // Stride of the columns when dimensions 1.. are flattened to one, or -1 when they cannot be without a copy.
  int64_t collapsed_stride() const;
};

class TensorViews {
 public:
  // (address, dtype, device, shape, strides): what native.py collects where torch has no exchange API.
  using Description = std::tuple<uintptr_t, int, int64_t, std::vector<int64_t>, std::vector<int64_t>>;

  // `plain_types`: exact types whose memory may be read; anything else gets ndim -1.
  TensorViews(const pybind11::list& tensors, uintptr_t exchange_api, const pybind11::tuple& plain_types);
  explicit TensorViews(const std::vector<Description>& descriptions);

  size_t size() const { return views_.size(); }
  const TensorView& operator[](size_t i) const { return views_[i]; }

  pybind11::list shapes() const;
  bool trailing_dimensions_collapse() const;
  bool uniform(int64_t device, const std::vector<int>& dtypes) const;

  // Whether view i is [m, plan.size(i) - bias[i]] for every block.
  bool fit_rows(const Plan& plan, const std::vector<bool>& bias) const;
  // Whether view i flattens to [rows.size(i), columns.size(i)], without the last column where bias_of[i] >= 0.
  bool fit_matrices(const Plan& rows, const Plan& columns, const std::vector<int>& bias_of) const;
  // Whether these are the biases of `weights`: view bias_of[i] is [rows.size(i)] and otherwise like weight i.
  bool fit_biases(const Plan& rows, const std::vector<int>& bias_of, const TensorViews& weights) const;

 private:
  std::vector<TensorView> views_;
};

}  // namespace kfac_fast
