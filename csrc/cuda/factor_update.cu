// factor_update: C <- decay C + scale X^T X for all blocks at once.
//
// The rows of a block are cut into chunks and its lower triangle into tiles, one CTA per (tile, chunk). Where there is
// one chunk it updates C itself; else it writes a partial product to scratch memory and a second launch adds the chunks
// in order, so that the result does not depend on which CTA ran first. How a block is cut depends on its own shape
// only: its bits don't change with its company.
#include <vector>

#include "factor_mma.cuh"

namespace kfac_fast {
namespace {

// Rows per partial product: enough items for a device on their own where a block has many rows, but not so many that
// partial products cost more than a quarter of the rows' traffic, nor so few that a chunk's sum loses digits.
constexpr int64_t kWantedItems = 128, kMinChunkRows = 512, kMaxChunkRows = 4096;
constexpr int64_t kTrafficRatio = 4;

// Partial products sum_k x_k x_k^T of one tile of C over one chunk of rows; with a single chunk, C itself.
// One CTA per (tile, chunk); rows pass through shared memory, each thread holds 4x4 elements in registers.
// FMA: the path of double precision, of weighted 16-bit rows, and of devices before compute capability 8.0.
template <typename T, int kSide>
__global__ void __launch_bounds__(Tile<T, kSide>::kThreads, Tile<T, kSide>::kResident)
    factor_update_fma_kernel(RowsTables tables, int count, FinishArguments<T> finish) {
  using Tile = Tile<T, kSide>;
  const int owner = find_owner(tables.first, count, static_cast<int>(blockIdx.x));
  const RowsEntry& rows = tables.entries[owner];
  const RowsItem item(rows, static_cast<int>(blockIdx.x) - tables.first[owner]);
  T* const stages = shared_memory<T>();
  PatchColumn* const columns = reinterpret_cast<PatchColumn*>(stages + Tile::kSharedBytes / sizeof(T));
  const Conv* const conv = rows.conv < 0 ? nullptr : tables.convs + rows.conv;
  prepare_patch_columns<kSide>(conv, item, columns);

  const LoadSlots<Tile> slots = {rows.along_k};
  const RowsLoader<Tile, T> p = {rows, conv, columns, item.ti * kSide, item.end, slots};
  const RowsLoader<Tile, T> q = {rows, conv, columns + kSide, item.tj * kSide, item.end, slots};
  T acc[Tile::kMicro][Tile::kMicro] = {};
  multiply<Tile>(acc, p, q, item.ti == item.tj, item.begin, item.end, stages);
  finish_tile<kSide, Tile::kThreads>(rows, item, finish, stages, [&](auto&& put) {
#pragma unroll
    for (int r = 0; r < Tile::kMicro; ++r) {
#pragma unroll
      for (int c = 0; c < Tile::kMicro; ++c) put(Tile::row(r), Tile::column(c), acc[r][c]);
    }
  });
}

// How a block's partial products are computed: by FMA, or on tensor cores from operands of this kind.
enum Kind : int { kFma, kThreeTf32, kTf32, kHalf, kBfloat16, kKinds };

constexpr int kSides[] = {128, 64, 32};
constexpr int kClasses = kKinds * 3;  // a kind and a tile size each

// Tables and scratch of one call. Entries stand class by class, by decreasing size within one.
template <typename T>
struct Layout {
  Arena arena;
  RowsEntry* entries;
  BlockEntry* blocks;
  int32_t* first;         // [b + kClasses] items of the partial products, per class
  int32_t* finish_first;  // [b + 1]
  Conv* convs;
  int begin[kClasses + 1];
  T* partials;

  static int side(int n, Kind kind) {
    if (n <= 32) return 32;
    return n <= 640 || kind == kFma ? 64 : 128;
  }

  // 16-bit rows are multiplied as they are, exactly. Weights make them numbers that 16 bits don't hold.
  // float32 rows lose digits only by permission, and only where that is faster.
  static Kind kind(const Rows& rows, DType factors, int capability) {
    if (sizeof(T) > 4 || capability < 80) return kFma;
    if (rows.dtype == DType::f32) {
      if (!three_tf32_products_pay(capability)) return kFma;
      return factors == DType::tf32 ? kTf32 : kThreeTf32;
    }
    if (rows.weights != nullptr) return kFma;
    return rows.dtype == DType::f16 ? kHalf : kBfloat16;
  }

