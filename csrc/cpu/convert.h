// Element types and their conversions. Widening is exact, subnormals, infinities and NaNs included; narrowing rounds
// to nearest, ties to even. Written with selects instead of branches so that loops over them vectorise.
#pragma once

#include <cstring>

#include "../ops.h"
#include "isa.h"

namespace kfac_fast::cpu::KFAC_FAST_ISA {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float widen(Half x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;  // exponent and mantissa, float's places
  const uint32_t exponent = magnitude & 0x0f800000;
  const uint32_t rebias = exponent == 0x0f800000 ? (255u - 31u) << 23 : (127u - 15u) << 23;
  // A subnormal is its mantissa times 2^-24: build 2^-14 (1 + mantissa) and take 2^-14 away. No float subnormal
  // occurs on the way, so the result does not depend on the processor's flush-to-zero mode.
  const float normal = float_from_bits(magnitude + rebias);
  const float subnormal = float_from_bits(magnitude + (113u << 23)) - float_from_bits(113u << 23);
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return float_from_bits(bits_from_float(exponent == 0 ? subnormal : normal) | sign);
}

template <typename T, typename Source>
inline T convert(Source x) {
  return static_cast<T>(widen(x));
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, double* out) { *out = x; }
inline void narrow(double x, float* out) { *out = static_cast<float>(x); }

inline void narrow(float x, BFloat16* out) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? quiet_nan : rounded);
}

inline void narrow(float x, Half* out) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t sign = (bits >> 16) & 0x8000;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and more round to infinity
  } else if (magnitude < 0x38800000) {
    // Below 2^-14: adding 1/2 leaves multiples of 2^-24, rounded by the processor, in the mantissa's low bits.
    half = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

// Rounding twice, to float and then to 16 bits, can be off by one unit in the last place of the result when the double
// lies within 2^-24 of a tie: below what a gradient in 16 bits can show.
inline void narrow(double x, BFloat16* out) { narrow(static_cast<float>(x), out); }
inline void narrow(double x, Half* out) { narrow(static_cast<float>(x), out); }

// Calls body(Element{}) with the C++ type of `dtype`.
template <typename Body>
inline void with_element(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32:
    case DType::tf32:
      return body(float{});
    case DType::f64:
      return body(double{});
    case DType::f16:
      return body(Half{});
    case DType::bf16:
      return body(BFloat16{});
  }
}

}  // namespace kfac_fast::cpu::KFAC_FAST_ISA
