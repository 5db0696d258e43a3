// Tests of the SIMT shim itself, and the main program of all tests in this directory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../csrc/cuda/launch.cuh"
#include "check.h"

namespace {

using kfac_fast::launch;
using kfac_fast::shared_memory;

std::string error_of(cudaError_t error) { return error == cudaSuccess ? "" : cudaGetErrorString(error); }

// Whether a kernel that fills out[threads] gives the same under every schedule.
bool deterministic(void (*kernel)(int*), int threads) {
  std::vector<std::vector<int>> results;
  check::for_each_schedule([&] {
    std::vector<int> out(threads, -1);
    check::that(launch(kernel, 1, threads, 4096, nullptr, out.data()) == cudaSuccess, "a valid kernel runs");
    results.push_back(out);
  });
  return std::all_of(results.begin(), results.end(), [&](const auto& r) { return r == results[0]; });
}

void reverse_in_shared_memory(int* out) {
  int* shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = t;
  __syncthreads();
  out[t] = shared[n - 1 - t];
}

void reverse_without_barrier(int* out) {
  int* shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = t;
  out[t] = shared[n - 1 - t];
}

// A race between warps that stay in step within each warp.
void warps_without_barrier(int* out) {
  int* shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
  shared[t] = t;
  __syncwarp();
  out[t] = shared[(t + 32) % n];
}

void relies_on_lockstep(int* out) {
  int* shared = shared_memory<int>();
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = t;
  out[t] = shared[t ^ 1];
}

void some_threads_skip_barrier(int*) {
  if (threadIdx.x % 32 != 5) __syncthreads();
}

void some_threads_exit_early(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

void different_barriers(int*) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void lane_misses_shuffle(int* out) {
  if (threadIdx.x % 32 != 7) out[threadIdx.x] = __shfl_sync(~0u, 1, 0);
}

void lane_outside_its_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0); }

void reads_shared_before_writing(float* out) { out[threadIdx.x] = shared_memory<float>()[threadIdx.x]; }

void warp_operations(int* out) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  int ok = __shfl_sync(~0u, t, 3) == t - lane + 3;
  ok &= __shfl_sync(~0u, t, 3, 8) == t - lane % 8 + 3;
  ok &= __shfl_xor_sync(~0u, t, 5) == (t ^ 5);
  ok &= __shfl_down_sync(~0u, t, 4u) == (lane < 28 ? t + 4 : t);
  ok &= __shfl_up_sync(~0u, t, 4u, 16) == (lane % 16 >= 4 ? t - 4 : t);
  ok &= __ballot_sync(~0u, lane % 2) == 0xaaaaaaaau;
  ok &= __any_sync(~0u, lane == 9) == 1 && __all_sync(~0u, lane != 9) == 0 && __all_sync(~0u, lane >= 0) == 1;
  ok &= __syncthreads_count(lane == 0) == static_cast<int>(blockDim.x) / 32;
  ok &= __syncthreads_or(t == 40) == 1 && __syncthreads_or(0) == 0;
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int i = 0; i < (lane < 16 ? 2 : 5); ++i) ok &= __shfl_sync(half, t, i, 16) == t - lane % 16 + i;
  ok &= __shfl_sync(~0u, static_cast<double>(t) + 0.5, 1) == t - lane + 1.5;
  out[t] = ok;
}

}  // namespace

void test_shim() {
  using check::that;
  that(deterministic(reverse_in_shared_memory, 128), "a correct kernel is deterministic");
  that(!deterministic(reverse_without_barrier, 128), "a missing barrier shows");
  that(!deterministic(warps_without_barrier, 128), "a race between warps shows");
  that(!deterministic(relies_on_lockstep, 32), "a race within a warp shows");

  std::vector<int> out(1024);
  check::for_each_schedule([&] {
    const auto fails_with = [&](void (*kernel)(int*), const char* text) {
      const std::string error = error_of(launch(kernel, 1, 64, 0, nullptr, out.data()));
      that(error.find(text) != std::string::npos, std::string("expected '") + text + "', got '" + error + "'");
    };
    fails_with(some_threads_skip_barrier, "waits for threads that have exited");
    fails_with(some_threads_exit_early, "waits for threads that have exited");
    fails_with(different_barriers, "different barriers");
    fails_with(lane_misses_shuffle, "never call it");
    fails_with(lane_outside_its_mask, "missing from its own mask");

    that(launch(warp_operations, 1, 96, 0, nullptr, out.data()) == cudaSuccess, "warp operations run after errors");
    that(std::count(out.begin(), out.begin() + 96, 1) == 96, "warp operations give CUDA's results");

    std::vector<float> values(64, 0.0f);
    that(launch(reads_shared_before_writing, 1, 64, 64 * sizeof(float), nullptr, values.data()) == cudaSuccess, "runs");
    that(std::all_of(values.begin(), values.end(), [](float v) { return std::isnan(v); }),
         "shared memory starts as NaN");
  });

  that(launch(reverse_in_shared_memory, 1, 2048, 0, nullptr, out.data()) == cudaErrorInvalidConfiguration,
       "too many threads");
  that(launch(reverse_in_shared_memory, 1, 32, 1 << 20, nullptr, out.data()) == cudaErrorInvalidConfiguration,
       "too much shared memory");

  bool halves = true;
  for (unsigned bits = 0; bits < 0x10000u; ++bits) {
    const auto half = static_cast<uint16_t>(bits);
    const float f = __half2float({half}), b = __bfloat162float({half});
    halves = halves && (std::isnan(f) || __float2half(f).bits == half);
    halves = halves && (std::isnan(b) || __float2bfloat16(b).bits == half);
  }
  that(halves, "half and bfloat16 values survive a round trip");
  that(__float2half(65519.0f).bits == 0x7bff && __float2half(65520.0f).bits == 0x7c00, "half overflows to infinity");
  that(__float2half(0x1.8p-25f).bits == 1 && __float2half(0x1p-25f).bits == 0, "half rounds to even below normal");
}

int main() {
  test_shim();
  test_damped_inverse();
  test_factor_update();
  test_shifted_images();
  test_commit();
  test_precondition();
  std::printf("%d passed, %d failed\n", check::passed, check::failed);
  return check::failed == 0 ? 0 : 1;
}
