// Device side that the ops share: finding work in a grouped launch, element types, and the product of two tall
// operands, sum_k P[k, i] Q[k, j], for one tile of the result.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace kfac_fast {

// One launch serves many blocks of different sizes: block b owns the items first[b] <= item < first[b + 1]. Finds the
// owner of `item` by a search with one probe per lane. All lanes of the warp call with the same arguments.
__device__ inline int find_owner(const int32_t* first,  // [count + 1], first[0] == 0
                                 int count, int item) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  int begin = 0, length = count;
  while (length > 1) {
    const int step = (length + kWarpSize - 1) / kWarpSize;
    const int probe = begin + lane * step;
    const unsigned reached = __ballot_sync(~0u, lane * step < length && first[probe] <= item);
    const int moved = (__popc(reached) - 1) * step;
    begin += moved;
    length = min(step, length - moved);
  }
  return begin;
}

// Pairs (row, column) with row >= column in the order (0, 0), (1, 0), (1, 1), (2, 0)...
__device__ inline void lower_pair(int index, int& row, int& column) {
  row = static_cast<int>((sqrtf(8.0f * static_cast<float>(index) + 1.0f) - 1.0f) * 0.5f);
  while ((row + 1) * (row + 2) / 2 <= index) ++row;  // the root is rounded
  while (row * (row + 1) / 2 > index) --row;
  column = index - row * (row + 1) / 2;
}
constexpr __host__ __device__ int lower_pairs(int rows) { return rows * (rows + 1) >> 1; }
constexpr __host__ __device__ int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline float inverse_sqrt(float x) { return rsqrtf(x); }
__device__ inline double inverse_sqrt(double x) { return 1.0 / sqrt(x); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// A float32 number of which tensor cores read the upper 19 bits, sign, exponent and 10 of the fraction.
struct Tf32 {
  float value;
};

template <typename T>
__device__ T load_as(const float* p) {
  return static_cast<T>(*p);
}
template <typename T>
__device__ T load_as(const Tf32* p) {
  return static_cast<T>(p->value);
}
template <typename T>
__device__ T load_as(const double* p) {
  return static_cast<T>(*p);
}
template <typename T>
__device__ T load_as(const __half* p) {
  return static_cast<T>(__half2float(*p));
}
template <typename T>
__device__ T load_as(const __nv_bfloat16* p) {
  return static_cast<T>(__bfloat162float(*p));
}
template <typename T>
__device__ void store_as(float* p, T value) {
  *p = static_cast<float>(value);
}
template <typename T>
__device__ void store_as(Tf32* p, T value) {
  p->value = static_cast<float>(value);
}
template <typename T>
__device__ void store_as(double* p, T value) {
  *p = static_cast<double>(value);
}
template <typename T>
__device__ void store_as(__half* p, T value) {
  *p = __float2half(static_cast<float>(value));
}
template <typename T>
__device__ void store_as(__nv_bfloat16* p, T value) {
  *p = __float2bfloat16(static_cast<float>(value));
}

// Calls f with a null pointer of the element type that `dtype` names.
template <typename F>
__device__ __forceinline__ void with_single_dtype(DType dtype, F&& f) {  // of those that are computed with in f32
  switch (dtype) {
    case DType::f16:
      f(static_cast<__half*>(nullptr));
      break;
    case DType::bf16:
      f(static_cast<__nv_bfloat16*>(nullptr));
      break;
    default:
      f(static_cast<float*>(nullptr));
      break;
  }
}
template <typename F>
__device__ __forceinline__ void with_dtype(DType dtype, F&& f) {
  if (dtype == DType::f64) {
    f(static_cast<double*>(nullptr));
  } else {
    with_single_dtype(dtype, f);
  }
}

// Four consecutive elements by the widest loads there are. `p` is aligned to 16 bytes.
__device__ inline void load4(const float* p, float (&v)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
__device__ inline void load4(const double* p, double (&v)[4]) {
  const double2 x = *reinterpret_cast<const double2*>(p), y = *reinterpret_cast<const double2*>(p + 2);
  v[0] = x.x, v[1] = x.y, v[2] = y.x, v[3] = y.y;
}
// Four consecutive elements to global or to shared memory. Instructions of their own, because the compiler takes vector
// stores apart where it merges the branches that they stand in. `p` is aligned to 16 bytes.
#ifdef KFAC_FAST_SIMT
template <typename T>
void store4(T* p, const T (&v)[4]) {
  for (int i = 0; i < 4; ++i) p[i] = v[i];
}
template <typename T>
void store4_shared(T* p, const T (&v)[4]) {
  store4(p, v);
}
#else
__device__ inline void store4(float* p, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ inline void store4(double* p, const double (&v)[4]) {
  const size_t at = __cvta_generic_to_global(p);
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" ::"l"(at), "d"(v[0]), "d"(v[1]) : "memory");
  asm volatile("st.global.v2.f64 [%0 + 16], {%1, %2};" ::"l"(at), "d"(v[2]), "d"(v[3]) : "memory");
}
__device__ inline void store4_shared(float* p, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(p))),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
__device__ inline void store4_shared(double* p, const double (&v)[4]) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(p));
  asm volatile("st.shared.v2.f64 [%0], {%1, %2};" ::"r"(at), "d"(v[0]), "d"(v[1]) : "memory");
  asm volatile("st.shared.v2.f64 [%0 + 16], {%1, %2};" ::"r"(at), "d"(v[2]), "d"(v[3]) : "memory");
}
#endif

