// Tensor-core instructions, D += A B for a warp: one function each, with a body for the CPU that computes the same from
// the documented layout of the fragments (PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8").
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

#else

// Before compute capability 8.0 the launchers never choose a kernel that calls these.
__device__ inline void mma_tf32(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
__device__ inline void mma_f16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}
__device__ inline void mma_bf16(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2]) {}

#endif

}  // namespace kfac_fast
