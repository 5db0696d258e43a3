// Instructions that C++ has no words for: one function each, with a body for the CPU that does the same by the PTX ISA.
//
// Tensor cores, D += A B for a warp ("Matrix Fragments for mma.m16n8k16 / m16n8k8").
//
// With g = lane / 4 and t = lane % 4, a lane holds of A (16 rows) words a0 (row g, word t), a1 (row g + 8, word t), a2
// (row g, word t + 4), a3 (row g + 8, word t + 4); of B (8 columns) b0 (word t, column g), b1 (word t + 4, column g);
// of D d0, d1 (row g, columns 2 t and 2 t + 1), d2, d3 (the same of row g + 8). A word is one tf32 number or two
// consecutive 16-bit numbers along k.
#pragma once

#include "tile.cuh"

namespace kfac_fast {

#ifdef KFAC_FAST_SIMT

struct MmaOperands {
  float (*d)[4];
  const uint32_t (*a)[4];
  const uint32_t (*b)[2];
};

// `value(word, i)`: the i-th of kPerWord numbers in a word.
template <int kPerWord, typename Value>
void mma_of_warp(void* const* lanes, Value&& value) {
  float a[16][8 * kPerWord], b[8 * kPerWord][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPerWord; ++i) {
      for (int w = 0; w < 4; ++w) a[g + w % 2 * 8][(t + w / 2 * 4) * kPerWord + i] = value((*own.a)[w], i);
      for (int w = 0; w < 2; ++w) b[(t + w * 4) * kPerWord + i][g] = value((*own.b)[w], i);
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& own = *static_cast<const MmaOperands*>(lanes[lane]);
    for (int w = 0; w < 4; ++w) {
      const int row = lane / 4 + w / 2 * 8, column = lane % 4 * 2 + w % 2;
      double sum = (*own.d)[w];
      for (int k = 0; k < 8 * kPerWord; ++k) sum += static_cast<double>(a[row][k]) * b[k][column];
      (*own.d)[w] = static_cast<float>(sum);
    }
  }
}

inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands = {&d, &a, &b};
  simt::warp_call(
      [](void* const* lanes) {
        mma_of_warp<1>(lanes, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
      },
      &operands);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands = {&d, &a, &b};
  simt::warp_call(
      [](void* const* lanes) {
        mma_of_warp<2>(
            lanes, [](uint32_t word, int i) { return __half2float(__half{static_cast<uint16_t>(word >> (16 * i))}); });
      },
      &operands);
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MmaOperands operands = {&d, &a, &b};
  simt::warp_call(
      [](void* const* lanes) {
        mma_of_warp<2>(lanes, [](uint32_t word, int i) { return __uint_as_float(word >> (16 * i) << 16); });
      },
      &operands);
}

// Four 8x8 matrices of 16-bit numbers in shared memory, transposed (ldmatrix.x4.trans). Lane l brings the address of
// row l % 8 of matrix l / 8, 16 bytes; it gets of each matrix the numbers (2 t, g) and (2 t + 1, g) as one word.
inline void load_matrices(uint32_t (&words)[4], const void* row) {
  struct Lane {
    uint32_t (*words)[4];
    const void* row;
  } own = {&words, row};
  simt::warp_call(
      [](void* const* lanes) {
        for (int lane = 0; lane < kWarpSize; ++lane) {
          for (int matrix = 0; matrix < 4; ++matrix) {
            uint32_t word = 0;
            for (int i = 0; i < 2; ++i) {
              const auto* const source = static_cast<const Lane*>(lanes[8 * matrix + lane % 4 * 2 + i]);
              word |= static_cast<uint32_t>(static_cast<const uint16_t*>(source->row)[lane / 4]) << (16 * i);
            }
            (*static_cast<const Lane*>(lanes[lane])->words)[matrix] = word;
          }
        }
      },
      &own);
}

// Copies 4 or 16 bytes from global to shared memory, or writes zeros, in the background. copy_commit closes a group of
// copies; copy_wait<n> waits until at most n of this thread's groups are under way.
template <int kBytes>
void copy_async(void* shared, const void* global, bool copy) {
  if (copy) {
    std::memcpy(shared, global, kBytes);
  } else {
    std::memset(shared, 0, kBytes);
  }
}
inline void copy_commit() {}
template <int kGroups>
void copy_wait() {}

#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

#define KFAC_FAST_MMA(name, shape_and_types)                                                                   \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {        \
    asm("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                       \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                   \
  }
KFAC_FAST_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
KFAC_FAST_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
KFAC_FAST_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
#undef KFAC_FAST_MMA

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))));
}
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool copy) {
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const size_t from = __cvta_generic_to_global(global);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(copy ? 16 : 0) : "memory");
  } else {
    static_assert(kBytes == 4);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(copy ? 4 : 0) : "memory");
  }
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#else

// Before compute capability 8.0 the launchers never choose a kernel that calls these.
__device__ inline void mma_tf32(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
__device__ inline void mma_f16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
__device__ inline void mma_bf16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
__device__ inline void load_matrices(uint32_t (&)[4], const void*) {}
template <int kBytes>
__device__ void copy_async(void*, const void*, bool) {}
__device__ inline void copy_commit() {}
template <int kGroups>
__device__ void copy_wait() {}

#endif

}  // namespace kfac_fast
