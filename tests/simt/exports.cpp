// C functions of the simulated CUDA backend, for ctypes (tests/conftest.py).
#include <cuda_runtime.h>

#include "ops.h"
#include "simt.h"

extern "C" {

// Address of the OpTable, for kfac_fast._C.table_at.
const void* simt_table() { return &kfac_fast::cuda_table(); }

void simt_schedule(int kind, uint64_t seed) { simt_set_schedule(kind, seed); }

void simt_device(int shared_bytes_per_block, int multiprocessors, int compute_capability) {
  simt_set_device(shared_bytes_per_block, multiprocessors, compute_capability);
}

// From here on launches go to these functions (see simt::Device); with nulls they run here again.
void simt_use_device(decltype(simt::Device::launch) launch, decltype(simt::Device::copy) copy,
                     decltype(simt::Device::fill) fill) {
  simt::device = {launch, copy, fill};
}

uint64_t simt_launches() { return simt_launch_count(); }
}
