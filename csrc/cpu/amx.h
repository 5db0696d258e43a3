// Permission for the matrix instructions (AMX).
#pragma once

namespace kfac_fast::cpu {

// Whether the processor multiplies tiles of bfloat16 and the kernel, asked once for the whole process, lets this one
// use the large registers that this takes.
bool request_amx();

}  // namespace kfac_fast::cpu
