// Storage types as plain bits, and their exact conversions. Internal linkage throughout: the files
// that include this are compiled for different instruction sets, and the linker must not mix their
// copies.
#pragma once

#include <cstdint>
#include <cstring>

#include "params.h"

namespace minicpm41::cpu {
namespace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return as_float(uint32_t{value.bits} << 16); }
inline float widen(Half value) {
  // Moves exponent and mantissa into place and multiplies the exponent right, which serves
  // subnormals as well; no branch, so that loops over it vectorise.
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const float scaled = as_float(magnitude) * as_float(0x77800000u);  // 2^112
  const uint32_t infinite = scaled >= 65536.0f ? 0x7f800000u : 0u;
  return as_float(as_bits(scaled) | infinite | (value.bits & 0x8000u) << 16);
}

// To nearest, ties to even; NaN stays NaN.
template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = as_bits(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves 2^-24 as the last place
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline int64_t dtype_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// Calls f(T{}) with the storage type of a dtype that validate.h has accepted.
template <typename F>
inline void with_storage_type(int32_t dtype, F f) {
  switch (dtype) {
    case kFloat32:
      return f(float{});
    case kFloat16:
      return f(Half{});
    default:
      return f(BFloat16{});
  }
}

}  // namespace
}  // namespace minicpm41::cpu
