// The op table: the only interface between the Python bindings and the kernels.
//
// Native code owns no memory, never synchronises with the host and knows no framework. Every pointer is borrowed
// for the duration of the call (CUDA: until the work queued on the stream has run). Arrays marked [host] are read
// before the call returns; everything else lives where the kernels run. Arguments were checked in
// kfac_fast/ops/__init__.py and are not checked again here. Notation (A, G, V, m, d, n, b): docs/algorithm.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "plan.h"

namespace kfac_fast {

// Element types. Values are part of the binding's interface (kfac_fast/ops/native.py). tf32, in FactorUpdate only, is
// f32 with the permission to multiply float32 rows as TF32 numbers, of 11 bits; kernels may ignore it.
enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3, tf32 = 4 };

enum class PaddingMode : int32_t { zeros = 0, reflect = 1, replicate = 2, circular = 3 };

// A convolution's input, standing for its patches: row r = (image, output position), column c = (channel, kernel
// offset), the order of weight.view(C_out, -1). Patches are never materialised. One or two spatial dimensions are
// stored as three, the missing ones in front with size, kernel, stride, dilation and out equal to 1 and pad 0.
struct Conv {
  int64_t batch = 0;
  int64_t channels = 0;  // of this block's group
  int64_t size[3] = {1, 1, 1}, kernel[3] = {1, 1, 1}, stride[3] = {1, 1, 1};
  int64_t pad[3] = {0, 0, 0};  // before the first element
  int64_t dilation[3] = {1, 1, 1}, out[3] = {1, 1, 1};
  int64_t batch_stride = 0, channel_stride = 0, spatial_stride[3] = {0, 0, 0};  // of x, in elements
  PaddingMode mode = PaddingMode::zeros;
};

// X: [m, d] rows of one block, plus a last column of ones when `bias`; each row is scaled by sqrt(weight).
struct Rows {
  const void* data = nullptr;  // X[0, 0]; for a convolution x[0, first channel of the group, 0, ...]
  DType dtype = DType::f32;
  int64_t m = 0, d = 0;                    // without the bias column
  int64_t row_stride = 0, col_stride = 0;  // in elements; unused for a convolution
  const void* weights = nullptr;           // [m] contiguous, dtype of the factors, >= 0; null means all ones
  bool bias = false;
  const Conv* conv = nullptr;  // [host] null for plain rows
};

// C_i <- decay_i C_i + scale_i X_i^T X_i for every block i, both triangles written, exactly symmetric. decay_i = 0
// overwrites C_i, whatever it was, as beta = 0 does in BLAS; so does Commit.
// f64 rows are accumulated in f64, all others in f32 (the dtype of the factors says which).
struct FactorUpdate {
  const Plan& plan;
  DType dtype;         // f32, tf32 or f64: factors, decay, scale, trace, weights
  void* factors;       // [plan.numel()]
  const Rows* rows;    // [host] [b]
  const void* decay;   // [b]
  const void* scale;   // [b]
  void* trace;         // [b] trace of the new C_i
  int32_t* nonfinite;  // [b] 1 if X_i^T X_i has a NaN or an infinity, else 0
};

// C_i <- decay_i C_i + scale_i S_i, then S_i <- 0. With *gate == 0 the factors stay as they are (S is zeroed all the
// same): this is how a NaN batch commits nothing without the host looking.
struct Commit {
  const Plan& plan;
  DType dtype;
  void* factors;        // [plan.numel()]
  void* pending;        // [plan.numel()] S
  const void* decay;    // [b]
  const void* scale;    // [b]
  const int32_t* gate;  // [1]
  void* trace;          // [b] trace of C_i afterwards
};

// inverse_i <- (C_i + damping_i I)^-1 by Cholesky, both triangles, exactly symmetric.
// info_i = 0, or k > 0 when the k-th pivot (1-based, LAPACK's meaning) is not positive or is NaN; then inverse_i is
// filled with NaN if nan_on_failure, else left untouched, and the other blocks are not affected.
struct DampedInverse {
  const Plan& plan;
  DType dtype;
  const void* blocks;   // [plan.numel()]; only the lower triangle of each block is read
  const void* damping;  // [b]
  void* inverse;        // [plan.numel()]; may be `blocks` itself
  int32_t* info;        // [b]
  bool retry_failed;    // true: only blocks whose info is not 0 on entry are worked on, the others keep everything
  bool nan_on_failure;
};

// One layer's gradient V: [rows, cols], its last column optionally stored apart (the bias gradient).
// An array of these describes both inputs and outputs.
struct Matrix {
  void* data = nullptr;  // [rows, cols - (bias != null)]
  DType dtype = DType::f32;
  int64_t row_stride = 0, col_stride = 0;  // in elements
  void* bias = nullptr;                    // [rows], same dtype, or null
  int64_t bias_stride = 0;
};

// U_i = G_i^-1 V_i A_i^-1, and dot_i = <V_i, U_i>. Products are accumulated in the dtype of the inverses, which are
// symmetric; the dot takes U_i before it is rounded to its dtype. U_i may be V_i itself (same data pointer and
// strides): V_i is read for the dot before it is overwritten.
struct Precondition {
  const Plan& g_plan;       // sizes are the rows of V_i
  const Plan& a_plan;       // sizes are the columns of V_i, with the bias column
  DType dtype;              // f32 or f64: inverses and dot
  const void* g_inverse;    // [g_plan.numel()]
  const void* a_inverse;    // [a_plan.numel()]
  const Matrix* gradients;  // [host] [b] V
  const Matrix* results;    // [host] [b] U
  void* dot;                // [b]
};

// Where and how a call runs. `workspace` holds at least the bytes that the op's *_workspace function asked for,
// aligned to 256 bytes. `staging` (CUDA only, null on the CPU) is page-locked host memory of `staging_bytes`, as asked
// for, that stays untouched until the work has run: tables of pointers travel through it.
struct Context {
  int threads = 1;         // CPU: OpenMP threads at most
  void* stream = nullptr;  // CUDA: cudaStream_t
  int device = 0;          // CUDA: ordinal
  void* workspace = nullptr;
  void* staging = nullptr;
};

struct WorkspaceSize {
  size_t device_bytes = 0;
  size_t staging_bytes = 0;
};

// One per backend. Functions return nullptr, or a static string that says what the driver refused (CUDA launch
// errors); numerical failure is never an error but an `info`.
struct OpTable {
  const char* name;          // "avx2", "avx512", "neon", "baseline", "cuda", "simulated"
  int64_t max_inverse_size;  // damped_inverse leaves larger blocks, and their info, alone: the caller has a library
  WorkspaceSize (*factor_update_workspace)(const FactorUpdate&, const Context&);
  const char* (*factor_update)(const FactorUpdate&, const Context&);
  WorkspaceSize (*commit_workspace)(const Commit&, const Context&);
  const char* (*commit)(const Commit&, const Context&);
  WorkspaceSize (*damped_inverse_workspace)(const DampedInverse&, const Context&);
  const char* (*damped_inverse)(const DampedInverse&, const Context&);
  WorkspaceSize (*precondition_workspace)(const Precondition&, const Context&);
  const char* (*precondition)(const Precondition&, const Context&);
};

// csrc/cpu/table.cpp: every table this machine can run, the fastest first, the baseline last.
const std::vector<const OpTable*>& cpu_tables();

#ifdef KFAC_FAST_WITH_CUDA
// csrc/cuda/table.cu. In tests/simt the same sources are compiled as C++ and run on the CPU.
const OpTable& cuda_table();
#endif

}  // namespace kfac_fast
