// Tries `quotient_by` of formulas/division.h against the host's division, as C functions for ctypes.

#include "formulas/division.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>

namespace {

// As a GPU's compiler divides: the same reciprocal and Newton step, and two corrections.
float divided_by_the_compiler(float r, float g, float d) {
  r = std::fmaf(r, std::fmaf(-d, r, 1.0f), r);
  float q = g * r;
  q = std::fmaf(r, std::fmaf(-d, q, g), q);
  return std::fmaf(r, std::fmaf(-d, q, g), q);
}

constexpr uint32_t kOne = 1u << 23, kTwo = 1u << 24;  // the mantissas of a binade, as integers

// The reciprocals that the hardware may give: up to two ulp off.
struct Reciprocals {
  float of[5];
  explicit Reciprocals(float d) {
    of[2] = 1 / d;
    of[1] = std::nextafterf(of[2], 0.0f), of[0] = std::nextafterf(of[1], 0.0f);
    of[3] = std::nextafterf(of[2], 1.0f), of[4] = std::nextafterf(of[3], 1.0f);
  }
};

// How many of the reciprocals give a wrong quotient where the compiler's own division is right.
int wrong(uint32_t g, uint32_t d, const Reciprocals& reciprocals) {
  const float numerator = static_cast<float>(g), divisor = static_cast<float>(d), exact = numerator / divisor;
  int found = 0;
  for (const float r : reciprocals.of)
    found += id3::quotient_by(r, numerator, divisor) != exact &&
             (d < kTwo - 8 || divided_by_the_compiler(r, numerator, divisor) == exact);
  return found;
}

// 2^-power modulo an odd m.
uint64_t inverse_of_two(int power, uint32_t m) {
  uint32_t inverse = m;  // modulo 2^3, and each round doubles the bits
  for (int i = 0; i < 4; ++i) inverse *= 2 - m * inverse;
  const uint64_t mask = (uint64_t{1} << power) - 1;
  return ((-static_cast<uint64_t>(inverse) & mask) * m + 1) >> power;
}

}  // namespace

extern "C" {

// Of every step-th divisor in [first, 2^24): the numerators g with 2^shift · g = (odd number) · d + j for a
// small j. Returns how many are wrong; tried counts all.
int64_t wrong_near_middles(uint32_t first, uint32_t step, int64_t* tried) {
  constexpr int kNear = 16;
  int64_t found = 0;
  for (uint32_t d = first; d < kTwo; d += step) {
    const Reciprocals reciprocals(static_cast<float>(d));
    const int twos = __builtin_ctz(d);
    const uint32_t odd = d >> twos;
    if (twos > 4) continue;  // no quotient is so near to a middle
    for (const int shift : {24, 25}) {
      const uint64_t inverse = inverse_of_two(shift - twos, odd);
      for (int64_t j = -kNear; j <= kNear; ++j) {
        if (j == 0 || j % (1 << twos)) continue;
        const int64_t part = j / (1 << twos) + (j < 0 ? int64_t{kNear} * odd : 0);
        uint64_t g = static_cast<uint64_t>(part) % odd * inverse % odd;
        g += (kOne > g ? (kOne - g + odd - 1) / odd : 0) * odd;
        for (; g < kTwo; g += odd) {
          found += wrong(static_cast<uint32_t>(g), d, reciprocals);
          ++*tried;
        }
      }
    }
  }
  return found;
}

// Mantissas at both ends of the binade, all with all.
int64_t wrong_at_the_edges(uint32_t n) {
  int64_t found = 0;
  for (uint32_t i = 0; i < 2 * n; ++i) {
    const uint32_t d = i < n ? kOne + i : kTwo - 1 - (i - n);
    const Reciprocals reciprocals(static_cast<float>(d));
    for (uint32_t k = 0; k < 2 * n; ++k)
      found += wrong(k < n ? kOne + k : kTwo - 1 - (k - n), d, reciprocals);
  }
  return found;
}

int64_t wrong_at_random(int64_t n, uint64_t seed) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const uint32_t g = kOne | (seed >> 41), d = kOne | (seed >> 18 & (kOne - 1));
    found += wrong(g, d, Reciprocals(static_cast<float>(d)));
  }
  return found;
}

// Of every step-th mantissa in two binades, so that the exponent is odd and even.
int64_t wrong_roots(uint32_t first, uint32_t step) {
  int64_t found = 0;
  for (const float scale : {1.0f, 2.0f})
    for (uint32_t mantissa = first; mantissa < kTwo; mantissa += step) {
      const float d = static_cast<float>(mantissa) * scale, exact = std::sqrt(d);
      float r = static_cast<float>(1 / std::sqrt(double{d}));
      r = std::nextafterf(std::nextafterf(r, 0.0f), 0.0f);
      for (int ulps = -2; ulps <= 2; ++ulps, r = std::nextafterf(r, 1.0f))
        found += id3::root_by(r, d) != exact;
    }
  return found;
}

// The same with one reciprocal and one numerator less careful: what the tests have to find.
int64_t wrong_without_the_correction(int64_t n, uint64_t seed) {
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const float g = static_cast<float>(kOne | (seed >> 41)),
                d = static_cast<float>(kOne | (seed >> 18 & (kOne - 1)));
    found += g * (1 / d) != g / d;
  }
  return found;
}
}