  // Whole vectors of columns, all aligned, as they are: the tensor-core kernels copy them in the background.
  static bool vectors(const Rows& rows) {
    const int64_t columns = rows.dtype == DType::f32 ? 4 : 8;
    return rows.conv == nullptr && rows.weights == nullptr && rows.col_stride == 1 && rows.row_stride % columns == 0 &&
           rows.d % columns == 0 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
  }

  Layout(const FactorUpdate& op, const Context& memory, int device) : arena(memory) {
    const int count = op.plan.count();
    const int capability = compute_capability(device);
    int conv_count = 0;
    for (int i = 0; i < count; ++i) conv_count += op.rows[i].conv != nullptr;
    entries = arena.table<RowsEntry>(count);
    blocks = arena.table<BlockEntry>(count);
    first = arena.table<int32_t>(count + kClasses);
    finish_first = arena.table<int32_t>(count + 1);
    convs = arena.table<Conv>(conv_count);

    int at = 0, conv = 0;
    int64_t partial_numel = 0;
    int32_t finish_items = 0;
    for (int c = 0; c < kClasses; ++c) {
      begin[c] = at;
      int32_t items = 0;
      for (const int32_t block : op.plan.by_decreasing_size()) {
        const Rows& rows = op.rows[block];
        if (kind(rows, op.dtype, capability) != c / 3 || side(op.plan.size(block), Kind{c / 3}) != kSides[c % 3])
          continue;
        RowsEntry entry = make_entry(op, block, kSides[c % 3], partial_numel);
        if (entry.chunks > 1) {
          partial_numel += static_cast<int64_t>(entry.chunks) * lower_pairs(entry.tiles) * entry.side * entry.side;
        }
        if (entries != nullptr) {  // else measuring
          if (rows.conv != nullptr) {
            convs[conv] = *rows.conv;
            entry.conv = conv++;
          }
          entries[at] = entry;
          blocks[at] = {entry.factor, entry.size, entry.index};
          first[at + c] = items;
          finish_first[at] = finish_items;
          items += entry.chunks * lower_pairs(entry.tiles);
          if (entry.chunks != 1) finish_items += lower_pairs(static_cast<int>(ceil_div(entry.size, kFinishSide)));
        }
        ++at;
      }
      if (entries != nullptr) first[at + c] = items;
    }
    begin[kClasses] = at;
    if (entries != nullptr) finish_first[at] = finish_items;
    partials = arena.scratch<T>(partial_numel);
  }

