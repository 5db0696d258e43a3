// factor_update: C <- decay C + scale X^T X for all blocks at once.
//
// Convolutions of stride 1 go by shifted images (shifted_gram.cuh) where these take fewer products; for all others
// the rows of a block are cut into chunks and its lower triangle into tiles, one CTA per (tile, chunk). Where there is
// one chunk it updates C itself; else it writes a partial product to scratch memory and a second launch adds the chunks
// in order, so that the result does not depend on which CTA ran first. How a block is cut depends on its own shape,
// strides and alignment only: its bits don't change with its company.
#include <vector>

#include "factor_mma.cuh"
#include "shifted_finish.cuh"
#include "shifted_product.cuh"

namespace kfac_fast {
namespace {

// Rows per partial product: enough items for a device on their own where a block has many rows, but not so many that
// partial products cost more than a quarter of the other traffic, nor so few that a chunk's sum loses digits.
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

// What the blocks of one launch have in common.
struct Class {
  bool shifted;
  Kind kind;
  int side;  // of a tile

  static constexpr int kCount = 2 * kKinds * 3, kShifted = kKinds * 3;  // the first one by shifted images
  explicit Class(int number)
      : shifted(number >= kShifted), kind(Kind{number % kShifted / 3}), side(kSides[number % 3]) {}
  Class(int n, Kind kind_) : shifted(false), kind(kind_), side(tile_side(n, kind_)) {}

  int number() const { return (shifted * kKinds + kind) * 3 + (side == 128 ? 0 : side == 64 ? 1 : 2); }
  static int tile_side(int n, Kind kind) {
    if (n <= 32) return 32;
    return n <= 640 || kind == kFma ? 64 : 128;
  }
};

// Tables and scratch of one call. Entries stand class by class, by decreasing size within one.
template <typename T>
struct Layout {
  Arena arena;
  RowsEntry* entries;
  int32_t* first;         // [b + kCount] items of the partial products, per class
  int32_t* finish_first;  // [b + 2] items of the last step, before and from begin[kShifted] on
  int32_t* arrived;       // [b] zeros
  Conv* convs;
  int begin[Class::kCount + 1];
  T *partials, *trace_parts;

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

  static int64_t width(const Rows& rows) {
    return rows.dtype == DType::f64 ? 8 : rows.dtype == DType::f32 || rows.dtype == DType::tf32 ? 4 : 2;
  }

  // Whole vectors of columns, or of a pixel's channels, all aligned, as they are: the tensor-core kernels copy them in
  // the background.
  static bool vectors(const Rows& rows, bool shifted) {
    const int64_t columns = 16 / width(rows);
    if (rows.weights != nullptr || reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) return false;
    if (rows.conv == nullptr) return rows.col_stride == 1 && rows.row_stride % columns == 0 && rows.d % columns == 0;
    const Conv& conv = *rows.conv;
    const int64_t* const strides = conv.spatial_stride;
    return shifted && conv.channel_stride == 1 &&
           (conv.channels | conv.batch_stride | strides[0] | strides[1] | strides[2]) % columns == 0;
  }

  // Pixels that rows are filled up to multiples of: a sector of memory, where all rows of the image begin with one; a
  // row of the image, where one follows the other without a gap.
  static int32_t run(const Rows& rows) {
    const Conv& conv = *rows.conv;
    const int64_t* const strides = conv.spatial_stride;
    const int64_t sector = 32 / width(rows);
    if (strides[2] != 1) return 1;
    if (reinterpret_cast<uintptr_t>(rows.data) % 32 == 0 &&
        (conv.channel_stride | conv.batch_stride | strides[0] | strides[1]) % sector == 0) {
      return static_cast<int32_t>(sector);
    }
    return strides[1] == conv.size[2] ? static_cast<int32_t>(conv.size[2]) : 1;
  }

