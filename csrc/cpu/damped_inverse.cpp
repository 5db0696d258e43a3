// (C + damping I)^-1 of many blocks: one block per thread, the largest first; where a few large blocks dominate, all
// threads work inside each of them. Limit: multiply-adds; for n < 64 the chain of pivots.
#include <cmath>

#include "blocked_inverse.h"
#include "interleaved_inverse.h"
#include "kernels.h"
#include "split_inverse.h"
#include "support.h"
#include "team.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {
namespace {

// A block that all threads invert together costs each of them, beside its share, for every row of the block as much
// time as these multiply-adds: pivots, which one thread finds, and barriers.
template <typename T>
constexpr double kTeamCost = kHasMatrixTiles<T> ? 170e3 : 60e3;

// Up to here kLanes blocks are inverted at once, one per vector lane, ...
constexpr int64_t kInterleavedSize = 64;

// ... if there are enough of them of about the same size: one at a time the sweep does n = 64 at a third of the rate
// that all lanes together have, n = 16 at a tenth, so that a group pays from sum of n_i^3 > n_max^4 / kSmallestGain on.
constexpr double kSmallestGain = 16;

// From here on the matrix instructions are faster; at 112, which they pad to 128, they are slower.
constexpr int64_t kMinSplitSize = 120;

template <typename T>
inline bool by_matrix_tiles(int64_t n) {
  return kHasMatrixTiles<T> && n >= kMinSplitSize;
}

bool is_selected(const DampedInverse& op, int block) { return !op.retry_failed || op.info[block] != 0; }

// How many of the leading blocks in order of size are inverted by all threads together. Which blocks are selected is
// ignored: the workspace is sized before `info` is known.
template <typename T>
int team_blocks(const Plan& plan, int threads) {
  const auto cube = [&](int x) {
    const double n = x < plan.count() ? static_cast<double>(plan.size(plan.by_decreasing_size()[x])) : 0;
    return n * n * n;
  };
  const auto total = [&] {
    double sum = 0;
    for (int x = 0; x < plan.count(); ++x) sum += cube(x);
    return sum;
  };
  return team_tasks(threads, total, cube, [](double work) { return kTeamCost<T> * std::cbrt(work); });
}

template <typename T>
void report(const DampedInverse& op, int block, int64_t failed) {
  op.info[block] = static_cast<int32_t>(failed);
  if (failed == 0 || !op.nan_on_failure) return;
  const int64_t n = op.plan.size(block);
  T* inverse = static_cast<T*>(op.inverse) + op.plan.offset(block);
  for (int64_t i = 0; i < n * n; ++i) inverse[i] = static_cast<T>(__builtin_nan(""));
}

// What the inversion of a block will touch; nothing if there is no such block.
template <typename T>
Ahead memory_of(const DampedInverse& op, int block) {
  Ahead ahead;
  if (block < 0) return ahead;
  const int64_t n = op.plan.size(block);
  ahead.add(static_cast<const T*>(op.blocks) + op.plan.offset(block), n * n * static_cast<int64_t>(sizeof(T)));
  ahead.add(static_cast<const T*>(op.inverse) + op.plan.offset(block), n * n * static_cast<int64_t>(sizeof(T)));
  return ahead;
}

template <typename T>
struct Scratch {
  SweepScratch<T> sweep;
  SplitInverseScratch split;
  InterleavedScratch<T> interleaved;
};

template <typename T>
int64_t invert(const T* source, T damping, int64_t n, T* inverse, const Scratch<T>& scratch, int threads,
               Ahead& ahead) {
#if defined(__AMX_BF16__)
  if constexpr (kHasMatrixTiles<T>) {
    if (by_matrix_tiles<T>(n)) return invert_split(source, damping, n, inverse, scratch.split, threads, ahead);
  }
#endif
  return invert_by_sweep(source, damping, n, inverse, scratch.sweep, threads, ahead);
}

template <typename T>
void invert_block(const DampedInverse& op, int block, int next, const Scratch<T>& scratch, int threads) {
  Ahead ahead = memory_of<T>(op, next);
  const int64_t n = op.plan.size(block);
  T* inverse = static_cast<T*>(op.inverse) + op.plan.offset(block);
  const T* source = static_cast<const T*>(op.blocks) + op.plan.offset(block);
  const int64_t failed = invert(source, static_cast<const T*>(op.damping)[block], n, inverse, scratch, threads, ahead);
  report<T>(op, block, failed);
}

// Blocks in order of decreasing size: the team's, then those that take one thread each, then groups of kLanes small
// ones. The cut depends on the sizes alone (but for the team, whose results are the same bit for bit).
template <typename T>
struct Schedule {
  int team, first_small, count;