// How a CTA computes a kSide x kSide tile: threads form a square grid, each holds kMicro x kMicro accumulators in
// groups of four rows and four columns; operands pass through shared memory kDepth rows at a time, double buffered.
template <typename T, int kSide_>
struct Tile {
  static constexpr int kSide = kSide_;
  static constexpr int kDepth = 16, kRun = 16;
  static constexpr int kMicro = kSide == 128 ? 8 : 4;
  static constexpr int kGroups = kMicro / 4;
  static constexpr int kThreadsPerSide = kSide / kMicro;
  static constexpr int kThreads = kThreadsPerSide * kThreadsPerSide;
  // CTAs per multiprocessor that the compiler leaves registers for.
  static constexpr int kResident = sizeof(T) == 8 ? 1 : kSide == 32 ? 6 : kSide == 64 ? 2 : 1;
  static constexpr int kStride = kSide + 4;                 // the skew spreads columns written along k over the banks
  static constexpr int kLoads = kSide * kDepth / kThreads;  // elements of one operand that a thread brings in
  static constexpr size_t kSharedBytes = sizeof(T) * 4 * kDepth * kStride;  // two operands, two stages

  // First row (or column) of a thread's group: `t` is its coordinate in the grid of threads.
  __device__ static int group(int t, int g) { return g * (kSide / kGroups) + t * 4; }
  // Place in the tile of accumulator row r and column c of the calling thread.
  __device__ static int row(int r) { return group(static_cast<int>(threadIdx.x) / kThreadsPerSide, r / 4) + r % 4; }
  __device__ static int column(int c) { return group(static_cast<int>(threadIdx.x) % kThreadsPerSide, c / 4) + c % 4; }
};

// Where a thread's loads go: along the columns of the operand (coalesced for row-major data), or along k, where a warp
// takes kRun rows of 32 / kRun columns; with fewer warps than runs each takes several, one after the other.
template <typename Tile>
struct LoadSlots {
  bool along_k;
  static constexpr int kAcross = kWarpSize / Tile::kRun, kRuns = Tile::kDepth / Tile::kRun;
  static constexpr int kWarps = std::min(kRuns, Tile::kThreads / kWarpSize);  // side by side along k
  static constexpr int kPerRun = Tile::kLoads * kWarps / kRuns;               // loads with the same k
  __device__ int k(int i) const {
    const int t = static_cast<int>(threadIdx.x);
    return along_k ? t % Tile::kRun + (t / kWarpSize % kWarps + i / kPerRun * kWarps) * Tile::kRun
                   : t / Tile::kSide + i * (Tile::kThreads / Tile::kSide);
  }
  __device__ int column(int i) const {
    const int t = static_cast<int>(threadIdx.x);
    return along_k ? t / Tile::kRun % kAcross + t / kWarpSize / kWarps * kAcross +
                         i % kPerRun * (Tile::kThreads / (kWarps * Tile::kRun))
                   : t % Tile::kSide;
  }
};