  Layout(const FactorUpdate& op, const Context& memory, int device) : arena(memory) {
    const int count = op.plan.count(), capability = compute_capability(device);
    int conv_count = 0, at = 0, conv = 0;
    int64_t partial_numel = 0, parts = 0;
    std::vector<RowsEntry> made(count);
    std::vector<int32_t> classes(count), by_class(count);
    int ends[Class::kCount + 1] = {};
    for (int i = 0; i < count; ++i) {
      const int32_t block = op.plan.by_decreasing_size()[i];
      Class own(op.plan.size(block), kind(op.rows[block], op.dtype, capability));
      fill_entry(made[i], op, block, own, i == 0 ? nullptr : &made[i - 1]);
      classes[i] = own.number();
      ++ends[classes[i] + 1];
      conv_count += op.rows[block].conv != nullptr;
    }
    for (int c = 0; c < Class::kCount; ++c) ends[c + 1] += ends[c];
    for (int i = 0; i < count; ++i) by_class[ends[classes[i]]++] = i;
    entries = arena.table<RowsEntry>(count);
    first = arena.table<int32_t>(count + Class::kCount);
    finish_first = arena.table<int32_t>(count + 2);
    arrived = arena.table<int32_t>(count);
    convs = arena.table<Conv>(conv_count);

    int32_t finish_items = 0;
    for (int c = 0; c < Class::kCount; ++c) {
      begin[c] = at;
      int32_t items = 0;
      if (c == Class::kShifted) {
        if (entries != nullptr) finish_first[at] = finish_items;
        finish_items = 0;
      }
      while (at < ends[c]) {
        RowsEntry& entry = made[by_class[at]];
        const Rows& rows = op.rows[entry.index];
        const Items own = count_items(entry, rows, c >= Class::kShifted);
        entry.partial = partial_numel;
        entry.trace = parts;
        partial_numel += static_cast<int64_t>(own.partials) * entry.side * entry.side;
        parts += entry.diagonal;
        if (entries != nullptr) {  // else measuring
          if (rows.conv != nullptr) {
            convs[conv] = *rows.conv;
            entry.conv = conv++;
          }
          entries[at] = entry;
          arrived[at] = 0;
          first[at + c] = items;
          finish_first[at + (c >= Class::kShifted)] = finish_items;
        }
        items += own.products;
        finish_items += own.finish;
        ++at;
      }
      if (entries != nullptr) first[at + c] = items;
    }
    begin[Class::kCount] = at;
    if (entries != nullptr) finish_first[at + 1] = finish_items;
    partials = arena.scratch<T>(partial_numel);
    trace_parts = arena.scratch<T>(parts);
  }

  // CTAs of the products, tiles of partial products that they leave, and CTAs of the last step.
  struct Items {
    int products, partials, finish;
  };
  static Items count_items(RowsEntry& entry, const Rows& rows, bool shifted) {
    if (shifted) {
      const ShiftedShape shape(*rows.conv, rows.bias, entry.side);
      const int products = entry.chunks * shape.core_items() + entry.outer_chunks * shape.outer_items();
      entry.diagonal = static_cast<int32_t>(ceil_div(shape.channels + shape.ones, finish_channels(shape.offsets)));
      return {products, products, lower_pairs(entry.diagonal)};
    }
    const int products = entry.chunks * lower_pairs(entry.tiles);
    if (entry.chunks == 1) {
      entry.diagonal = entry.tiles;
      return {products, 0, 0};
    }
    entry.diagonal = static_cast<int32_t>(ceil_div(entry.size, kFinishSide));
    return {products, products, lower_pairs(entry.diagonal)};
  }

  // Decides on `own.shifted`. Fills in place: an entry that is copied before its parts have reached memory takes
  // longer.
  // `before` is the entry of the block before, if any: layers of one shape come together, and are cut once.
  static void fill_entry(RowsEntry& entry, const FactorUpdate& op, int index, Class& own, const RowsEntry* before) {
    const Rows& rows = op.rows[index];
    entry.data = rows.data;
    entry.weights = rows.weights;
    entry.m = rows.m;
    entry.row_stride = rows.row_stride;
    entry.col_stride = rows.col_stride;
    entry.factor = op.plan.offset(index);
    entry.d = static_cast<int32_t>(rows.d);
    entry.size = op.plan.size(index);
    entry.conv = -1;
    entry.index = index;
    entry.dtype = rows.dtype;
    entry.bias = rows.bias;
    entry.along_k = rows.conv != nullptr || rows.row_stride < rows.col_stride;
    entry.one = 1.0f;
    if (before != nullptr && before->m == entry.m && before->size == entry.size && before->dtype == entry.dtype &&
        before->side == own.side && rows.conv == nullptr && op.rows[before->index].conv == nullptr) {
      entry.side = before->side;
      entry.tiles = before->tiles;
      entry.chunk_rows = before->chunk_rows;
      entry.chunks = before->chunks;
    } else {
      cut(entry, rows, own);
    }
    entry.vectors = vectors(rows, own.shifted);
  }

