#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/simd.h"
#include "cpu/tiles.h"
#include "formulas/order.h"

// Estimates of the scores with a general exponent, from rough logarithms in float32. A score costs several
// times what a read of its entry costs, an estimate less than that read. The estimate of a tile is 127 + log2
// of its largest score, or 0 where the tile holds no selectable entry. Estimate and score differ by less than
// `estimate_error`, so that only tiles near a threshold or above it need scores.

namespace id3::cpu {

// The error of rough_log2 is 0.00764, and that of rounding numbers below 256. What is left to 0.0078 covers
// the rounding of the difference of two logarithms, and of the score itself.
constexpr float kLogError = 0.0078f;
constexpr float kLowestEstimate = 1, kHighestEstimate = 255;  // of the normal float32 scores
constexpr double kSteepest = 32;  // a larger |exp| makes estimates too coarse to exclude tiles

inline bool can_estimate(const ScoreRule<float>& rule) {
  return rule.exponent == Exponent::general && std::fabs(rule.exp) <= kSteepest;
}

// In units of log2: the errors of log2(|g|), of exp·log2(d), and of the logarithm of a score.
inline float estimate_error(const ScoreRule<float>& rule) {
  return kLogError * (2 + std::fabs(static_cast<float>(rule.exp)));
}

// 127 + log2 of the normal float32 with these bits.
ID3_INLINE float rough_log2(int32_t bits) {
  constexpr float kUnit = 0x1p-23f, kBend = 0.34655f;
  const float mantissa = static_cast<float>(bits & 0x007fffff) * kUnit;
  return static_cast<float>(bits) * kUnit + kBend * (mantissa - mantissa * mantissa);
}

// The estimates of one tile's entries. Returns whether they hold: a NaN, an infinity, and a |param| + eps
// that is zero or subnormal have no rough logarithm.
ID3_INLINE bool estimate_loop(const ScoreRule<float>& rule, const float* param, const float* grad,
                              float* __restrict estimates) {
  using Bits = FloatBits<float>;
  const float eps = rule.eps, exp = static_cast<float>(rule.exp);
  int32_t highest = 0, lowest = Bits::kInfinity;
  for (int64_t i = 0; i < kTile; ++i) {
    const int32_t g = reinterpret_bits<int32_t>(grad[i]) & Bits::kMagnitude;
    const int32_t d = reinterpret_bits<int32_t>(std::fabs(param[i]) + eps) & Bits::kMagnitude;
    highest = std::max(highest, std::max(g, d));
    lowest = std::min(lowest, d);
    const float estimate = rough_log2(g) - exp * (rough_log2(d) - 127.0f);
    estimates[i] = g < Bits::kSmallestNormal ? 0.0f : estimate;
  }
  return highest < Bits::kInfinity && lowest >= Bits::kSmallestNormal;
}

// The estimated maximum of each of `count` tiles from entry `first` on, as its bits; -1 where the estimates
// do not hold, or leave open whether the largest score overflows or is subnormal.
struct TileEstimates {
  ID3_INLINE static void run(const ScoredTensor<float>& t, int64_t first, int64_t count, int32_t* maxima) {
    alignas(64) float estimates[kTile], param_buffer[kTile], grad_buffer[kTile];
    const float error = estimate_error(t.rule);
    ActiveCursors active(t.active, first);
    for (int64_t tile = 0; tile < count; ++tile, first += kTile) {
      const int64_t length = std::min(kTile, t.numel - first);
      const float* grad = tile_values(t.grad, first, length, grad_buffer);
      const float* param = tile_values(t.param, first, length, param_buffer);
      bool holds = estimate_loop(t.rule, param, grad, estimates);
      exclude_active(active, first, kTile, estimates);
      int32_t largest = 0;  // a negative estimate is that of a subnormal score
      for (int64_t i = 0; i < kTile; ++i)
        largest = std::max(largest, reinterpret_bits<int32_t>(estimates[i]));
      const float estimate = reinterpret_bits<float>(largest);
      holds = holds &&
              (largest == 0 || (estimate > kLowestEstimate + error && estimate < kHighestEstimate - error));
      maxima[tile] = holds ? largest : -1;
    }
  }
};

// The estimated maximum of each of `count` tiles from entry `first` on, as its bits; where there is none,
// that of the score.
inline void estimate_maxima(const ScoredTensor<float>& t, int64_t first, int64_t count, int32_t* maxima) {
  run_simd<TileEstimates>(t, first, count, maxima);
  for (int64_t tile = 0; tile < count; ++tile, first += kTile) {
    if (maxima[tile] >= 0) continue;
    run_simd<TileMaxima>(t, first, int64_t(1), maxima + tile);
    if (maxima[tile] != 0) maxima[tile] = reinterpret_bits<int32_t>(rough_log2(maxima[tile]));
  }
}

}  // namespace id3::cpu
