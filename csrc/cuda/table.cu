// The CUDA backend's op table.
#include <cuda_runtime.h>

#include "kernels.h"

namespace kfac_fast {

const OpTable& cuda_table() {
#ifdef KFAC_FAST_SIMT
  constexpr const char* kName = "simulated";
#else
  constexpr const char* kName = "cuda";
#endif
  static const OpTable table = {
      kName,
      kMaxInverseSize,
      cuda_factor_update_workspace,
      cuda_factor_update,
      cuda_commit_workspace,
      cuda_commit,
      cuda_damped_inverse_workspace,
      cuda_damped_inverse,
      cuda_precondition_workspace,
      cuda_precondition,
  };
  return table;
}

}  // namespace kfac_fast