  // Tiles and chunks. Partial products are written once and read once; they shall not take more than a quarter of the
  // bytes that the update takes anyway.
  static void cut(RowsEntry& entry, const Rows& rows, Class& own) {
    const int64_t n = entry.size, out_width = sizeof(T);
    const int64_t products = lower_pairs(static_cast<int>(ceil_div(n, own.side)));
    int64_t bytes = rows.m * n * width(rows);
    if (rows.conv != nullptr) {
      const Conv& conv = *rows.conv;
      bytes = conv.batch * conv.channels * conv.size[0] * conv.size[1] * conv.size[2] * width(rows);
      bytes += n * n * out_width * 3 / 2;
      const int side = conv.channels <= 32 ? 32 : 64;
      const double direct = static_cast<double>(rows.m) * products * own.side * own.side;
      const ShiftedChunks shifted = shifted_chunks(rows, side, out_width, direct, bytes / kTrafficRatio);
      if (shifted.chunks > 0) {
        own.shifted = true;
        own.side = entry.side = side;
        entry.chunks = shifted.chunks;
        entry.outer_chunks = shifted.outer_chunks;
        entry.along_k = conv.channel_stride != 1;
        entry.run = run(rows);
        return;
      }
    }
    entry.side = own.side;
    entry.tiles = static_cast<int32_t>(ceil_div(n, own.side));
    const int64_t wanted = ceil_div(kWantedItems, std::max<int64_t>(products, 1));
    const int64_t affordable = std::max<int64_t>(bytes / (kTrafficRatio * std::max<int64_t>(n * n, 1) * out_width), 1);
    const int64_t even = ceil_div(ceil_div(rows.m, std::min(wanted, affordable)), 32) * 32;
    entry.chunk_rows = std::min(std::max(even, kMinChunkRows), kMaxChunkRows);
    entry.chunks = static_cast<int32_t>(ceil_div(rows.m, entry.chunk_rows));
  }
};

// Products of the blocks of one class: kernels for rows as they are and for shifted images, and how their CTAs are
// organised.
template <typename Tile, typename ShiftedTile, typename T>
cudaError_t launch_products(void (*kernel)(RowsTables, int, FinishArguments<T>), void (*shifted)(RowsTables, int, T*),
                            const Layout<T>& layout, int c, const FinishArguments<T>& finish, const Context& ctx) {
  const int begin = layout.begin[c], count = layout.begin[c + 1] - begin;
  const int32_t* const first = layout.first + begin + c;
  const RowsTables tables = {layout.arena.on_device(layout.entries + begin), layout.arena.on_device(first),
                             layout.arena.on_device(layout.convs)};
  if (Class(c).shifted) {
    const size_t shared_bytes = ShiftedTile::kSharedBytes + Pixels<ShiftedTile::kDepth>::kSharedBytes;
    return launch(shifted, first[count], ShiftedTile::kThreads, shared_bytes, ctx.stream, tables, count,
                  finish.partials);
  }
  const size_t shared_bytes = Tile::kSharedBytes + 2 * Tile::kSide * sizeof(PatchColumn);
  return launch(kernel, first[count], Tile::kThreads, shared_bytes, ctx.stream, tables, count, finish);
}

template <typename E, int kSide>
cudaError_t launch_mma(const Layout<float>& layout, int c, const FinishArguments<float>& finish, const Context& ctx) {
  void (*shifted)(RowsTables, int, float*) = nullptr;  // channels are not cut into tiles of 128
  if constexpr (kSide <= 64) shifted = shifted_gram_mma_kernel<E, kSide>;
  return launch_products<MmaTile<E, kSide>, ShiftedTile<E, kSide>>(factor_update_mma_kernel<E, kSide>, shifted, layout,
                                                                   c, finish, ctx);
}

template <int kSide>
cudaError_t launch_mma(const Layout<float>& layout, int c, const FinishArguments<float>& finish, const Context& ctx) {
  switch (Class(c).kind) {
    case kHalf:
      return launch_mma<__half, kSide>(layout, c, finish, ctx);
    case kBfloat16:
      return launch_mma<__nv_bfloat16, kSide>(layout, c, finish, ctx);
    case kTf32:
      return launch_mma<Tf32, kSide>(layout, c, finish, ctx);
    default:
      return launch_mma<float, kSide>(layout, c, finish, ctx);
  }
}

template <typename T, int kSide>
cudaError_t launch_fma(const Layout<T>& layout, int c, const FinishArguments<T>& finish, const Context& ctx) {
  using Own = Tile<T, kSide>;
  return launch_products<Own, Own>(factor_update_fma_kernel<T, kSide>, shifted_gram_fma_kernel<T, kSide>, layout, c,
                                   finish, ctx);
}

template <typename T>
cudaError_t launch_class(const Layout<T>& layout, int c, const FinishArguments<T>& finish, const Context& ctx) {
  const Class own(c);
  if (own.kind == kFma) {
    return own.side == 64 ? launch_fma<T, 64>(layout, c, finish, ctx) : launch_fma<T, 32>(layout, c, finish, ctx);
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    if (own.side == 128) return launch_mma<128>(layout, c, finish, ctx);
    if (own.side == 64) return launch_mma<64>(layout, c, finish, ctx);
    return launch_mma<32>(layout, c, finish, ctx);
  }
  return cudaSuccess;  // double precision has no other kind
}

template <typename T>
cudaError_t run(const FactorUpdate& op, const Context& ctx) {
  const Layout<T> layout(op, ctx, ctx.device);
  const int count = op.plan.count(), direct = layout.begin[Class::kShifted];
  const FinishArguments<T> finish = {layout.partials,
                                     static_cast<T*>(op.factors),
                                     static_cast<const T*>(op.decay),
                                     static_cast<const T*>(op.scale),
                                     op.nonfinite,
                                     static_cast<T*>(op.trace),
                                     layout.trace_parts,
                                     const_cast<int32_t*>(layout.arena.on_device(layout.arrived))};
  const cudaStream_t stream = static_cast<cudaStream_t>(ctx.stream);
  cudaError_t error = layout.arena.upload(ctx.stream);
  if (error == cudaSuccess) error = cudaMemsetAsync(op.nonfinite, 0, sizeof(int32_t) * count, stream);
  if (error == cudaSuccess && op.plan.size(op.plan.by_decreasing_size().back()) == 0) {  // nobody works on an empty one
    error = cudaMemsetAsync(op.trace, 0, sizeof(T) * count, stream);
  }
  for (int c = 0; c < Class::kCount && error == cudaSuccess; ++c) {
    if (layout.begin[c] == layout.begin[c + 1]) continue;
    error = launch_class(layout, c, finish, ctx);
  }
  if (error != cudaSuccess) return error;
  error = launch(factor_update_finish_kernel<T>, layout.finish_first[direct], kFinishThreads,
                 sizeof(T) * kFinishSide * (kFinishSide + 1), ctx.stream, layout.arena.on_device(layout.entries),
                 layout.arena.on_device(layout.finish_first), direct, finish);
  if (error != cudaSuccess || direct == count) return error;
  const int32_t* const first = layout.finish_first + direct + 1;
  const RowsTables tables = {layout.arena.on_device(layout.entries + direct), layout.arena.on_device(first),
                             layout.arena.on_device(layout.convs)};
  return launch(shifted_gram_finish_kernel<T>, first[count - direct], kFinishThreads, kShiftedFinishBytes<T>,
                ctx.stream, tables, count - direct, finish);
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
