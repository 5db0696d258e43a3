#include "tensor_views.h"

#include <algorithm>

namespace py = pybind11;

namespace kfac_fast {
namespace {

// The part of the DLPack 1.2 ABI that is used here (github.com/dmlc/dlpack, include/dlpack/dlpack.h).
namespace dlpack {
struct Device {
  int32_t type, index;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  struct {
    uint32_t major, minor;
    void* previous;
  } header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_object;
  void* managed_tensor_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);
  void* current_work_stream;
};
constexpr uint8_t kFloat = 2, kBfloat = 4;
}  // namespace dlpack

bool read_dtype(dlpack::DataType type, DType* out) {
  if (type.lanes != 1) return false;
  if (type.code == dlpack::kFloat && type.bits == 32) return *out = DType::f32, true;
  if (type.code == dlpack::kFloat && type.bits == 64) return *out = DType::f64, true;
  if (type.code == dlpack::kFloat && type.bits == 16) return *out = DType::f16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return *out = DType::bf16, true;
  return false;
}

TensorView read(const dlpack::Tensor& tensor) {
  TensorView view;
  if (tensor.ndim > kMaxDimensions || !read_dtype(tensor.dtype, &view.dtype)) return view;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.device = static_cast<int64_t>(tensor.device.type) << 32 | static_cast<uint32_t>(tensor.device.index);
  view.ndim = tensor.ndim;
  std::copy_n(tensor.shape, tensor.ndim, view.shape);
  std::copy_n(tensor.strides, tensor.ndim, view.stride);
  return view;
}

}  // namespace

int64_t TensorView::collapsed_stride() const {
  int64_t stride_inside = -1, columns = 1;
  for (int i = ndim - 1; i >= 1; --i) {
    if (shape[i] == 1) continue;
    if (stride_inside < 0) {
      stride_inside = stride[i];
    } else if (stride[i] != stride_inside * columns) {
      return -1;
    }
    columns *= shape[i];
  }
  return stride_inside < 0 ? 1 : stride_inside;
}

TensorViews::TensorViews(const py::list& tensors, uintptr_t exchange_api, const py::tuple& plain_types)
    : views_(tensors.size()) {
  const auto& api = *reinterpret_cast<const dlpack::ExchangeApi*>(exchange_api);
  for (size_t i = 0; i < views_.size(); ++i) {
    PyObject* const object = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (std::none_of(plain_types.begin(), plain_types.end(), [&](py::handle h) { return h.ptr() == type; })) continue;
    dlpack::Tensor tensor;
    if (api.tensor_from_object(object, &tensor) == 0) {
      views_[i] = read(tensor);
    } else {
      PyErr_Clear();  // sparse and the like: ops/__init__.py says what is wrong with it
    }
  }
}

TensorViews::TensorViews(const std::vector<Description>& descriptions) {
  for (const auto& [address, dtype, device, shape, stride] : descriptions) {
    TensorView view;
    if (dtype >= 0 && shape.size() <= kMaxDimensions) {
      view.data = reinterpret_cast<void*>(address);
      view.dtype = static_cast<DType>(dtype);
      view.device = device;
      view.ndim = static_cast<int>(shape.size());
      std::copy(shape.begin(), shape.end(), view.shape);
      std::copy(stride.begin(), stride.end(), view.stride);
    }
    views_.push_back(view);
  }
}

py::list TensorViews::shapes() const {
  py::list all(views_.size());
  for (size_t i = 0; i < views_.size(); ++i) {
    const TensorView& view = views_[i];
    py::tuple shape(std::max(view.ndim, 0));
    for (int j = 0; j < view.ndim; ++j) shape[j] = view.shape[j];
    all[i] = std::move(shape);
  }
  return all;
}

bool TensorViews::trailing_dimensions_collapse() const {
  return std::all_of(views_.begin(), views_.end(), [](const TensorView& v) { return v.collapsed_stride() >= 0; });
}

bool TensorViews::fit_rows(const Plan& plan, const std::vector<bool>& bias) const {
  if (views_.size() != static_cast<size_t>(plan.count())) return false;
  for (int i = 0; i < plan.count(); ++i) {
    if (views_[i].ndim != 2 || views_[i].shape[1] + bias[i] != plan.size(i)) return false;
  }
  return true;
}

bool TensorViews::fit_matrices(const Plan& rows, const Plan& columns, const std::vector<int>& bias_of) const {
  if (views_.size() != static_cast<size_t>(rows.count())) return false;
  for (int i = 0; i < rows.count(); ++i) {
    const TensorView& view = views_[i];
    int64_t width = 1;
    for (int j = 1; j < view.ndim; ++j) width *= view.shape[j];
    if (view.ndim < 2 || view.shape[0] != rows.size(i) || width + (bias_of[i] >= 0) != columns.size(i)) return false;
  }
  return true;
}

bool TensorViews::fit_biases(const Plan& rows, const std::vector<int>& bias_of, const TensorViews& weights) const {
  for (int i = 0; i < rows.count(); ++i) {
    if (bias_of[i] < 0) continue;
    const TensorView& view = views_[bias_of[i]];
    if (view.ndim != 1 || view.shape[0] != rows.size(i)) return false;
    if (view.dtype != weights[i].dtype || view.device != weights[i].device) return false;
  }
  return true;
}

bool TensorViews::uniform(int64_t device, const std::vector<int>& dtypes) const {
  return std::all_of(views_.begin(), views_.end(), [&](const TensorView& view) {
    return view.ndim >= 0 && view.device == device &&
           std::find(dtypes.begin(), dtypes.end(), static_cast<int>(view.dtype)) != dtypes.end();
  });
}

}  // namespace kfac_fast
