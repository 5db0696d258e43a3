// factor_update's partial products on tensor cores (compute capability 8.0 on).
#pragma once

#include "factor_finish.cuh"
#include "pipeline.cuh"

namespace kfac_fast {

// Partial products sum_k x_k x_k^T of one tile of C over one chunk of rows; with a single chunk, C itself.
// One CTA per (tile, chunk); rows pass through three stages of shared memory, each warp holds 16x32 to 32x64 elements
// in fragments.
// Memory for some hundred columns and fewer, tensor cores above.
template <typename E, int kSide>
__global__ void __launch_bounds__(MmaTile<E, kSide>::kThreads, MmaTile<E, kSide>::kResident)
    factor_update_mma_kernel(RowsTables tables, int count, FinishArguments<float> finish) {
  using Tile = MmaTile<E, kSide>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  const RowsItem item(rows, static_cast<int>(blockIdx.x) - tables.first[owner]);
  const bool same = item.ti == item.tj;
  E* const p = shared_memory<E>();
  E* const q = same ? p : p + Tile::kStages * Tile::kStage;
  PatchColumn* const columns = reinterpret_cast<PatchColumn*>(p + 2 * Tile::kStages * Tile::kStage);
  const Conv* const conv = rows.conv < 0 ? nullptr : tables.convs + rows.conv;
  prepare_patch_columns<kSide>(conv, item, columns);

  const auto fill_operand = [&](E* stage, int tile, const PatchColumn* patches, int64_t k0) {
    if (rows.vectors) {
      const E* const data = static_cast<const E*>(rows.data);
      copy_vectors<Tile>(
          stage, data, tile * kSide, rows.d, rows.bias,
          [&](int k) { return k0 + k < item.end ? data + (k0 + k) * rows.row_stride : nullptr; },
          [&](int k) { return k0 + k < item.end ? 1.0f : 0.0f; });
    } else {
      const RowsLoader<Tile, float, E> loader = {rows, conv, patches, tile * kSide, item.end, {rows.along_k}};
      gather<Tile>(stage, loader, k0);
    }
  };
  MmaSums<Tile> sums;
  multiply_pipelined<Tile>(sums, item.begin, item.end, p, q, [&](int stage, int64_t k0) {
    fill_operand(p + stage * Tile::kStage, item.ti, columns, k0);
    if (!same) fill_operand(q + stage * Tile::kStage, item.tj, columns + kSide, k0);
  });
  finish_tile<kSide, Tile::kThreads>(rows, item, finish, shared_memory<float>(), [&](auto&& put) { sums.visit(put); });
}

}  // namespace kfac_fast
