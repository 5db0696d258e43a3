// The host launchers behind the CUDA op table; ops.h says what they do.
#pragma once

#include "../ops.h"

namespace kfac_fast {

// damped_inverse takes larger blocks too, but from here on a library that works on one large matrix is the better one.
constexpr int64_t kMaxInverseSize = 2048;

WorkspaceSize cuda_factor_update_workspace(const FactorUpdate&, const Context&);
const char* cuda_factor_update(const FactorUpdate&, const Context&);
WorkspaceSize cuda_commit_workspace(const Commit&, const Context&);
const char* cuda_commit(const Commit&, const Context&);
WorkspaceSize cuda_damped_inverse_workspace(const DampedInverse&, const Context&);
const char* cuda_damped_inverse(const DampedInverse&, const Context&);
WorkspaceSize cuda_precondition_workspace(const Precondition&, const Context&);
const char* cuda_precondition(const Precondition&, const Context&);

}  // namespace kfac_fast
