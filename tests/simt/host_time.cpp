// How long the host works on a CUDA call: sizes of the workspace, tables, arguments of the launches; the launches, the
// copy and the fills themselves take no time here.
//
//     cmake -S tests/simt -B build/simt && cmake --build build/simt -t host_time && build/simt/host_time
//
// Prints the best of many calls for 200 layers of 64 x 65, with their 400 factors.
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>

#include "check.h"

namespace {

using namespace kfac_fast;

int nothing_launched(const void*, unsigned, unsigned, uint64_t, void* const*, const uint64_t*, int) { return 0; }
int nothing_copied(void*, const void*, uint64_t) { return 0; }
int nothing_filled(void*, int, uint64_t) { return 0; }

template <typename F>
double best_microseconds(F&& f) {
  double best = 1e9;
  for (int i = 0; i < 2000; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

template <typename Op>
void report(const char* name, WorkspaceSize (*size_of)(const Op&, const Context&),
            const char* (*run)(const Op&, const Context&), const Op& op) {
  Context ctx;
  const WorkspaceSize size = size_of(op, ctx);
  std::vector<char> workspace(size.device_bytes), staging(size.staging_bytes);
  ctx.workspace = workspace.data();
  ctx.staging = staging.data();
  const char* error = nullptr;
  const double sizing = best_microseconds([&] { error = size_of(op, ctx).device_bytes > 0 ? error : "no workspace"; });
  const double running = best_microseconds([&] { error = run(op, ctx); });
  std::printf("%-15s %6.1f us for sizes, %6.1f us for tables and arguments, %zu bytes of tables%s%s\n", name, sizing,
              running, size.staging_bytes, error == nullptr ? "" : ": ", error == nullptr ? "" : error);
}

}  // namespace

int main() {
  constexpr int kLayers = 200, kRows = 64, kColumns = 65, kBatch = 128;
  simt::device = {nothing_launched, nothing_copied, nothing_filled};
  std::vector<int32_t> sizes;
  for (int i = 0; i < kLayers; ++i) sizes.insert(sizes.end(), {kColumns, kRows});
  const Plan plan(sizes), g_plan(std::vector<int32_t>(kLayers, kRows)), a_plan(std::vector<int32_t>(kLayers, kColumns));
  std::vector<float> factors(plan.numel()), rows(kBatch * kColumns);
  std::vector<float> per_block(plan.count()), matrix(kRows * kColumns);
  std::vector<int32_t> flags(plan.count());

  std::vector<Rows> all_rows(plan.count());
  for (int i = 0; i < plan.count(); ++i) {
    Rows& own = all_rows[i];
    own.data = rows.data();
    own.m = kBatch;
    own.bias = i % 2 == 0;
    own.d = own.row_stride = sizes[i] - own.bias;
    own.col_stride = 1;
  }
  Matrix gradient;
  gradient.data = gradient.bias = matrix.data();
  gradient.row_stride = kColumns - 1;
  gradient.col_stride = gradient.bias_stride = 1;
  const std::vector<Matrix> gradients(kLayers, gradient);
  const int32_t open = 1;

  const OpTable& table = cuda_table();
  report<FactorUpdate>("factor_update", table.factor_update_workspace, table.factor_update,
                       {plan, DType::f32, factors.data(), all_rows.data(), per_block.data(), per_block.data(),
                        per_block.data(), flags.data()});
  report<Commit>(
      "commit", table.commit_workspace, table.commit,
      {plan, DType::f32, factors.data(), factors.data(), per_block.data(), per_block.data(), &open, per_block.data()});
  report<DampedInverse>(
      "damped_inverse", table.damped_inverse_workspace, table.damped_inverse,
      {plan, DType::f32, factors.data(), per_block.data(), factors.data(), flags.data(), false, true});
  report<Precondition>("precondition", table.precondition_workspace, table.precondition,
                       {g_plan, a_plan, DType::f32, factors.data(), factors.data(), gradients.data(), gradients.data(),
                        per_block.data()});
}
