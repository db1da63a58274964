#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "cpu/simd.h"
#include "formulas/order.h"

namespace id3::cpu {

// Widening and rounding without branches and without arithmetic on subnormals, so that loops over them
// vectorise on every instruction set. (c10's conversions branch, and use F16C only where a build assumes it.)

ID3_INLINE float widen(float x) { return x; }
ID3_INLINE double widen(double x) { return x; }

ID3_INLINE float widen(c10::BFloat16 x) { return reinterpret_bits<float>(static_cast<uint32_t>(x.x) << 16); }

ID3_INLINE float widen(c10::Half x) {
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(x.x & 0x8000) << 16;
  const uint32_t magnitude = x.x & 0x7fff;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t special = normal + kRebias;  // infinities and NaN: exponent 31 becomes 255
  const uint32_t subnormal =
      reinterpret_bits<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return reinterpret_bits<float>(sign | (magnitude < 0x7c00 ? finite : special));
}

// Round to nearest even.
template <class To, class From>
ID3_INLINE To round_to(From x) {
  static_assert(std::is_same_v<To, From>);
  return x;
}

template <>
ID3_INLINE c10::BFloat16 round_to<c10::BFloat16, float>(float x) {
  const uint32_t bits = reinterpret_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(nan ? 0x7fc0 : rounded), c10::BFloat16::from_bits()};
}

template <>
ID3_INLINE c10::Half round_to<c10::Half, float>(float x) {
  const uint32_t bits = reinterpret_bits<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - ((127u - 15) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a half is a multiple of 2^-24, which is the last bit of 0.5: adding 0.5 rounds to it.
  const uint32_t subnormal =
      reinterpret_bits<uint32_t>(reinterpret_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return {static_cast<uint16_t>(sign | (magnitude < 0x47800000 ? finite : special)), c10::Half::from_bits()};
}

// visit(T()) for the C++ type T of `dtype`, which must be one whose arithmetic is done in Value.
template <class Value, class Visit>
void visit_dtype(c10::ScalarType dtype, const Visit& visit) {
  if constexpr (sizeof(Value) == sizeof(float)) {
    if (dtype == c10::ScalarType::BFloat16) return visit(c10::BFloat16());
    if (dtype == c10::ScalarType::Half) return visit(c10::Half());
  }
  visit(Value());
}

}  // namespace id3::cpu
