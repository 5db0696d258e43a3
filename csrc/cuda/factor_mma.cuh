// factor_update's partial products on tensor cores.
#pragma once

#include "mma.cuh"
#include "rows.cuh"

namespace kfac_fast {

// How a CTA computes a kSide x kSide tile: warps side by side, each with kRows x kColumns fragments of 16x8 elements.
// Operands pass through shared memory kDepth words at a time (a word: what mma.cuh says), double buffered.
template <int kSide_>
struct MmaTile {
  static constexpr int kSide = kSide_;
  static constexpr int kDepth = 16;
  static constexpr int kThreads = kSide == 32 ? 64 : 256;
  static constexpr int kResident = kSide == 32 ? 7 : kSide == 64 ? 2 : 1;  // CTAs that registers are left for
  static constexpr int kRows = kSide == 128 ? 2 : 1, kColumns = kSide == 128 ? 8 : 4;
  static constexpr int kWarpsAcross = kSide / (8 * kColumns);
  static constexpr int kStride = kSide + 8;  // the 4 x 8 words of a fragment lie in 32 different banks
  static constexpr int kLoads = kSide * kDepth / kThreads;
  static constexpr int kStage = kDepth * kStride;
  static constexpr size_t kSharedBytes = sizeof(uint32_t) * 4 * kStage;  // two operands, two stages
};

// Where a thread's vectors go: kVector columns of a row of words.
template <typename Tile, int kVector>
struct VectorSlots {
  static constexpr int kPerRow = Tile::kSide / kVector;
  __device__ static int k(int i) { return static_cast<int>(threadIdx.x) / kPerRow + i * (Tile::kThreads / kPerRow); }
  __device__ static int column() { return static_cast<int>(threadIdx.x) % kPerRow * kVector; }
};

// Single precision from three products of tf32 numbers: x = high + low with 11 bits each, and low low is dropped.
// Fragments are summed up for one stage only, then added by ordinary additions: tensor cores cut the sum off instead of
// rounding it, which over thousands of rows would be a bias.
struct Tf32 {
  static constexpr int kPerWord = 1;
  template <typename Tile>
  static constexpr int kVector = 4;  // columns that a thread loads at once
  static constexpr bool kFlush = true;

  template <typename Tile, typename Loader>
  __device__ __forceinline__ static void load(uint32_t (&words)[Tile::kLoads], const Loader& loader, int64_t k0) {
    float x[Tile::kLoads];
    loader.load(x, k0, static_cast<float*>(nullptr));
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) words[i] = __float_as_uint(x[i]);
  }

  template <typename Tile>
  __device__ __forceinline__ static void load_vectors(uint32_t (&words)[Tile::kLoads], const RowsEntry& rows,
                                                      int column0, int64_t k0, int64_t end) {
    using Slots = VectorSlots<Tile, kVector<Tile>>;
    const float* const data = static_cast<const float*>(rows.data);
    const int column = column0 + Slots::column();
#pragma unroll
    for (int u = 0; u < Tile::kLoads / 4; ++u) {
      const int64_t row = k0 + Slots::k(u);
      float x[4] = {};
      if (row < end && column < rows.d) load4(data + row * rows.row_stride + column, x);
      if (row < end && column == rows.d && rows.bias) x[0] = 1.0f;
      float weight = 1.0f;
      if (rows.weights != nullptr && row < end) weight = sqrtf(static_cast<const float*>(rows.weights)[row]);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[4 * u + i] = __float_as_uint(x[i] * weight);
    }
  }

  // The instruction reads the upper 19 bits of a word.
  __device__ static uint32_t low(uint32_t word) {
    return __float_as_uint(__uint_as_float(word) - __uint_as_float(word & 0xffffe000u));
  }
  template <int kRows, int kColumns>
  __device__ __forceinline__ static void multiply(float (&d)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                                                  const uint32_t (&b)[kColumns][2]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const uint32_t a_low[4] = {low(a[r][0]), low(a[r][1]), low(a[r][2]), low(a[r][3])};
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const uint32_t b_low[2] = {low(b[c][0]), low(b[c][1])};
        mma_tf32(d[r][c], a_low, b[c]);
        mma_tf32(d[r][c], a[r], b_low);
        mma_tf32(d[r][c], a[r], b[c]);
      }
    }
  }
};

