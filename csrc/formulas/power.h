#pragma once

#include <cstdint>

#include "formulas/host_device.h"
#include "formulas/order.h"

// |grad| / d^exp for any exponent, in plain float64 arithmetic with one rounding to float32. The code has no
// branch, table or call, so that loops over it become vector code, and every compiler and instruction set
// gives the same bits. A library's pow promises neither.
//
// Error bound: 0.52 ulp of float32, for every exponent. With y = -exp·log2(d) the score is |grad|·2^y.
// - log2(d) has a relative error below 2^-37.7. It is a fit in (m - 1) / (m + 1), both exact, and adding the
//   whole part of the logarithm never cancels, because |log2(m)| <= ½.
// - Beyond |y| = 280 the score is 0 or infinite for every gradient. Up to there the error of y is at most
//   280·2^-37.7, which multiplies 2^y by 1 ± 2^-30.1.
// - The fit of 2^f adds a relative error of 2^-34.3.
// - The rounding to float32 adds half an ulp; the rest is below 1/64 ulp.

namespace id3 {

// log2(x) of a float32 x > 0 that is finite: its relative error is below 2^-37.7.
ID3_HOST_DEVICE double log2_of(float x) {
  constexpr uint64_t kRootOfHalf = 0x3fe6a09e667f3bcd, kBias = 1024;  // the bias keeps the exponent positive
  const uint64_t bits = reinterpret_bits<uint64_t>(static_cast<double>(x));
  const uint64_t biased = (bits - kRootOfHalf + (kBias << 52)) >> 52;
  const double whole = reinterpret_bits<double>(biased | 0x4330000000000000) - (0x1p52 + kBias);
  const double m = reinterpret_bits<double>(bits - ((biased - kBias) << 52));  // in [√½, √2)
  const double t = (m - 1.0) / (m + 1.0), u = t * t;
  // The minimax fit of log2(m) / t for |t| <= (√2 - 1)/(√2 + 1).
  double p = 0.34073010671526177;
  p = p * u + 0.4116727187647502;
  p = p * u + 0.5770835849752296;
  p = p * u + 0.9617966733416873;
  p = p * u + 2.8853900817900864;
  return whole + t * p;
}

// 2^y for |y| <= 280: its relative error is below 2^-34.3.
ID3_HOST_DEVICE double exp2_of(double y) {
  constexpr double kToWhole = 0x1.8p52;  // a sum with it is a whole number, in its lowest bits
  const double rounded = y + kToWhole;
  const double f = y - (rounded - kToWhole);  // in [-½, ½]
  // The minimax fit of 2^f whose value at 0 is 1.
  double p = 1.519615423309432e-05;
  p = p * f + 0.00015466756522883971;
  p = p * f + 0.0013333935066439239;
  p = p * f + 0.009618038131296122;
  p = p * f + 0.055504103659764895;
  p = p * f + 0.24022651066567688;
  p = p * f + 0.6931471807045381;
  p = p * f + 1.0;
  const uint64_t exponent = reinterpret_bits<uint64_t>(rounded) << 52;
  return reinterpret_bits<double>(reinterpret_bits<uint64_t>(p) + exponent);
}

// grad / d^exp for a grad that is 0, normal, infinite or NaN, d >= 0 or NaN, and a finite exp other than 0. A
// d of 0 or infinity has the power that pow gives it; NaN stays NaN. An infinite grad over a finite d > 0 is
// infinite.
ID3_HOST_DEVICE float over_power(float grad, float d, double exp) {
  const float infinity = reinterpret_bits<float>(FloatBits<float>::kInfinity);
  constexpr double kEnough = 280.0;  // any normal float32 times 2^±280 is infinite, or rounds to 0
  double y = -exp * log2_of(d);
  y = y < kEnough ? y : kEnough;
  y = y > -kEnough ? y : -kEnough;
  const float score = static_cast<float>(static_cast<double>(grad) * exp2_of(y));
  const float at_zero = exp > 0 ? infinity : 0.0f, at_infinity = exp > 0 ? 0.0f : infinity;
  const float limit = d == 0.0f ? at_zero : d == infinity ? at_infinity : d;
  return (d > 0.0f) & (d < infinity) ? score : grad * limit;
}

}  // namespace id3