  static RowsEntry make_entry(const FactorUpdate& op, int index, int side, int64_t partial) {
    const Rows& rows = op.rows[index];
    RowsEntry entry = {};
    entry.data = rows.data;
    entry.weights = rows.weights;
    entry.m = rows.m;
    entry.row_stride = rows.row_stride;
    entry.col_stride = rows.col_stride;
    entry.factor = op.plan.offset(index);
    entry.partial = partial;
    entry.d = static_cast<int32_t>(rows.d);
    entry.size = op.plan.size(index);
    entry.side = side;
    entry.tiles = static_cast<int32_t>(ceil_div(entry.size, entry.side));
    const int64_t wanted = ceil_div(kWantedItems, std::max(lower_pairs(entry.tiles), 1));
    const int64_t even = ceil_div(ceil_div(rows.m, wanted), 32) * 32;
    const int64_t width = rows.dtype == DType::f64 ? 8 : rows.dtype == DType::f32 ? 4 : 2;
    const int64_t cheap = ceil_div(kTrafficRatio * entry.size * static_cast<int64_t>(sizeof(T)) / width, 32) * 32;
    entry.chunk_rows = std::min(std::max({even, cheap, kMinChunkRows}), kMaxChunkRows);
    entry.chunks = static_cast<int32_t>(ceil_div(rows.m, entry.chunk_rows));
    entry.conv = -1;
    entry.index = index;
    entry.dtype = rows.dtype;
    entry.bias = rows.bias;
    entry.along_k = rows.conv != nullptr || rows.row_stride < rows.col_stride;
    entry.vectors = vectors(rows);
    return entry;
  }
};

// Products of the blocks of one class. Tile: how a CTA of the kernel is organised.
template <typename Tile, typename T>
cudaError_t launch_products(void (*kernel)(RowsTables, int, FinishArguments<T>), const Layout<T>& layout, int c,
                            const FinishArguments<T>& finish, const Context& ctx) {
  const int begin = layout.begin[c], count = layout.begin[c + 1] - begin;
  const int32_t* const first = layout.first + begin + c;
  const RowsTables tables = {layout.arena.on_device(layout.entries + begin), layout.arena.on_device(first),
                             layout.arena.on_device(layout.convs)};
  const size_t shared_bytes = Tile::kSharedBytes + 2 * Tile::kSide * sizeof(PatchColumn);
  return launch(kernel, first[count], Tile::kThreads, shared_bytes, ctx.stream, tables, count, finish);
}

template <int kSide>
cudaError_t launch_mma(const Layout<float>& layout, int c, const FinishArguments<float>& finish, const Context& ctx) {
  switch (c / 3) {
    case kHalf:
      return launch_products<MmaTile<__half, kSide>>(factor_update_mma_kernel<__half, kSide>, layout, c, finish, ctx);
    case kBfloat16:
      return launch_products<MmaTile<__nv_bfloat16, kSide>>(factor_update_mma_kernel<__nv_bfloat16, kSide>, layout, c,
                                                            finish, ctx);
    case kTf32:
      return launch_products<MmaTile<Tf32, kSide>>(factor_update_mma_kernel<Tf32, kSide>, layout, c, finish, ctx);
    default:
      return launch_products<MmaTile<float, kSide>>(factor_update_mma_kernel<float, kSide>, layout, c, finish, ctx);
  }
}

template <typename T>
cudaError_t launch_class(const Layout<T>& layout, int c, const FinishArguments<T>& finish, const Context& ctx) {
  const int side = kSides[c % 3];
  if (c / 3 == kFma) {
    if (side == 64) {
      return launch_products<Tile<T, 64>>(factor_update_fma_kernel<T, 64>, layout, c, finish, ctx);
    }
    return launch_products<Tile<T, 32>>(factor_update_fma_kernel<T, 32>, layout, c, finish, ctx);
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (side == 128) return launch_mma<128>(layout, c, finish, ctx);
    if (side == 64) return launch_mma<64>(layout, c, finish, ctx);
    return launch_mma<32>(layout, c, finish, ctx);
  }
  return cudaSuccess;  // double precision has no other kind
}

template <typename T>
cudaError_t run(const FactorUpdate& op, const Context& ctx) {
  const Layout<T> layout(op, ctx, ctx.device);
  const int count = op.plan.count();
  const FinishArguments<T> finish = {layout.partials, static_cast<T*>(op.factors), static_cast<const T*>(op.decay),
                                     static_cast<const T*>(op.scale), op.nonfinite};
  cudaError_t error = layout.arena.upload(ctx.stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(op.nonfinite, 0, sizeof(int32_t) * count, static_cast<cudaStream_t>(ctx.stream));
  }
  for (int c = 0; c < kClasses && error == cudaSuccess; ++c) {
    if (layout.begin[c] == layout.begin[c + 1]) continue;
    error = launch_class(layout, c, finish, ctx);
  }
  if (error != cudaSuccess) return error;
  error = launch(factor_update_finish_kernel<T>, layout.finish_first[count], kFinishThreads,
                 sizeof(T) * kFinishSide * (kFinishSide + 1), ctx.stream, layout.arena.on_device(layout.entries),
                 layout.arena.on_device(layout.finish_first), count, finish);
  if (error != cudaSuccess) return error;
  return launch_trace(layout.arena.on_device(layout.blocks), count, finish.factors, static_cast<T*>(op.trace),
                      ctx.stream);
}

}  // namespace

WorkspaceSize cuda_factor_update_workspace(const FactorUpdate& op, const Context& ctx) {
  return op.dtype == DType::f64 ? Layout<double>(op, Context(), ctx.device).arena.size()
                                : Layout<float>(op, Context(), ctx.device).arena.size();
}

const char* cuda_factor_update(const FactorUpdate& op, const Context& ctx) {
  if (op.plan.count() == 0) return nullptr;
  const DeviceGuard guard(ctx);
  if (guard.error() != cudaSuccess) return message(guard.error());
  return message(op.dtype == DType::f64 ? run<double>(op, ctx) : run<float>(op, ctx));
}

}  // namespace kfac_fast
