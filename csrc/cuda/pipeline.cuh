// Products of two tall operands on tensor cores, sum_k P[k, i] Q[k, j], for one tile of the result (compute capability
// 8.0 on). The counterpart of tile.cuh's multiply().
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace kfac_fast {

// How a CTA computes a kSide x kSide tile from rows of E: warps side by side, each with kRows x kColumns fragments of
// 16x8 elements. Rows lie in shared memory as they are in global memory, kDepth at a time, kStages under way: kRuns
// times the elements of a sector, and of long stages fewer.
template <typename E_, int kSide_, int kRuns = 2>
struct MmaTile {
  using E = E_;
  static constexpr int kSide = kSide_;
  static constexpr int kThreads = kSide == 32 ? 64 : kSide == 64 ? 128 : 256;
  static constexpr int kResident = kSide == 32 ? 7 : kSide == 64 ? 3 : 1;  // CTAs that registers are left for
  static constexpr int kRows = kSide == 32 ? 1 : 2, kColumns = kSide == 128 ? 8 : 4;
  static constexpr int kWarpsAcross = kSide / (8 * kColumns);
  static constexpr int kRun = 32 / sizeof(E), kDepth = kRuns * kRun;
  static constexpr int kStages = kRuns == 2 ? 3 : 2;
  static constexpr int kStride = kSide + 8;  // rows of one column (f32), 16 bytes of 8 rows (16 bits): different banks
  static constexpr int kStage = kDepth * kStride;
  static constexpr int kLoads = kSide * kDepth / kThreads;
  static constexpr int kVector = 16 / sizeof(E);  // columns
  static constexpr size_t kSharedBytes = sizeof(E) * 2 * kStages * kStage;

  // Place of an element in a stage. Every other group of four rows of 32-bit numbers has its columns exchanged by
  // fours, so that runs along k go to different banks; tiles of 128 have no registers left for that.
  static constexpr bool kExchanged = sizeof(E) == 4 && kSide < 128;
  __device__ static int place(int k, int column) { return k * kStride + (kExchanged ? column ^ (k & 4) : column); }
};

// Of float, single precision from three products of tf32 numbers: x = high + low with 11 bits each, and low low is
// dropped. Fragments are summed up for 16 rows only, then added by ordinary additions: tensor cores cut the sum off
// instead of rounding it, which over thousands of rows would be a bias. Of Tf32, high high alone, summed up as it is.
template <typename E>
struct Fragments {
  static constexpr bool kThree = std::is_same_v<E, float>;
  static constexpr bool kFlush = kThree;
  static constexpr int kFlushRows = 16;
  static constexpr int kStep = 8;  // rows per instruction

  __device__ static uint32_t word(const float* p) { return __float_as_uint(*p); }
  __device__ static uint32_t word(const Tf32* p) { return __float_as_uint(p->value); }
  // The instruction reads the upper 19 bits of a word.
  __device__ static uint32_t low(uint32_t word) {
    return __float_as_uint(__uint_as_float(word) - __uint_as_float(word & 0xffffe000u));
  }

  template <typename Tile>
  __device__ __forceinline__ static void multiply(float (&d)[Tile::kRows][Tile::kColumns][4], const E* p, const E* q) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
    uint32_t b[Tile::kColumns][2];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
      for (int w = 0; w < 2; ++w) b[c][w] = word(q + Tile::place(t + w * 4, g) + 8 * c);
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      uint32_t a[4];
      [[maybe_unused]] uint32_t a_low[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        a[w] = word(p + Tile::place(t + w / 2 * 4, g) + 16 * r + w % 2 * 8);
        a_low[w] = low(a[w]);
      }
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        if constexpr (kThree) {
          const uint32_t b_low[2] = {low(b[c][0]), low(b[c][1])};
          mma_tf32(d[r][c], a_low, b[c]);
          mma_tf32(d[r][c], a, b_low);
        }
        mma_tf32(d[r][c], a, b[c]);
      }
    }
  }
};

// 16-bit rows: products are exact, and sums as good as the tensor cores' accumulators.
template <typename E>
struct HalfFragments {
  static constexpr bool kFlush = false;
  static constexpr int kStep = 16;

  template <typename Tile>
  __device__ __forceinline__ static void multiply(float (&d)[Tile::kRows][Tile::kColumns][4], const E* p, const E* q) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, r8 = lane % 8, matrix = lane / 8;
    uint32_t b[Tile::kColumns / 2][4];  // two fragments each
#pragma unroll
    for (int c = 0; c < Tile::kColumns / 2; ++c) {
      load_matrices(b[c], q + (matrix % 2 * 8 + r8) * Tile::kStride + 16 * c + matrix / 2 * 8);
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      uint32_t a[4];
      load_matrices(a, p + (matrix / 2 * 8 + r8) * Tile::kStride + 16 * r + matrix % 2 * 8);
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const uint32_t half[2] = {b[c / 2][c % 2 * 2], b[c / 2][c % 2 * 2 + 1]};
        mma(d[r][c], a, half, static_cast<E*>(nullptr));
      }
    }
  }

 private:
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half*) {
    mma_f16(d, a, b);
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16*) {
    mma_bf16(d, a, b);
  }
};
template <>
struct Fragments<__half> : HalfFragments<__half> {};
template <>
struct Fragments<__nv_bfloat16> : HalfFragments<__nv_bfloat16> {};

