// How a CTA sweeps a matrix in shared memory on tensor cores: see block_inverse.cuh.
#pragma once

#include "inverse.cuh"
#include "pipeline.cuh"

namespace kfac_fast {

// A 16x16 tile in the registers of a warp. With g = lane / 4 and t = lane % 4, x[half][b][s] is element (g + 8 half,
// 8 s + 2 t + b): what the accumulators of a product hold. Read as words of an operand, b is the word and s the
// instruction: columns come in another order along k, in both operands alike, so that results are operands as they are.
struct TileFragment {
  float x[2][2][2] = {};
};

// The same in two parts that tensor cores read whole.
struct SplitFragment {
  uint32_t high[2][2][2], low[2][2][2];

  // Rounded, the high parts leave lower ones that are half as large and of either sign.
  __device__ explicit SplitFragment(const TileFragment& tile, bool rounded = false) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int h = e / 4, b = e / 2 % 2, s = e % 2;
      const uint32_t word = __float_as_uint(tile.x[h][b][s]);
      high[h][b][s] = (rounded ? word + 0x1000u : word) & 0xffffe000u;
      low[h][b][s] = __float_as_uint(tile.x[h][b][s] - __uint_as_float(high[h][b][s]));
    }
  }
};

// P Q^T by three TF32 products for one. Those with low parts come first: sums are cut off, so the fewer that are large,
// the better.
__device__ inline TileFragment product(const SplitFragment& p, const SplitFragment& q) {
  float d[2][4] = {};
  const auto add = [&](const uint32_t (&left)[2][2][2], const uint32_t (&right)[2][2][2]) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const uint32_t a[4] = {left[0][0][s], left[1][0][s], left[0][1][s], left[1][1][s]};
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint32_t b[2] = {right[c][0][s], right[c][1][s]};
        mma_tf32(d[c], a, b);
      }
    }
  };
  add(p.low, q.high);
  add(p.high, q.low);
  add(p.high, q.high);
  TileFragment result;
#pragma unroll
  for (int e = 0; e < 8; ++e) result.x[e / 4][e / 2 % 2][e % 2] = d[e % 2][e / 2];
  return result;
}

// A matrix in shared memory: the lower triangle of 16x16 tiles, in the order of lower_pair, those of the diagonal as
// full squares. A warp does a tile. The panel and the root are tiles, too.
struct MmaTiles {
  using Scalar = float;
  static constexpr int kThreads = 448;  // at most: 16 warps would have 64 registers each, which is too few
  static constexpr int kResident = 2;
  static constexpr int kMembers = kWarpSize;  // threads per tile
  // Distance of tiles: a skew by a vector keeps the rows that two tiles share apart in the banks.
  static constexpr int kStride = kPanelTile + 4;

  float* root;   // L^-1 of the pivots
  float* panel;  // [count] tiles of W, without skew
  float* tiles;
  int count;

  __device__ MmaTiles(float* memory, int count_)
      : root(memory),
        panel(root + kPanelTile),
        tiles(panel + panel_numel(count_)),
        count(count_),
        own_(vector(lane() / 4, lane() % 4)),
        turned_(place(lane() % 4 * 2, lane() / 4)) {}

  static constexpr __host__ __device__ int panel_numel(int count) { return count * kPanelTile; }

  __device__ float* tile(int index) const { return tiles + index * kStride; }

  // Position of element (r, c) in a tile: the four of a lane's numbers that lie in a row are a vector.
  static constexpr __host__ __device__ int place(int r, int c) {
    return (r >> 3) * (kPanelTile / 2) + vector(r & 7, (c & 7) >> 1) + (c & 1) * 2 + (c >> 3);
  }
  static constexpr __host__ __device__ int root_place(int r, int c) { return place(r, c); }

  __device__ static void load_row(const float* tile, int r, float (&x)[kPanel]) {
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      float v[4];
      load4(tile + place(r, 2 * t), v);
      x[2 * t] = v[0], x[2 * t + 8] = v[1], x[2 * t + 1] = v[2], x[2 * t + 9] = v[3];
    }
  }

  __device__ void solve(int step) const {
    const SplitFragment divisor(load(root), true);
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize, warps = static_cast<int>(blockDim.x) / kWarpSize;
    for (int i = warp; i < count; i += warps) {
      TileFragment w;
      if (i == step) {
        const TileFragment transposed = load_transposed(root);
#pragma unroll
        for (int e = 0; e < 8; ++e) w.x[e / 4][e / 2 % 2][e % 2] = -transposed.x[e / 4][e / 2 % 2][e % 2];
      } else {
        const float* const a = tile(lower_index(i, step));
        w = product(SplitFragment(i > step ? load(a) : load_transposed(a), true), divisor);
      }
      store(panel + i * kPanelTile, w);
    }
  }

  __device__ void update(int item, int i, int j, int step) const {
    const TileFragment w =
        product(SplitFragment(load(panel + i * kPanelTile)), SplitFragment(load(panel + j * kPanelTile)));
    float* const own = tile(item);
    TileFragment a;
    if (i != step && j != step) a = load(own);
#pragma unroll
    for (int e = 0; e < 8; ++e) a.x[e / 4][e / 2 % 2][e % 2] -= w.x[e / 4][e / 2 % 2][e % 2];
    store(own, a);
  }

  __device__ void update_diagonal(int i, int step) const {
    update(lower_index(i, i), i, i, step);
    __syncwarp();
  }

 private:
  int own_, turned_;  // where the lane finds its numbers in a tile, and in a transposed one, those of b = 1 4 apart

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }
  // Position of a lane's numbers in the upper half of a tile. The exclusive or keeps vectors of a row, of a column, and
  // pairs of a transposed tile in different banks.
  static constexpr __host__ __device__ int vector(int g, int t) { return 32 * t + 4 * (g ^ (2 * t) ^ (t & 1)); }

  __device__ TileFragment load(const float* tile) const {
    TileFragment f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
      load4(tile + own_ + half * (kPanelTile / 2), v);
#pragma unroll
      for (int e = 0; e < 4; ++e) f.x[half][e / 2][e % 2] = v[e];
    }
    return f;
  }
  __device__ TileFragment load_transposed(const float* tile) const {
    TileFragment f;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const float2 v = *reinterpret_cast<const float2*>(tile + (turned_ ^ 4 * b) + s * (kPanelTile / 2));
        f.x[0][b][s] = v.x, f.x[1][b][s] = v.y;
      }
    }
    return f;
  }
  __device__ void store(float* tile, const TileFragment& f) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = f.x[half][e / 2][e % 2];
      store4_shared(tile + own_ + half * (kPanelTile / 2), v);
    }
  }
};

}  // namespace kfac_fast
