// Stands in for CUDA's header when the kernels are compiled as C++: the part of the language and of the runtime API
// that csrc/cuda uses, with CUDA's names and meaning. simt.cpp holds the bodies.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

#define KFAC_FAST_SIMT 1

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ thread_local  // blocks of one launch run one after another on the launching thread

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// __thread, unlike thread_local, promises that there is nothing to construct: reading one is a plain load.
extern __thread uint3 threadIdx, blockIdx;
extern __thread dim3 blockDim, gridDim;

namespace simt {

enum class WarpOp : uint8_t { sync, shuffle, ballot, call };
enum class BlockOp : uint8_t { sync, any, count };

// Where a thread waits: its call site, for error messages and to tell apart barriers that lanes of one warp diverged
// to.
struct Site {
  const char* file;
  int line;
};

// Waits until the lanes of `mask` have all called, then gives each its result: a ballot of `value != 0`, or the value
// of lane `source`.
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int source, Site site);
// Runs f(arguments of the 32 lanes) once all of the warp have called: for operations of a whole warp.
void warp_call(void (*f)(void* const* arguments), void* argument, Site site = {__builtin_FILE(), __builtin_LINE()});
unsigned block_collective(BlockOp op, bool predicate, Site site);
void* dynamic_shared_memory();
int lane();

// Runs `body` once per thread of the grid. The runtime's error after a failure is a launch failure.
int run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// A device of someone else's, to which launches, copies and fills go while it is set (exports.cpp). Returns CUDA
// errors.
struct Device {
  int (*launch)(const void* kernel, unsigned grid, unsigned threads, uint64_t shared_bytes, void* const* parameters,
                const uint64_t* sizes, int count);
  int (*copy)(void* to, const void* from, uint64_t bytes);
  int (*fill)(void* to, int value, uint64_t bytes);
};
extern Device device;

template <typename... Params, size_t... kIndex>
int launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, std::tuple<Params...>& values,
           std::index_sequence<kIndex...>) {
  if (device.launch == nullptr) return run(grid, block, shared_bytes, [&] { std::apply(kernel, values); });
  void* const parameters[] = {&std::get<kIndex>(values)..., nullptr};
  const uint64_t sizes[] = {sizeof(Params)..., 0};
  return device.launch(reinterpret_cast<const void*>(kernel), grid.x, block.x, shared_bytes, parameters, sizes,
                       sizeof...(Params));
}

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(WarpOp::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_SITE) { simt::block_collective(simt::BlockOp::sync, false, {file, line}); }
inline int __syncthreads_or(int predicate, SIMT_SITE) {
  return static_cast<int>(simt::block_collective(simt::BlockOp::any, predicate != 0, {file, line}));
}
inline int __syncthreads_count(int predicate, SIMT_SITE) {
  return static_cast<int>(simt::block_collective(simt::BlockOp::count, predicate != 0, {file, line}));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_SITE) {
  simt::warp_collective(simt::WarpOp::sync, mask, 0, 0, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_SITE) {
  return static_cast<unsigned>(simt::warp_collective(simt::WarpOp::ballot, mask, predicate != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, SIMT_SITE) {
  return __ballot_sync(mask, predicate == 0, file, line) == 0;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
  const int segment = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, value, segment | (source & (width - 1)), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SIMT_SITE) {
  const int self = simt::lane(), source = self ^ lane_mask;
  return simt::shuffle(mask, value, source > (self | (width - 1)) ? self : source, {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int self = simt::lane(), source = self + static_cast<int>(delta);
  return simt::shuffle(mask, value, source > (self | (width - 1)) ? self : source, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
  const int self = simt::lane(), source = self - static_cast<int>(delta);
  return simt::shuffle(mask, value, source < (self & ~(width - 1)) ? self : source, {file, line});
}
#undef SIMT_SITE

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
inline void __threadfence() {}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
using std::isfinite;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Runtime API. Streams and devices are accepted and ignored: everything has run when a call returns.
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaMemcpyKind : int { cudaMemcpyHostToDevice = 1 };
enum cudaDeviceAttr : int {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
using cudaStream_t = void*;

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (simt::device.copy != nullptr) return static_cast<cudaError_t>(simt::device.copy(to, from, bytes));
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (simt::device.fill != nullptr) return static_cast<cudaError_t>(simt::device.fill(to, value, bytes));
  std::memset(to, value, bytes);
  return cudaSuccess;
}
