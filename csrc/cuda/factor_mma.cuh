// factor_update's partial products on tensor cores (compute capability 8.0 on).
#pragma once

#include "factor_finish.cuh"
#include "mma.cuh"

namespace kfac_fast {

// How a CTA computes a kSide x kSide tile from rows of E: warps side by side, each with kRows x kColumns fragments of
// 16x8 elements. Rows lie in shared memory as they are in global memory, kDepth at a time, kStages under way.
template <typename E_, int kSide_>
struct MmaTile {
  using E = E_;
  static constexpr int kSide = kSide_;
  static constexpr int kThreads = kSide == 32 ? 64 : kSide == 64 ? 128 : 256;
  static constexpr int kResident = kSide == 32 ? 7 : kSide == 64 ? 3 : 1;  // CTAs that registers are left for
  static constexpr int kRows = kSide == 32 ? 1 : 2, kColumns = kSide == 128 ? 8 : 4;
  static constexpr int kWarpsAcross = kSide / (8 * kColumns);
  static constexpr int kDepth = 64 / sizeof(E);
  static constexpr int kStages = 3;
  static constexpr int kStride = kSide + 8;  // rows of one column (f32), 16 bytes of 8 rows (16 bits): different banks
  static constexpr int kStage = kDepth * kStride;
  static constexpr int kLoads = kSide * kDepth / kThreads;
  static constexpr int kVector = 16 / sizeof(E);  // columns
  static constexpr size_t kSharedBytes = sizeof(E) * 2 * kStages * kStage;
};

// Single precision from three products of tf32 numbers: x = high + low with 11 bits each, and low low is dropped.
// Fragments are summed up for one stage only, then added by ordinary additions: tensor cores cut the sum off instead of
// rounding it, which over thousands of rows would be a bias.
template <typename E>
struct Fragments {
  static constexpr bool kFlush = true;
  static constexpr int kStep = 8;  // rows per instruction

  __device__ static uint32_t word(const float* p) { return __float_as_uint(*p); }
  // The instruction reads the upper 19 bits of a word.
  __device__ static uint32_t low(uint32_t word) {
    return __float_as_uint(__uint_as_float(word) - __uint_as_float(word & 0xffffe000u));
  }

  template <typename Tile>
  __device__ __forceinline__ static void multiply(float (&d)[Tile::kRows][Tile::kColumns][4], const float* p,
                                                  const float* q) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
    uint32_t b[Tile::kColumns][2];
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
      for (int w = 0; w < 2; ++w) b[c][w] = word(q + (t + w * 4) * Tile::kStride + 8 * c + g);
    }
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
      uint32_t a[4], a_low[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        a[w] = word(p + (t + w / 2 * 4) * Tile::kStride + 16 * r + g + w % 2 * 8);
        a_low[w] = low(a[w]);
      }
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
        const uint32_t b_low[2] = {low(b[c][0]), low(b[c][1])};
        mma_tf32(d[r][c], a_low, b[c]);
        mma_tf32(d[r][c], a, b_low);
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

// Starts to bring one operand's rows from k0 on into a stage, 16 bytes at a time.
template <typename Tile>
__device__ __forceinline__ void copy_rows(typename Tile::E* stage, const RowsEntry& rows, int column0, int64_t k0,
                                          int64_t end) {
  using E = typename Tile::E;
  constexpr int kPerRow = Tile::kSide / Tile::kVector;
  const int column = column0 + static_cast<int>(threadIdx.x) % kPerRow * Tile::kVector;
  const E* const data = static_cast<const E*>(rows.data);
#pragma unroll
  for (int i = 0; i < Tile::kLoads / Tile::kVector; ++i) {
    const int k = static_cast<int>(threadIdx.x) / kPerRow + i * (Tile::kThreads / kPerRow);
    const bool inside = k0 + k < end && column < rows.d;
    E* const to = stage + k * Tile::kStride + column - column0;
    if (inside || column != rows.d) {
      copy_async(to, inside ? data + (k0 + k) * rows.row_stride + column : data, inside);
    } else {  // the column of ones
      const bool one = rows.bias && k0 + k < end;
#pragma unroll
      for (int v = 0; v < Tile::kVector; ++v) store_as(to + v, v == 0 && one ? 1.0f : 0.0f);
    }
  }
}

// Brings one operand's rows from k0 on into a stage where they are not whole vectors in memory, a batch at a time.
template <typename Tile>
__device__ __forceinline__ void gather_rows(typename Tile::E* stage, const RowsEntry& rows, const Conv* conv,
                                            const PatchColumn* columns, int column0, int64_t k0, int64_t end) {
  constexpr int kBatch = Tile::kLoads < 8 ? Tile::kLoads : 8;
#pragma unroll 1
  for (int first = 0; first < Tile::kLoads; first += kBatch) {
    const LoadSlots<Tile> slots = {rows.along_k, first};
    float x[kBatch];
    RowsLoader<Tile, float, kBatch>{rows, conv, columns, column0, end, slots}.load(
        x, k0, static_cast<typename Tile::E*>(nullptr));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) store_as(stage + slots.k(i) * Tile::kStride + slots.column(i), x[i]);
  }
}

