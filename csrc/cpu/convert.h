#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "cpu/simd.h"
#include "formulas/low_precision.h"

namespace id3::cpu {

ID3_INLINE float widen(float x) { return x; }
ID3_INLINE double widen(double x) { return x; }
ID3_INLINE float widen(c10::BFloat16 x) { return widen_bfloat16(x.x); }
ID3_INLINE float widen(c10::Half x) { return widen_half(x.x); }

template <class To, class From>
ID3_INLINE To round_to(From x) {
  static_assert(std::is_same_v<To, From>);
  return x;
}

template <>
ID3_INLINE c10::BFloat16 round_to<c10::BFloat16, float>(float x) {
  return {round_to_bfloat16(x), c10::BFloat16::from_bits()};
}

template <>
ID3_INLINE c10::Half round_to<c10::Half, float>(float x) {
  return {round_to_half(x), c10::Half::from_bits()};
}

// Calls visit(T()) for the C++ type T of `dtype`. The arithmetic of `dtype` must be that of Value.
template <class Value, class Visit>
void visit_dtype(c10::ScalarType dtype, const Visit& visit) {
  if constexpr (sizeof(Value) == sizeof(float)) {
    if (dtype == c10::ScalarType::BFloat16) return visit(c10::BFloat16());
    if (dtype == c10::ScalarType::Half) return visit(c10::Half());
  }
  visit(Value());
}

}  // namespace id3::cpu
