// The registers of the processor's matrix instructions (AMX): 16 rows of 64 bytes each. An instruction multiplies
// 16 x 32 by 32 x 16 bfloat16 numbers and adds the 16 x 16 products in float32; to it subnormal numbers are zeros.
// Compiled in the namespace of these instructions alone; amx.h says whether they may run.
#pragma once

#include "isa.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace kfac_fast::cpu::KFAC_FAST_ISA {

#if defined(__AMX_BF16__)
template <typename T>
constexpr bool kHasMatrixTiles = sizeof(T) == sizeof(float);
#else
template <typename T>
constexpr bool kHasMatrixTiles = false;
#endif

constexpr int64_t kTileSide = 16;   // rows and columns of a tile of sums
constexpr int64_t kTileDepth = 32;  // products that one instruction adds to a sum: two to a 32-bit word
constexpr int64_t kTileWords = kTileSide * kTileSide;

#if defined(__AMX_BF16__)

// Set up for the life of this object. They are part of the thread's state, hence given back.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    // The compiler takes the instruction for one that reads the first eight bytes alone.
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// The compiler's tile loads do not say that they read memory, nor its tile stores that they write it.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

#endif

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
