#pragma once

#include <cmath>

#include "formulas/host_device.h"
#include "formulas/order.h"
#include "formulas/power.h"

namespace id3 {

// The exponents that need neither a power nor float64; on these all backends agree bit for bit. `general`
// gives the same bits wherever this header is compiled, for float32 arithmetic; float64 arithmetic takes the
// library's pow.
enum class Exponent { zero, half, one, two, minus_half, minus_one, minus_two, general };

inline Exponent exponent_of(double exp) {
  if (exp == 0.0) return Exponent::zero;
  if (exp == 0.5) return Exponent::half;
  if (exp == 1.0) return Exponent::one;
  if (exp == 2.0) return Exponent::two;
  if (exp == -0.5) return Exponent::minus_half;
  if (exp == -1.0) return Exponent::minus_one;
  if (exp == -2.0) return Exponent::minus_two;
  return Exponent::general;
}

// D3 (equation 1 of the paper): |grad| / (|param| + eps)^exp, each operation rounded once in Value
// (`general`: as power.h says), where a subnormal |grad| counts as 0. The result may be subnormal, infinite
// or NaN: `key_of` orders it. `exp` is read by `general` alone, `param` is not read by `zero`.
template <Exponent E, class Value>
ID3_HOST_DEVICE Value d3_unflushed(Value param, Value grad, Value eps, double exp) {
  const Value g = flush_subnormal(std::fabs(grad));
  const Value d = std::fabs(param) + eps;
  if constexpr (E == Exponent::half) return g / std::sqrt(d);
  if constexpr (E == Exponent::one) return g / d;
  if constexpr (E == Exponent::two) return g / (d * d);
  if constexpr (E == Exponent::minus_half) return g * std::sqrt(d);
  if constexpr (E == Exponent::minus_one) return g * d;
  if constexpr (E == Exponent::minus_two) return g * (d * d);
  if constexpr (E == Exponent::general) {
    if constexpr (sizeof(Value) == sizeof(float)) return over_power(g, d, exp);
    return static_cast<Value>(g / std::pow(d, exp));
  }
  return g;
}

// The score as it is shown: 0 for a zero or subnormal |grad|, whatever the param, and for a subnormal score;
// NaN and infinities pass through.
template <Exponent E, class Value>
ID3_HOST_DEVICE Value d3(Value param, Value grad, Value eps, double exp) {
  const Value score = flush_subnormal(d3_unflushed<E>(param, grad, eps, exp));
  return flush_subnormal(grad) == Value(0) ? Value(0) : score;
}

}  // namespace id3
