// Host side that all ops share: launching a kernel, the device guard, and the tables a call sends to the device.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>

#include "kernels.h"

namespace kfac_fast {

constexpr int kWarpSize = 32;

// The shared memory every block gets; a kernel has to opt in to more.
constexpr size_t kDefaultSharedBytes = 48 << 10;

#ifdef KFAC_FAST_SIMT

template <typename T>
__device__ T* shared_memory() {
  return static_cast<T*>(simt::dynamic_shared_memory());
}

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t grid, int threads, size_t shared_bytes, void*, Args... args) {
  if (grid == 0) return cudaSuccess;
  std::tuple<Params...> values(static_cast<Params>(args)...);
  return static_cast<cudaError_t>(simt::launch(kernel, dim3(static_cast<unsigned>(grid)),
                                               dim3(static_cast<unsigned>(threads)), shared_bytes, values,
                                               std::index_sequence_for<Params...>()));
}

#else

// The one dynamic array of the block. Kernels have no static shared memory, so that it starts aligned.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];
  return reinterpret_cast<T*>(dynamic_shared_memory);
}

// Queues kernel(args...) on a stream. An empty grid is not an error and launches nothing.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t grid, int threads, size_t shared_bytes, void* stream,
                   Args... args) {
  if (grid == 0) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  std::tuple<Params...> values(static_cast<Params>(args)...);
  return std::apply(
      [&](Params&... value) {
        void* pointers[] = {static_cast<void*>(&value)...};
        return cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(threads)),
                                pointers, shared_bytes, static_cast<cudaStream_t>(stream));
      },
      values);
}

#endif

// Dynamic shared memory that one block may have on `device`.
inline size_t shared_memory_limit(int device) {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess && bytes > 0 ? static_cast<size_t>(bytes) : kDefaultSharedBytes;
}

// 10 * major + minor.
inline int compute_capability(int device) {
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

// Whether three TF32 products beat FMA: only where TF32 is more than three times as fast, not on 8.6, 8.9 and 12.0.
inline bool three_tf32_products_pay(int capability) {
  return capability == 80 || capability / 10 == 9 || capability / 10 == 10;
}

// Makes ctx.device current for the duration of a call.
class DeviceGuard {
 public:
  explicit DeviceGuard(const Context& ctx) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != ctx.device) {
      error_ = cudaSetDevice(ctx.device);
      restore_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (restore_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool restore_ = false;
  cudaError_t error_ = cudaSuccess;
};

// What the op table's functions return.
inline const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// A call's workspace: first the tables, filled in page-locked memory and copied to the device at once, then scratch
// memory. A run and the *_workspace function that sized it lay it out by the same code: with no memory behind it
// (staging or workspace null) this only measures.
class Arena {
 public:
  explicit Arena(const Context& ctx)
      : staging_(static_cast<char*>(ctx.staging)), workspace_(static_cast<char*>(ctx.workspace)) {}

  // An array of the table. Tables come before scratch. Null when measuring.
  template <typename T>
  T* table(int64_t count) {
    const size_t at = add(sizeof(T) * static_cast<size_t>(count));
    table_bytes_ = bytes_;
    return staging_ == nullptr ? nullptr : reinterpret_cast<T*>(staging_ + at);
  }

  // Where the kernels find what table() returned.
  template <typename T>
  const T* on_device(const T* table) const {
    return reinterpret_cast<const T*>(workspace_ + (reinterpret_cast<const char*>(table) - staging_));
  }

  template <typename T>
  T* scratch(int64_t count) {
    const size_t at = add(sizeof(T) * static_cast<size_t>(count));
    return workspace_ == nullptr ? nullptr : reinterpret_cast<T*>(workspace_ + at);
  }

  WorkspaceSize size() const { return {bytes_, table_bytes_}; }

  cudaError_t upload(void* stream) const {
    if (table_bytes_ == 0) return cudaSuccess;
    return cudaMemcpyAsync(workspace_, staging_, table_bytes_, cudaMemcpyHostToDevice,
                           static_cast<cudaStream_t>(stream));
  }

 private:
  static constexpr size_t kAlignment = 256;

  size_t add(size_t bytes) {
    const size_t at = bytes_;
    bytes_ = (bytes_ + bytes + kAlignment - 1) / kAlignment * kAlignment;
    return at;
  }

  char* staging_;
  char* workspace_;
  size_t bytes_ = 0, table_bytes_ = 0;
};

}  // namespace kfac_fast
