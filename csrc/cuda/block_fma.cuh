// How a CTA sweeps a matrix in shared memory by FMA: see block_inverse.cuh.
#pragma once

#include "inverse.cuh"

namespace kfac_fast {

// A matrix in shared memory: the lower triangle of 16x16 tiles, in the order of lower_pair, those of the diagonal as
// full squares. 16 threads update a tile with 4x4 elements each, or 4 with 8x8 (kGroups = 2): fewer loads per product,
// but only large matrices have tiles for all threads then.
template <typename T, int kGroups>
struct FmaTiles {
  using Scalar = T;
  static constexpr int kThreads = 256;  // at most
  static constexpr int kResident = kGroups == 2 || sizeof(T) == 8 ? 1 : 2;
  static constexpr int kMembers = 16 / (kGroups * kGroups);  // threads per tile
  // Distance of tiles: a skew by two vectors keeps neighbouring tiles apart in the banks.
  static constexpr int kStride = kPanelTile + 8;

  T* root;   // [16, 16] L^-1 of the pivots
  T* panel;  // [16, stride] W transposed
  T* tiles;
  int count, stride;  // stride: the rows of a fragment lie in different banks

  __device__ FmaTiles(T* memory, int count_)
      : root(memory),
        panel(root + kPanelTile),
        tiles(panel + panel_numel(count_)),
        count(count_),
        stride(count_ * kPanel + 8) {}

  static constexpr __host__ __device__ int panel_numel(int count) { return kPanel * (count * kPanel + 8); }

  __device__ T* tile(int index) const { return tiles + index * kStride; }

  // Position of element (r, c) in a tile. Rows r = 4 t + q are stored by q first, so that the 16 threads of an update
  // read consecutive vectors; the exclusive or spreads the vectors of a column of rows over the banks.
  static constexpr __host__ __device__ int place(int r, int c) {
    return kPanel * ((r & 3) * 4 + (r >> 2)) + (((c >> 2) ^ (r & 3)) << 2) + (c & 3);
  }
  static constexpr __host__ __device__ int root_place(int r, int c) { return kPanel * r + c; }

  __device__ static void load_row(const T* tile, int r, T (&x)[kPanel]) {
#pragma unroll
    for (int c = 0; c < kPanel; c += 4) {
      T v[4];
      load4(tile + place(r, c), v);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[c + i] = v[i];
    }
  }

  // Thread = row.
  __device__ void solve(int step) const {
    for (int row = static_cast<int>(threadIdx.x); row < count * kPanel; row += static_cast<int>(blockDim.x)) {
      const int i = row / kPanel, r = row % kPanel;
      if (i == step) {
#pragma unroll
        for (int c = 0; c < kPanel; ++c) panel[c * stride + row] = -root[root_place(c, r)];
        continue;
      }
      const T* const from = tile(lower_index(i, step));
      T a[kPanel];
      if (i > step) {
        load_row(from, r, a);
      } else {
#pragma unroll
        for (int m = 0; m < kPanel; ++m) a[m] = from[place(m, r)];
      }
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        T w = T(0);
#pragma unroll
        for (int m = 0; m <= c; m += 4) {
          T v[4];
          load4(root + root_place(c, m), v);
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            if (m + q <= c) w += a[m + q] * v[q];
          }
        }
        panel[c * stride + row] = w;
      }
    }
  }

  __device__ void update(int item, int i, int j, int step) const {
    update_tile<kGroups>(item, i, j, step, static_cast<int>(threadIdx.x) % kMembers);
  }

  // By a warp on its own.
  __device__ void update_diagonal(int i, int step) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    if (lane < kPanel) update_tile<1>(lower_index(i, i), i, i, step, lane);
    __syncwarp();
  }

 private:
  template <int kGroupsHere>
  __device__ void update_tile(int item, int i, int j, int step, int member) const {
    constexpr int kPerSide = 4 / kGroupsHere, kMicro = 4 * kGroupsHere;
    const int ty = member / kPerSide, tx = member % kPerSide;
    const bool fresh = i == step || j == step;
    T* const own = tile(item);
    T acc[kMicro][kMicro] = {};
    const auto for_each_row = [&](auto&& f) {
#pragma unroll
      for (int r = 0; r < kMicro; ++r) {
#pragma unroll
        for (int g = 0; g < kGroupsHere; ++g) {
          f(r, g, own + place(4 * (ty + r / 4 * kPerSide) + r % 4, 4 * (tx + g * kPerSide)));
        }
      }
    };
    if (!fresh) {
      for_each_row([&](int r, int g, const T* at) {
        T v[4];
        load4(at, v);
#pragma unroll
        for (int c = 0; c < 4; ++c) acc[r][4 * g + c] = v[c];
      });
    }
#pragma unroll
    for (int k = 0; k < kPanel; ++k) {
      T wi[kGroupsHere][4], wj[kGroupsHere][4];
#pragma unroll
      for (int g = 0; g < kGroupsHere; ++g) {
        load4(panel + k * stride + i * kPanel + 4 * (ty + g * kPerSide), wi[g]);
        load4(panel + k * stride + j * kPanel + 4 * (tx + g * kPerSide), wj[g]);
      }
#pragma unroll
      for (int r = 0; r < kMicro; ++r) {
#pragma unroll
        for (int c = 0; c < kMicro; ++c) acc[r][c] -= wi[r / 4][r % 4] * wj[c / 4][c % 4];
      }
    }
    for_each_row([&](int r, int g, T* at) {
      T v[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) v[c] = acc[r][4 * g + c];
      store4_shared(at, v);
    });
  }
};

}  // namespace kfac_fast
