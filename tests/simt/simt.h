// Controls of the SIMT shim: runs the CUDA sources of csrc/cuda on the CPU, one fiber per CUDA thread.
//
// Threads of a block run one at a time and change only at synchronisation points, in an order that the schedule
// chooses. A kernel that is free of races gives the same bits under every schedule; a barrier or a warp operation that
// not all of its threads reach is reported as a launch error that names the line.
#pragma once

#include <cstdint>

enum SimtSchedule : int { kSimtInOrder = 0, kSimtReverse = 1, kSimtRandom = 2 };

// The order of blocks, warps and lanes between synchronisation points. Per host thread; in order by default.
void simt_set_schedule(int kind, uint64_t seed);

// The device that the shim pretends to be (all host threads): dynamic shared memory a block may opt in to,
// multiprocessors, compute capability 10 * major + minor. By default an H100: 232448, 132, 90.
void simt_set_device(int shared_bytes_per_block, int multiprocessors, int compute_capability);

// Kernels launched by this host thread so far.
uint64_t simt_launch_count();