// acc += P^T Q for one stage in shared memory.
template <typename Tile, typename T>
__device__ __forceinline__ void multiply_stage(T (&acc)[Tile::kMicro][Tile::kMicro],
                                               const T* p,    // [kDepth, kStride]
                                               const T* q) {  // [kDepth, kStride]
  const int ty = static_cast<int>(threadIdx.x) / Tile::kThreadsPerSide;
  const int tx = static_cast<int>(threadIdx.x) % Tile::kThreadsPerSide;
#pragma unroll
  for (int k = 0; k < Tile::kDepth; ++k) {
    T a[Tile::kGroups][4], b[Tile::kGroups][4];
#pragma unroll
    for (int g = 0; g < Tile::kGroups; ++g) {
      load4(p + k * Tile::kStride + Tile::group(ty, g), a[g]);
      load4(q + k * Tile::kStride + Tile::group(tx, g), b[g]);
    }
#pragma unroll
    for (int r = 0; r < Tile::kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kMicro; ++c) acc[r][c] += a[r / 4][r % 4] * b[c / 4][c % 4];
    }
  }
}

// acc[r][c] += sum over k in [k_begin, k_end) of P[k, row] Q[k, column]. A loader has `slots` and load(registers, k,
// i): this thread's loads number i.. of the elements of rows k.. of its operand, zero outside of it. With `same`, Q is
// P. Uses Tile::kSharedBytes at `shared`; the caller puts a barrier before the next use of that memory.
template <typename Tile, typename T, typename LoaderP, typename LoaderQ>
__device__ void multiply(T (&acc)[Tile::kMicro][Tile::kMicro], const LoaderP& p, const LoaderQ& q, bool same,
                         int64_t k_begin, int64_t k_end, T* shared) {
  constexpr int kStage = Tile::kDepth * Tile::kStride;
  T* const p_shared = shared;
  T* const q_shared = same ? shared : shared + 2 * kStage;
  T p_next[Tile::kLoads] = {}, q_next[Tile::kLoads] = {};
  int stage = 0;
  // One turn loads the rows from k0 on while it multiplies those before.
  for (int64_t k0 = k_begin;; k0 += Tile::kDepth) {
    if (k0 < k_end) {
      p.load(p_next, k0, 0);
      if (!same) q.load(q_next, k0, 0);
    }
    if (k0 > k_begin) {
      multiply_stage<Tile>(acc, p_shared + stage, q_shared + stage);
      stage = kStage - stage;
    }
    if (k0 >= k_end) break;
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) {
      p_shared[stage + p.slots.k(i) * Tile::kStride + p.slots.column(i)] = p_next[i];
      if (!same) q_shared[stage + q.slots.k(i) * Tile::kStride + q.slots.column(i)] = q_next[i];
    }
    __syncthreads();  // one per stage: the other buffer was last read before the barrier of the stage before
  }
}

// Hands the elements of a kSide x kSide tile around, so that neighbouring threads get neighbouring columns: calls
// f(row, column, element) for each, where `visit` calls its argument with (row, column, value) for those of the calling
// thread. They pass through `staged`, [64, kSide + 1] in shared memory, 64 rows at a time; f may change them. After
// each pass comes done(first row).
template <int kSide, int kThreads, typename T, typename Visit, typename F, typename Done>
__device__ __forceinline__ void hand_around(T* staged, Visit&& visit, F&& f, Done&& done) {
  constexpr int kPass = kSide < 64 ? kSide : 64, kStride = kSide + 1;
  for (int first = 0; first < kSide; first += kPass) {
    __syncthreads();  // what the memory held before is done with
    visit([&](int row, int column, T value) {
      if (row >= first && row < first + kPass) staged[(row - first) * kStride + column] = value;
    });
    __syncthreads();
#pragma unroll 4
    for (int e = static_cast<int>(threadIdx.x); e < kPass * kSide; e += kThreads) {
      f(first + e / kSide, e % kSide, staged[e / kSide * kStride + e % kSide]);
    }
    done(first);
  }
}

// Sum over the CTA in a fixed order; the result is valid in thread 0. `shared` holds one element per warp.
template <typename T>
__device__ T sum_over_threads(T value, T* shared) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  __syncthreads();
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < static_cast<int>(blockDim.x) / kWarpSize; ++w) value += shared[w];
  }
  return value;
}

// A block of a Plan, as kernels see it.
struct BlockEntry {
  int64_t offset;  // of its first element
  int32_t size;    // n
  int32_t index;   // in the arrays with one element per block
};

}  // namespace kfac_fast