  Schedule(const Plan& plan, int threads)
      : team(team_blocks<T>(plan, threads)), first_small(team), count(plan.count()) {
    while (first_small < count && plan.size(plan.by_decreasing_size()[first_small]) > kInterleavedSize) ++first_small;
  }
  int groups() const { return static_cast<int>(ceil_div(count - first_small, kLanes<T>)); }
  int tasks() const { return first_small - team + groups(); }
};

template <typename T>
void invert_group(const DampedInverse& op, int begin, int end, const Scratch<T>& scratch) {
  const int32_t* order = op.plan.by_decreasing_size().data();
  InterleavedGroup<T> group;
  group.n = op.plan.size(order[begin]);
  double cubes = 0;
  for (int x = begin; x < end; ++x) {
    const int block = order[x];
    const int lane = group.count++;
    const double n = op.plan.size(block);
    cubes += n * n * n;
    group.sizes[lane] = op.plan.size(block);
    group.blocks[lane] = static_cast<const T*>(op.blocks) + op.plan.offset(block);
    group.damping[lane] = static_cast<const T*>(op.damping)[block];
    group.inverses[lane] = is_selected(op, block) ? static_cast<T*>(op.inverse) + op.plan.offset(block) : nullptr;
  }
  group.smallest = group.count == kLanes<T> ? op.plan.size(order[end - 1]) : 0;
  if (cubes * kSmallestGain < static_cast<double>(group.n) * group.n * group.n * group.n) {
    for (int x = begin; x < end; ++x) {
      if (is_selected(op, order[x])) invert_block(op, order[x], -1, scratch, 1);
    }
    return;
  }
  bool wanted = false;
  for (int lane = 0; lane < group.count; ++lane) wanted = wanted || group.inverses[lane] != nullptr;
  if (!wanted) return;
  invert_interleaved(group, scratch.interleaved);
  for (int lane = 0; lane < group.count; ++lane) {
    if (group.inverses[lane] != nullptr) report<T>(op, order[begin + lane], group.info[lane]);
  }
}

template <typename T>
void lay_out(const DampedInverse& op, int threads, Arena& arena, Scratch<T>* scratch) {
  const Plan& plan = op.plan;
  const Schedule<T> schedule(plan, threads);
  const auto size_at = [&](int x) { return x < plan.count() ? plan.size(plan.by_decreasing_size()[x]) : 0; };
  for (int thread = 0; thread < threads; ++thread) {
    Scratch<T> mine;
    const int64_t n = thread == 0 ? plan.max_size() : size_at(schedule.team);
    mine.sweep = SweepScratch<T>::take(arena, by_matrix_tiles<T>(n) ? kMinSplitSize - 1 : n);
    mine.split = SplitInverseScratch::take(arena, by_matrix_tiles<T>(n) ? n : 0);
    mine.interleaved = InterleavedScratch<T>::take(arena, size_at(schedule.first_small));
    if (scratch != nullptr) scratch[thread] = mine;
  }
}

template <typename T>
void run(const DampedInverse& op, const Context& ctx) {
  const int threads = usable_threads(ctx.threads);
  Arena arena(ctx.workspace);
  auto* scratch = arena.take<Scratch<T>>(threads);
  lay_out(op, threads, arena, scratch);

  const int32_t* order = op.plan.by_decreasing_size().data();
  const Schedule<T> schedule(op.plan, threads);
  for (int x = 0; x < schedule.team; ++x) {
    if (is_selected(op, order[x])) invert_block<T>(op, order[x], -1, scratch[0], threads);
  }
  parallel_for(threads, schedule.tasks(), [&](int64_t task, int thread) {
    const int x = schedule.team + static_cast<int>(task);
    if (x < schedule.first_small) {
      const int next = x + threads < schedule.first_small ? order[x + threads] : -1;
      if (is_selected(op, order[x])) invert_block<T>(op, order[x], next, scratch[thread], 1);
    } else {
      const int begin = schedule.first_small + (x - schedule.first_small) * kLanes<T>;
      invert_group<T>(op, begin, static_cast<int>(min(begin + kLanes<T>, schedule.count)), scratch[thread]);
    }
  });
}

template <typename T>
size_t bytes_for(const DampedInverse& op, int threads) {
  Arena arena(nullptr);
  arena.take<Scratch<T>>(threads);
  lay_out<T>(op, threads, arena, nullptr);
  return arena.used();
}

}  // namespace

WorkspaceSize damped_inverse_workspace(const DampedInverse& op, const Context& ctx) {
  return workspace_for(op.dtype, ctx.threads,
                       [&](auto element, int threads) { return bytes_for<decltype(element)>(op, threads); });
}

const char* damped_inverse(const DampedInverse& op, const Context& ctx) {
  with_factor_type(op.dtype, [&](auto element) { run<decltype(element)>(op, ctx); });
  return nullptr;
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
