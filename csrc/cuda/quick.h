#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/score.h"
#include "formulas/division.h"

// Scores that are exact where they are the largest of a tile, and take few instructions.
namespace id3::cuda {

struct ScoreRule {
  float eps;
  double exp;
  bool given;  // the gradients are the scores themselves
  // Where the largest quick score of a tile is between these keys, and no |param| + eps is above `widest`, it
  // is exact: see with_bounds.
  int32_t low = 0, high = 0;
  float widest = 0;
};

inline Exponent exponent_of(const ScoreRule& rule) {
  return rule.given ? Exponent::zero : id3::exponent_of(rule.exp);
}

// Why a quick score between the bounds is exact, with d for |param| + eps and p for the exponent:
// - p > 0: d is no less than eps, so the gradient is above 2^-98, far enough from subnormals for
// `quotient_by`,
//   also where the score is a few ulp off; d^2 up to widest^2 has a normal reciprocal.
// - p < 0: the gradient is above 2^-126, so that it is not subnormal, since d is at most widest; products
// have
//   one rounding. `root_by` needs a d of 2^-100 and more, so that its residual is not subnormal.
// - Above `high` a quotient may overflow on its way.
inline ScoreRule with_bounds(ScoreRule rule) {
  constexpr double kMost = 0x1p126;
  const double p = rule.given ? 0 : rule.exp, eps = rule.eps;
  rule.widest = p < 0 ? 0x1p16f : 0x1p60f;
  double least = p < 0 ? 0x1p-126 * std::pow(0x1p16, -p) : 0x1p-126;
  if (p > 0) least = eps < 0x1p-50 ? kMost : std::fmax(0x1p-98 / std::pow(eps, p), 0x1p-120);
  if (p == -0.5 && eps < 0x1p-100) least = kMost;
  rule.low = reinterpret_bits<int32_t>(static_cast<float>(std::fmin(least, kMost)));
  rule.high = reinterpret_bits<int32_t>(static_cast<float>(kMost));
  return rule;
}

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

// The exponents whose scores are made without flushing subnormals, divided by `quotient_by` and rooted by
// `root_by`.
template <Exponent E>
constexpr bool kQuick = E != Exponent::general;

// NaN where one of them is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
#else
  return a != a || b != b ? a + b : b > a ? b : a;
#endif
}

// Within an ulp of 1 / d. A subnormal d has an infinite reciprocal, and a subnormal reciprocal is 0.
__device__ __forceinline__ float reciprocal(float d) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
#elif defined(ID3_EMULATED_CUDA)
  return emulated::reciprocal(d);
#else
  return 1 / d;  // nvcc reads this when it compiles for the host, where it never runs
#endif
}

__device__ __forceinline__ float reciprocal_root(float d) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
  return r;
#elif defined(ID3_EMULATED_CUDA)
  return emulated::reciprocal_root(d);
#else
  return 1 / std::sqrt(d);
#endif
}

// The score, of the gradient's sign. wide: |param| + eps.
template <Exponent E>
__device__ __forceinline__ float quick_score(float grad, float wide) {
  constexpr bool kSquared = E == Exponent::two || E == Exponent::minus_two;
  constexpr bool kRooted = E == Exponent::half || E == Exponent::minus_half;
  const float d = kSquared ? wide * wide : kRooted ? root_by(reciprocal_root(wide), wide) : wide;
  if constexpr (E == Exponent::half || E == Exponent::one || E == Exponent::two)
    return quotient_by(reciprocal(d), grad, d);
  return grad * d;
}

// The key of the lane's largest quick score: its bits. One that is not certain is the bits of a NaN, or not
// between the rule's bounds.
struct QuickBest {
  float score = 0, wide = 0;

  template <Exponent E>
  __device__ __forceinline__ int32_t see(const ScoreRule& rule, float param, float grad, bool taken) {
    float mine;
    if constexpr (E == Exponent::zero) {
      const uint32_t sign = rule.given ? 0x80000000u : 0u;
      mine = reinterpret_bits<float>(reinterpret_bits<uint32_t>(grad) & (0x7fffffffu | sign));
    } else {
      const float here = fabsf(param) + rule.eps;
      wide = max_or_nan(wide, here);
      mine = fabsf(quick_score<E>(grad, here));
    }
    score = taken ? score : max_or_nan(score, mine);
    return taken ? 0 : reinterpret_bits<int32_t>(mine);
  }

  __device__ __forceinline__ int32_t key(const ScoreRule& rule) const {
    constexpr int32_t kNaN = 0x7fffffff;
    return wide <= rule.widest ? reinterpret_bits<int32_t>(score) : kNaN;  // an active weight may be NaN
  }
};

#endif

}  // namespace id3::cuda