// Partial products sum_k x_k x_k^T of one tile of C over one chunk of rows; with a single chunk, C itself.
// One CTA per (tile, chunk); rows pass through three stages of shared memory, each warp holds 16x32 to 32x64 elements
// in fragments.
// Memory for some hundred columns and fewer, tensor cores above.
template <typename E, int kSide>
__global__ void __launch_bounds__(MmaTile<E, kSide>::kThreads, MmaTile<E, kSide>::kResident)
    factor_update_mma_kernel(RowsTables tables, int count, FinishArguments<float> finish) {
  using Tile = MmaTile<E, kSide>;
  using Operand = Fragments<E>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  const RowsItem item(rows, static_cast<int>(blockIdx.x) - tables.first[owner]);
  const bool same = item.ti == item.tj;
  E* const p_shared = shared_memory<E>();
  E* const q_shared = same ? p_shared : p_shared + Tile::kStages * Tile::kStage;
  PatchColumn* const columns = reinterpret_cast<PatchColumn*>(p_shared + 2 * Tile::kStages * Tile::kStage);
  const Conv* const conv = rows.conv < 0 ? nullptr : tables.convs + rows.conv;
  prepare_patch_columns<kSide>(conv, item, columns);

  const auto fill = [&](int stage, int64_t k0) {
    E *const p = p_shared + stage * Tile::kStage, *const q = q_shared + stage * Tile::kStage;
    if (rows.vectors) {
      copy_rows<Tile>(p, rows, item.ti * kSide, k0, item.end);
      if (!same) copy_rows<Tile>(q, rows, item.tj * kSide, k0, item.end);
    } else {
      gather_rows<Tile>(p, rows, conv, columns, item.ti * kSide, k0, item.end);
      if (!same) gather_rows<Tile>(q, rows, conv, columns + kSide, item.tj * kSide, k0, item.end);
    }
  };

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int row0 = warp / Tile::kWarpsAcross * (16 * Tile::kRows);
  const int column0 = warp % Tile::kWarpsAcross * (8 * Tile::kColumns);
  float d[Tile::kRows][Tile::kColumns][4] = {};
  constexpr int kAhead = Tile::kStages - 1;
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    fill(stage, item.begin + stage * Tile::kDepth);
    copy_commit();
  }
  int stage = 0;
  for (int64_t k0 = item.begin; k0 < item.end; k0 += Tile::kDepth) {
    copy_wait<kAhead - 1>();
    // Behind the barrier this stage has arrived for all threads, and all are done with the one before it, which is
    // filled anew.
    __syncthreads();
    const int64_t next = k0 + kAhead * Tile::kDepth;
    if (next < item.end) fill(stage == 0 ? kAhead : stage - 1, next);
    copy_commit();
    const E* const p_stage = p_shared + stage * Tile::kStage + row0;
    const E* const q_stage = q_shared + stage * Tile::kStage + column0;
    float sum[Tile::kRows][Tile::kColumns][4] = {};
#pragma unroll
    for (int k = 0; k < Tile::kDepth; k += Operand::kStep) {
      Operand::template multiply<Tile>(Operand::kFlush ? sum : d, p_stage + k * Tile::kStride,
                                       q_stage + k * Tile::kStride);
    }
    if constexpr (Operand::kFlush) {
#pragma unroll
      for (int i = 0; i < Tile::kRows * Tile::kColumns * 4; ++i) {
        d[i / 4 / Tile::kColumns][i / 4 % Tile::kColumns][i % 4] +=
            sum[i / 4 / Tile::kColumns][i / 4 % Tile::kColumns][i % 4];
      }
    }
    stage = stage == kAhead ? 0 : stage + 1;
  }

  copy_wait<0>();
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
  finish_tile<kSide, Tile::kThreads>(rows, item, finish, shared_memory<float>(), [&](auto&& put) {
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
        for (int i = 0; i < 4; ++i) put(row0 + 16 * r + g + i / 2 * 8, column0 + 8 * c + 2 * t + i % 2, d[r][c][i]);
      }
    }
  });
}

}  // namespace kfac_fast