// 16-bit rows: products are exact, and sums as good as the tensor cores' accumulators.
template <typename E>
struct Packed {
  static constexpr int kPerWord = 2;
  template <typename Tile>
  static constexpr int kVector = Tile::kLoads;  // columns that a thread loads at once: 4 or 8
  static constexpr bool kFlush = false;

  template <typename Tile, typename Loader>
  __device__ __forceinline__ static void load(uint32_t (&words)[Tile::kLoads], const Loader& loader, int64_t k0) {
    float even[Tile::kLoads], odd[Tile::kLoads];
    loader.load(even, k0, static_cast<E*>(nullptr));
    loader.load(odd, k0 + 1, static_cast<E*>(nullptr));
#pragma unroll
    for (int i = 0; i < Tile::kLoads; ++i) words[i] = pack(even[i], odd[i]);
  }

  // Two rows of kVector columns each, interleaved.
  template <typename Tile>
  __device__ __forceinline__ static void load_vectors(uint32_t (&words)[Tile::kLoads], const RowsEntry& rows,
                                                      int column0, int64_t k0, int64_t end) {
    using Slots = VectorSlots<Tile, kVector<Tile>>;
    const int column = column0 + Slots::column();
    uint32_t pair[2][Tile::kLoads / 2];  // two columns per element
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = k0 + 2 * Slots::k(0) + r;
      const bool bias = row < end && column == rows.d && rows.bias;
#pragma unroll
      for (int i = 0; i < Tile::kLoads / 2; ++i) pair[r][i] = bias && i == 0 ? pack(1.0f, 0.0f) : 0u;
      if (row < end && column < rows.d) {
        load_words(static_cast<const E*>(rows.data) + row * rows.row_stride + column, pair[r]);
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kLoads / 2; ++i) {
      words[2 * i] = (pair[0][i] & 0xffffu) | pair[1][i] << 16;
      words[2 * i + 1] = pair[0][i] >> 16 | (pair[1][i] & 0xffff0000u);
    }
  }
  template <int kRows, int kColumns>
  __device__ __forceinline__ static void multiply(float (&d)[kRows][kColumns][4], const uint32_t (&a)[kRows][4],
                                                  const uint32_t (&b)[kColumns][2]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) mma(d[r][c], a[r], b[c], static_cast<E*>(nullptr));
    }
  }

 private:
  __device__ static uint32_t pack(float even, float odd) {
    E pair[2];
    store_as(pair, even);
    store_as(pair + 1, odd);
    uint32_t word;
    memcpy(&word, pair, sizeof(word));
    return word;
  }
  __device__ static void load_words(const E* p, uint32_t (&words)[2]) {
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    words[0] = x.x, words[1] = x.y;
  }
  __device__ static void load_words(const E* p, uint32_t (&words)[4]) {
    const uint4 x = *reinterpret_cast<const uint4*>(p);
    words[0] = x.x, words[1] = x.y, words[2] = x.z, words[3] = x.w;
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half*) {
    mma_f16(d, a, b);
  }
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16*) {
    mma_bf16(d, a, b);
  }
};
using Half = Packed<__half>;
using Bfloat16 = Packed<__nv_bfloat16>;

// Fragments of one stage, multiplied.
template <typename Operand, typename Tile>
__device__ __forceinline__ void multiply_fragments(float (&d)[Tile::kRows][Tile::kColumns][4],
                                                   const uint32_t* p,    // [kDepth, kStride] from the warp's first row
                                                   const uint32_t* q) {  // [kDepth, kStride] from its first column
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int k = 0; k < Tile::kDepth; k += 8) {
    uint32_t a[Tile::kRows][4], b[Tile::kColumns][2];
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
      for (int w = 0; w < 4; ++w) a[r][w] = p[(k + t + w / 2 * 4) * Tile::kStride + 16 * r + g + w % 2 * 8];
    }
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
#pragma unroll
      for (int w = 0; w < 2; ++w) b[c][w] = q[(k + t + w * 4) * Tile::kStride + 8 * c + g];
    }
    Operand::multiply(d, a, b);
  }
}

