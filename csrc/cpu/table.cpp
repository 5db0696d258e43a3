#include "amx.h"
#include "kernels.h"

// Must name the instruction sets that sources.cmake compiles, the widest first.
#if defined(KFAC_FAST_BASELINE_ONLY)
KFAC_FAST_DECLARE_KERNELS(baseline)
#elif defined(__x86_64__)
#if defined(KFAC_FAST_WITH_AMX)
KFAC_FAST_DECLARE_KERNELS(amx)  // all but commit
#endif
KFAC_FAST_DECLARE_KERNELS(avx512)
KFAC_FAST_DECLARE_KERNELS(avx2)
KFAC_FAST_DECLARE_KERNELS(avx2x16)
KFAC_FAST_DECLARE_KERNELS(baseline)
#elif defined(__aarch64__)
KFAC_FAST_DECLARE_KERNELS(neon)
#else
KFAC_FAST_DECLARE_KERNELS(baseline)
#endif

namespace kfac_fast {
namespace {

// Larger blocks work as well; from here on the library's own parallel Cholesky is as fast.
constexpr int64_t kMaxInverseSize = 2048;

#define KFAC_FAST_TABLE(isa)                                                                                       \
  OpTable {                                                                                                        \
    #isa, kMaxInverseSize, cpu::isa::factor_update_workspace, cpu::isa::factor_update, cpu::isa::commit_workspace, \
        cpu::isa::commit, cpu::isa::damped_inverse_workspace, cpu::isa::damped_inverse,                            \
        cpu::isa::precondition_workspace, cpu::isa::precondition                                                   \
  }

std::vector<const OpTable*> runnable_tables() {
  std::vector<const OpTable*> tables;
#if defined(__x86_64__) && !defined(KFAC_FAST_BASELINE_ONLY)
  static const OpTable avx512 = KFAC_FAST_TABLE(avx512);
  static const OpTable avx2 = KFAC_FAST_TABLE(avx2);
  static const OpTable avx2x16 = KFAC_FAST_TABLE(avx2x16);
  static const OpTable baseline = KFAC_FAST_TABLE(baseline);
  const bool has_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                       __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(KFAC_FAST_WITH_AMX)
  static const OpTable amx = [] {
    OpTable table = KFAC_FAST_TABLE(avx512);
    table.name = "amx";
    table.factor_update_workspace = cpu::amx::factor_update_workspace;
    table.factor_update = cpu::amx::factor_update;
    table.damped_inverse_workspace = cpu::amx::damped_inverse_workspace;
    table.damped_inverse = cpu::amx::damped_inverse;
    table.precondition_workspace = cpu::amx::precondition_workspace;
    table.precondition = cpu::amx::precondition;
    return table;
  }();
  if (has_fma && has_512 && cpu::request_amx()) tables.push_back(&amx);
#endif
  if (has_fma && has_512) tables.push_back(&avx512);
  if (has_fma) {
    tables.push_back(&avx2);
    // The 16-wide code paths on an 8-wide machine: slower than avx2, there so that tests can run them anywhere.
    tables.push_back(&avx2x16);
  }
  tables.push_back(&baseline);
#elif defined(__aarch64__) && !defined(KFAC_FAST_BASELINE_ONLY)
  static const OpTable neon = KFAC_FAST_TABLE(neon);
  tables.push_back(&neon);
#else
  static const OpTable baseline = KFAC_FAST_TABLE(baseline);
  tables.push_back(&baseline);
#endif
  return tables;
}

}  // namespace

const std::vector<const OpTable*>& cpu_tables() {
  static const std::vector<const OpTable*> tables = runnable_tables();
  return tables;
}

}  // namespace kfac_fast
