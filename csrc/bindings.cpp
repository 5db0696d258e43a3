// Python bindings: the only file that includes pybind11. Turns tensors into the views of ops.h, releases the GIL around
// the kernels and turns their errors into exceptions.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "ops.h"
#include "tensor_views.h"

namespace py = pybind11;

namespace kfac_fast {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// What native.py knows about a call: threads, stream, device, and a callable that hands out memory.
struct Call {
  py::function allocate;  // (device bytes, staging bytes) -> (workspace address, staging address)
  int threads;
  uintptr_t stream;
  int device;
};

// The one way an op is run: ask for the workspace, get it from Python, run without the GIL.
template <class Args>
void run(const char* name, const Args& args, const Call& call, WorkspaceSize (*workspace)(const Args&, const Context&),
         const char* (*op)(const Args&, const Context&)) {
  Context context;
  context.threads = call.threads;
  context.stream = pointer<void>(call.stream);
  context.device = call.device;
  const WorkspaceSize need = workspace(args, context);
  if (need.device_bytes > 0 || need.staging_bytes > 0) {
    const auto given =
        call.allocate(need.device_bytes, need.staging_bytes).template cast<std::pair<uintptr_t, uintptr_t>>();
    context.workspace = pointer<void>(given.first);
    context.staging = pointer<void>(given.second);
  }
  const char* error;
  {
    py::gil_scoped_release release;
    error = op(args, context);
  }
  if (error != nullptr) throw std::runtime_error(std::string("kfac_fast ") + name + ": " + error);
}

// (kernel, stride, padding before, dilation, output size, groups, padding mode) of a ConvRows, see ops/rows.py.
using ConvGeometry = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                                std::vector<int64_t>, int64_t, int32_t>;

Conv make_conv(const TensorView& x, const ConvGeometry& geometry) {
  const auto& [kernel, stride, pad, dilation, out, groups, mode] = geometry;
  Conv conv;
  conv.batch = x.shape[0];
  conv.channels = x.shape[1] / groups;
  conv.batch_stride = x.stride[0];
  conv.channel_stride = x.stride[1];
  conv.mode = static_cast<PaddingMode>(mode);
  const int dims = x.ndim - 2;
  for (int i = 0; i < dims; ++i) {
    const int at = 3 - dims + i;  // missing dimensions stand in front
    conv.size[at] = x.shape[2 + i];
    conv.spatial_stride[at] = x.stride[2 + i];
    conv.kernel[at] = kernel[i];
    conv.stride[at] = stride[i];
    conv.pad[at] = pad[i];
    conv.dilation[at] = dilation[i];
    conv.out[at] = out[i];
  }
  return conv;
}

int64_t product(const int64_t (&values)[3]) { return values[0] * values[1] * values[2]; }

const char* at_elements(const void* data, DType dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_size(dtype);
}

void factor_update(const OpTable& table, const Call& call, const Plan& plan, int dtype, uintptr_t factors,
                   const TensorViews& views, const std::vector<std::optional<ConvGeometry>>& convs,
                   const std::vector<bool>& bias, const std::vector<uintptr_t>& weights, uintptr_t decay,
                   uintptr_t scale, uintptr_t trace, uintptr_t nonfinite) {
  std::vector<Rows> rows;
  std::vector<Conv> geometries;
  rows.reserve(plan.count());
  geometries.reserve(plan.count());  // Rows point into it
  for (size_t i = 0; i < views.size(); ++i) {
    const TensorView& x = views[i];
    const bool is_conv = !convs.empty() && convs[i].has_value();
    const int64_t groups = is_conv ? std::get<5>(*convs[i]) : 1;
    for (int64_t group = 0; group < groups; ++group) {
      const size_t block = rows.size();
      Rows row;
      row.dtype = x.dtype;
      row.bias = bias[block];
      row.weights = weights.empty() ? nullptr : pointer<void>(weights[block]);
      if (is_conv) {
        geometries.push_back(make_conv(x, *convs[i]));
        const Conv& conv = geometries.back();
        row.conv = &conv;
        row.data = at_elements(x.data, x.dtype, group * conv.channels * conv.channel_stride);
        row.m = conv.batch * product(conv.out);
        row.d = conv.channels * product(conv.kernel);
      } else {
        row.data = x.data;
        row.m = x.shape[0];
        row.d = x.shape[1];
        row.row_stride = x.stride[0];
        row.col_stride = x.stride[1];
      }
      rows.push_back(row);
    }
  }
  const FactorUpdate args{plan,
                          static_cast<DType>(dtype),
                          pointer<void>(factors),
                          rows.data(),
                          pointer<void>(decay),
                          pointer<void>(scale),
                          pointer<void>(trace),
                          pointer<int32_t>(nonfinite)};
  run("factor_update_", args, call, table.factor_update_workspace, table.factor_update);
}

void commit(const OpTable& table, const Call& call, const Plan& plan, int dtype, uintptr_t factors, uintptr_t pending,
            uintptr_t decay, uintptr_t scale, uintptr_t gate, uintptr_t trace) {
  const Commit args{plan,
                    static_cast<DType>(dtype),
                    pointer<void>(factors),
                    pointer<void>(pending),
                    pointer<void>(decay),
                    pointer<void>(scale),
                    pointer<int32_t>(gate),
                    pointer<void>(trace)};
  run("commit_", args, call, table.commit_workspace, table.commit);
}

void damped_inverse(const OpTable& table, const Call& call, const Plan& plan, int dtype, uintptr_t blocks,
                    uintptr_t damping, uintptr_t inverse, uintptr_t info, bool retry_failed, bool nan_on_failure) {
  const DampedInverse args{plan,
                           static_cast<DType>(dtype),
                           pointer<void>(blocks),
                           pointer<void>(damping),
                           pointer<void>(inverse),
                           pointer<int32_t>(info),
                           retry_failed,
                           nan_on_failure};
  run("damped_inverse", args, call, table.damped_inverse_workspace, table.damped_inverse);
}

// Weights [d_out, ...] whose trailing dimensions collapse to columns, and their biases (null views where absent).
std::vector<Matrix> make_matrices(const TensorViews& weights, const TensorViews& biases,
                                  const std::vector<int>& bias_of) {
  std::vector<Matrix> matrices(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const TensorView& w = weights[i];
    Matrix& matrix = matrices[i];
    matrix.data = w.data;
    matrix.dtype = w.dtype;
    matrix.row_stride = w.stride[0];
    matrix.col_stride = w.collapsed_stride();
    if (!bias_of.empty() && bias_of[i] >= 0) {
      matrix.bias = biases[bias_of[i]].data;
      matrix.bias_stride = biases[bias_of[i]].stride[0];
    }
  }
  return matrices;
}

void precondition(const OpTable& table, const Call& call, const Plan& g_plan, const Plan& a_plan, int dtype,
                  uintptr_t g_inverse, uintptr_t a_inverse, const TensorViews& grads, const TensorViews& grad_biases,
                  const TensorViews& results, const TensorViews& result_biases, const std::vector<int>& bias_of,
                  uintptr_t dot) {
  const std::vector<Matrix> in = make_matrices(grads, grad_biases, bias_of);
  const std::vector<Matrix> out = make_matrices(results, result_biases, bias_of);
  const Precondition args{
      g_plan,    a_plan,     static_cast<DType>(dtype), pointer<void>(g_inverse), pointer<void>(a_inverse),
      in.data(), out.data(), pointer<void>(dot)};
  run("precondition", args, call, table.precondition_workspace, table.precondition);
}

}  // namespace
}  // namespace kfac_fast

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace kfac_fast;
  m.doc() = "Native kernels of kfac_fast. Use kfac_fast.ops, which checks its arguments.";

  py::class_<Plan>(m, "Plan")
      .def(py::init<std::vector<int32_t>>(), py::arg("sizes"))
      .def_property_readonly("numel", &Plan::numel)
      .def_property_readonly("max_size", &Plan::max_size)
      .def_property_readonly("offsets", &Plan::offsets);

  py::class_<TensorViews>(m, "TensorViews")
      .def(py::init<py::list, uintptr_t, py::tuple>(), py::arg("tensors"), py::arg("exchange_api"),
           py::arg("plain_types"))
      .def(py::init<const std::vector<TensorViews::Description>&>(), py::arg("descriptions"))
      .def("__len__", &TensorViews::size)
      .def_property_readonly("shapes", &TensorViews::shapes)
      .def_property_readonly("trailing_dimensions_collapse", &TensorViews::trailing_dimensions_collapse)
      .def("uniform", &TensorViews::uniform, py::arg("device"), py::arg("dtypes"))
      .def("fit_rows", &TensorViews::fit_rows, py::arg("plan"), py::arg("bias"))
      .def("fit_matrices", &TensorViews::fit_matrices, py::arg("rows"), py::arg("columns"), py::arg("bias_of"))
      .def("fit_biases", &TensorViews::fit_biases, py::arg("rows"), py::arg("bias_of"), py::arg("weights"));

  py::class_<Call>(m, "Call").def(py::init<py::function, int, uintptr_t, int>(), py::arg("allocate"),
                                  py::arg("threads"), py::arg("stream"), py::arg("device"));

  py::class_<OpTable>(m, "OpTable")
      .def_readonly("name", &OpTable::name)
      .def_readonly("max_inverse_size", &OpTable::max_inverse_size)
      .def("factor_update", &factor_update)
      .def("commit", &commit)
      .def("damped_inverse", &damped_inverse)
      .def("precondition", &precondition);

  m.def("cpu_tables", &cpu_tables, py::return_value_policy::reference);
  // For a table from another library: the tests load the CUDA kernels compiled for the CPU this way.
  m.def(
      "table_at", [](uintptr_t address) { return pointer<const OpTable>(address); }, py::arg("address"),
      py::return_value_policy::reference);
#ifdef KFAC_FAST_WITH_CUDA
  m.def("cuda_table", &cuda_table, py::return_value_policy::reference);
  m.attr("cuda_architectures") = KFAC_FAST_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("__version__") = KFAC_FAST_VERSION;
}