// Partial products sum_k x_k x_k^T of one tile of C over one chunk of rows, on tensor cores (compute capability 8.0
// on). One CTA per (tile, chunk); rows pass through shared memory, each warp holds 16x32 or 32x64 elements in
// fragments. Memory for some hundred columns and fewer, tensor cores above.
template <typename Operand, int kSide>
__global__ void __launch_bounds__(MmaTile<kSide>::kThreads, MmaTile<kSide>::kResident)
    factor_update_mma_kernel(RowsTables tables, int count,
                             float* partials) {  // per block: [chunks, lower tiles, side, side]
  using Tile = MmaTile<kSide>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  const RowsItem item(rows, static_cast<int>(blockIdx.x) - tables.first[owner]);
  const bool same = item.ti == item.tj;
  uint32_t* const p_shared = shared_memory<uint32_t>();
  uint32_t* const q_shared = same ? p_shared : p_shared + 2 * Tile::kStage;
  PatchColumn* const columns = reinterpret_cast<PatchColumn*>(p_shared + 4 * Tile::kStage);
  const Conv* const conv = rows.conv < 0 ? nullptr : tables.convs + rows.conv;
  prepare_patch_columns<kSide>(conv, item, columns);

  using Loader = RowsLoader<Tile, float, Operand::kPerWord>;
  const LoadSlots<Tile> slots = {rows.along_k};
  const auto load = [&](uint32_t (&words)[Tile::kLoads], int tile, const PatchColumn* patches, int64_t k0) {
    if (rows.vectors) {
      Operand::template load_vectors<Tile>(words, rows, tile * kSide, k0, item.end);
    } else {
      Operand::template load<Tile>(words, Loader{rows, conv, patches, tile * kSide, item.end, slots}, k0);
    }
  };
  const auto store = [&](uint32_t* stage, const uint32_t (&words)[Tile::kLoads]) {
    if (rows.vectors) {
      constexpr int kVector = Operand::template kVector<Tile>;
      using Slots = VectorSlots<Tile, kVector>;
#pragma unroll
      for (int i = 0; i < Tile::kLoads; i += 4) {
        *reinterpret_cast<uint4*>(stage + Slots::k(i / kVector) * Tile::kStride + Slots::column() + i % kVector) =
            uint4{words[i], words[i + 1], words[i + 2], words[i + 3]};
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tile::kLoads; ++i) stage[slots.k(i) * Tile::kStride + slots.column(i)] = words[i];
    }
  };
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int row0 = warp / Tile::kWarpsAcross * (16 * Tile::kRows);
  const int column0 = warp % Tile::kWarpsAcross * (8 * Tile::kColumns);

  float d[Tile::kRows][Tile::kColumns][4] = {};
  uint32_t p_next[Tile::kLoads] = {}, q_next[Tile::kLoads] = {};
  int stage = 0;
  constexpr int kRowsPerStage = Tile::kDepth * Operand::kPerWord;
  for (int64_t k0 = item.begin;; k0 += kRowsPerStage) {
    if (k0 < item.end) {
      load(p_next, item.ti, columns, k0);
      if (!same) load(q_next, item.tj, columns + kSide, k0);
    }
    if (k0 > item.begin) {
      const uint32_t *const p_stage = p_shared + stage + row0, *const q_stage = q_shared + stage + column0;
      if constexpr (Operand::kFlush) {
        float sum[Tile::kRows][Tile::kColumns][4] = {};
        multiply_fragments<Operand, Tile>(sum, p_stage, q_stage);
#pragma unroll
        for (int i = 0; i < Tile::kRows * Tile::kColumns * 4; ++i)
          d[i / 4 / Tile::kColumns][i / 4 % Tile::kColumns][i % 4] +=
              sum[i / 4 / Tile::kColumns][i / 4 % Tile::kColumns][i % 4];
      } else {
        multiply_fragments<Operand, Tile>(d, p_stage, q_stage);
      }
      stage = Tile::kStage - stage;
    }
    if (k0 >= item.end) break;
    store(p_shared + stage, p_next);
    if (!same) store(q_shared + stage, q_next);
    __syncthreads();  // one per stage: the other buffer was last read before the barrier of the stage before
  }

  float* const out = partials + item.partial;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r) {
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) {
      float* const at = out + (row0 + 16 * r + g) * kSide + column0 + 8 * c + 2 * t;
      *reinterpret_cast<float2*>(at) = float2{d[r][c][0], d[r][c][1]};
      *reinterpret_cast<float2*>(at + 8 * kSide) = float2{d[r][c][2], d[r][c][3]};
    }
  }
}

}  // namespace kfac_fast
