// The ops of one instruction set, as table.cpp sees them. KFAC_FAST_DECLARE_KERNELS(avx2) declares namespace avx2.
#pragma once

#include "../ops.h"

#define KFAC_FAST_DECLARE_KERNELS(isa)                                                 \
  namespace kfac_fast::cpu::isa {                                                      \
  WorkspaceSize factor_update_workspace(const FactorUpdate& op, const Context& ctx);   \
  const char* factor_update(const FactorUpdate& op, const Context& ctx);               \
  WorkspaceSize commit_workspace(const Commit& op, const Context& ctx);                \
  const char* commit(const Commit& op, const Context& ctx);                            \
  WorkspaceSize damped_inverse_workspace(const DampedInverse& op, const Context& ctx); \
  const char* damped_inverse(const DampedInverse& op, const Context& ctx);             \
  WorkspaceSize precondition_workspace(const Precondition& op, const Context& ctx);    \
  const char* precondition(const Precondition& op, const Context& ctx);                \
  }

#ifdef KFAC_FAST_ISA
KFAC_FAST_DECLARE_KERNELS(KFAC_FAST_ISA)
#endif