// Stores what a loader brings in from row k0 on into a stage, a batch of registers at a time.
template <typename Tile, typename Loader>
__device__ __forceinline__ void gather(typename Tile::E* stage, const Loader& loader, int64_t k0) {
  constexpr int kBatch = Tile::kLoads < 8 ? Tile::kLoads : 8;
#pragma unroll 1
  for (int first = 0; first < Tile::kLoads; first += kBatch) {
    float x[kBatch];
    loader.load(x, k0, first);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      store_as(stage + Tile::place(loader.slots.k(first + i), loader.slots.column(first + i)), x[i]);
    }
  }
}

// Starts to bring single numbers into a stage: `at(k, column)` says where the one of row k0 + k is; null is zero.
template <typename Tile, typename At>
__device__ __forceinline__ void copy_elements(float* stage, const LoadSlots<Tile>& slots, const float* anywhere,
                                              At&& at) {
#pragma unroll 8
  for (int i = 0; i < Tile::kLoads; ++i) {
    const int k = slots.k(i), column = slots.column(i);
    const float* const from = at(k, column);
    copy_async<4>(stage + Tile::place(k, column), from == nullptr ? anywhere : from, from != nullptr);
  }
}

// Starts to bring rows of whole vectors into a stage: elements of [0, columns) from `column0` on, zeros beyond. row(k)
// says where row k0 + k starts; null is a row of zeros. Column `columns` is `last(k)` where `extra`.
template <typename Tile, typename Row, typename Last>
__device__ __forceinline__ void copy_vectors(typename Tile::E* stage, const typename Tile::E* anywhere, int column0,
                                             int columns, bool extra, Row&& row, Last&& last) {
  constexpr int kPerRow = Tile::kSide / Tile::kVector;
  const int own = static_cast<int>(threadIdx.x) % kPerRow * Tile::kVector, column = column0 + own;
#pragma unroll
  for (int i = 0; i < Tile::kLoads / Tile::kVector; ++i) {
    const int k = static_cast<int>(threadIdx.x) / kPerRow + i * (Tile::kThreads / kPerRow);
    typename Tile::E* const to = stage + Tile::place(k, own);
    if (!extra || column != columns) {
      const typename Tile::E* const from = row(k);
      const bool inside = from != nullptr && column < columns;
      copy_async<16>(to, inside ? from + column : anywhere, inside);
    } else {
#pragma unroll
      for (int v = 0; v < Tile::kVector; ++v) store_as(to + v, v == 0 ? last(k) : 0.0f);
    }
  }
}

// Accumulators of a thread.
template <typename Tile>
struct MmaSums {
  float d[Tile::kRows][Tile::kColumns][4] = {};

  // Calls f(row, column, value) for each, with its place in the tile.
  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) f(row0() + 16 * r + g + i / 2 * 8, column0() + 8 * c + 2 * t + i % 2, d[r][c][i]);
      }
    }
  }
  __device__ static int row0() {
    return static_cast<int>(threadIdx.x) / kWarpSize / Tile::kWarpsAcross * (16 * Tile::kRows);
  }
  __device__ static int column0() {
    return static_cast<int>(threadIdx.x) / kWarpSize % Tile::kWarpsAcross * (8 * Tile::kColumns);
  }
};

// Adds the rows [begin, end) up. fill(stage, k0) starts to bring the rows from k0 on of both operands into that stage
// of `p` and `q`, [kStages, kDepth, kStride] each in shared memory, with zeros beyond the end.
template <typename Tile, typename Fill>
__device__ __forceinline__ void multiply_pipelined(MmaSums<Tile>& sums, int64_t begin, int64_t end,
                                                   const typename Tile::E* p, const typename Tile::E* q, Fill&& fill) {
  using Operand = Fragments<typename Tile::E>;
  constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    fill(stage, begin + stage * Tile::kDepth);
    copy_commit();
  }
  p += MmaSums<Tile>::row0();
  q += MmaSums<Tile>::column0();
  int stage = 0;
  for (int64_t k0 = begin; k0 < end; k0 += Tile::kDepth) {
    copy_wait<kAhead - 1>();
    // Behind the barrier this stage has arrived for all threads, and all are done with the one before it, which is
    // filled anew.
    __syncthreads();
    const int64_t next = k0 + kAhead * Tile::kDepth;
    if (next < end) fill(stage == 0 ? kAhead : stage - 1, next);
    copy_commit();
    const int at = stage * Tile::kStage;
    if constexpr (Operand::kFlush) {
#pragma unroll
      for (int first = 0; first < Tile::kDepth; first += Operand::kFlushRows) {
        float sum[Tile::kRows][Tile::kColumns][4] = {};
#pragma unroll
        for (int k = first; k < first + Operand::kFlushRows; k += Operand::kStep) {
          Operand::template multiply<Tile>(sum, p + at + k * Tile::kStride, q + at + k * Tile::kStride);
        }
#pragma unroll
        for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
          for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
            for (int i = 0; i < 4; ++i) sums.d[r][c][i] += sum[r][c][i];
          }
        }
      }
    } else {
#pragma unroll
      for (int k = 0; k < Tile::kDepth; k += Operand::kStep) {
        Operand::template multiply<Tile>(sums.d, p + at + k * Tile::kStride, q + at + k * Tile::kStride);
      }
    }
    stage = stage == kAhead ? 0 : stage + 1;
  }
  copy_wait<0>();
}

}  // namespace kfac_fast
