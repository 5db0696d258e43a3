// What one instruction set offers: vectors and the shape of the register tile.
//
// Every kernel file is compiled once per instruction set, into a namespace of its own. Only code in that namespace may
// end up out of line: a function template of the standard library compiled here with AVX-512 could be the copy that the
// linker keeps for the whole program, and would crash on older machines. Hence no containers and no std::min below.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(KFAC_FAST_ISA) || !defined(KFAC_FAST_VECTOR_BYTES)
#error "compile with -DKFAC_FAST_ISA=<namespace> -DKFAC_FAST_VECTOR_BYTES=<16|32|64> (see sources.cmake)"
#endif

// Before loops over registers: arrays of vectors stay in registers only when every index is a constant.
#if defined(__clang__)
#define KFAC_FAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define KFAC_FAST_UNROLL _Pragma("GCC unroll 64")
#endif

namespace kfac_fast::cpu::KFAC_FAST_ISA {

template <typename T>
struct VectorTypes {
  typedef T Aligned __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES)));
  typedef T Unaligned __attribute__((vector_size(KFAC_FAST_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};

template <typename T>
using Vec = typename VectorTypes<T>::Aligned;

template <typename T>
constexpr int kLanes = KFAC_FAST_VECTOR_BYTES / static_cast<int>(sizeof(T));

// The register tile is kTileRows x 3 vectors. Both operands of a product are packed in panels of kPanel columns
// (pack.h); kTileRows divides kPanel, so that a tile's rows never straddle two panels and one packed copy of X serves
// as both operands of X^T X.
constexpr int kTileVectors = 3;

template <typename T>
constexpr int kPanel = kTileVectors * kLanes<T>;

#if KFAC_FAST_VECTOR_BYTES == 64
template <typename T>
constexpr int kTileRows = 8;  // 24 accumulators of 32 registers
#elif KFAC_FAST_VECTOR_BYTES == 32
template <typename T>
constexpr int kTileRows = 4;  // 12 accumulators of 16 registers
#elif defined(__aarch64__)
template <typename T>
constexpr int kTileRows = 6;  // 18 accumulators of 32 registers
#else
template <typename T>
constexpr int kTileRows = sizeof(T) == 4 ? 4 : 3;  // at most 12 accumulators of 16 registers; 3 divides kPanel = 6
#endif

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::Unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorTypes<T>::Unaligned*>(p) = v;
}

inline int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t max(int64_t x, int64_t y) { return x < y ? y : x; }
inline int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t y) { return ceil_div(x, y) * y; }

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
