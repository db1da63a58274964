#pragma once

#include <cstdint>

#include "formulas/host_device.h"
#include "formulas/order.h"

namespace id3 {

// A sum of squares whose bits depend on the values alone, not on their order or grouping: integers are added.
//
// With s the largest power of two that no |g| is below at its largest (s <= max |g| < 2s), each (g / s)^2 < 4
// is cut to a multiple of 2^-60 and held as two integers below 2^31. 2^32 of them fit an int64 sum. For
// float32 and below (g / s)^2 is exact in float64; of float64 it is rounded once.
//
// Error of the total over n values, relative: below n * 2^-60 from the cuts, each of which is towards zero,
// and below 2^-51 from the last roundings; for float64 another 2^-53. A result below 2^-1022 is rounded to a
// subnormal.
struct SquareSum {
  int64_t high = 0;  // units of 2^-29
  int64_t low = 0;   // units of 2^-60
};

// The bits of |g|, which order as |g| does; an infinity is above all numbers and NaN above that.
template <class Value>
ID3_HOST_DEVICE Key<Value> magnitude_bits(Value g) {
  return reinterpret_bits<Key<Value>>(g) & FloatBits<Value>::kMagnitude;
}

// The scale s for the largest |g|, which is finite. At least 2^-1022: squares of what is below that are 0.
ID3_HOST_DEVICE double norm_scale(double largest) {
  constexpr int64_t kMantissa = 0x000fffffffffffff;
  const int64_t bits = reinterpret_bits<int64_t>(largest) & ~kMantissa;
  return reinterpret_bits<double>(
      bits < FloatBits<double>::kSmallestNormal ? FloatBits<double>::kSmallestNormal : bits);
}

// inverse: 1 / s.
ID3_HOST_DEVICE void add_square(double g, double inverse, int64_t& high, int64_t& low) {
  const double scaled = g * inverse, units = scaled * scaled * 0x1p29;
  const int32_t whole = static_cast<int32_t>(units);
  high += whole;
  low += static_cast<int32_t>((units - whole) * 0x1p31);
}

ID3_HOST_DEVICE double norm_total(int64_t high, int64_t low, double scale) {
  const double total = static_cast<double>(high) + static_cast<double>(low) * 0x1p-31;
  return total * 0x1p-29 * scale * scale;
}

}  // namespace id3
