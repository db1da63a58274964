#pragma once

#include <cstdint>

#include "formulas/order.h"

namespace id3 {

// Widening and rounding (to nearest even) of 16-bit floats by their bits, without branches and without
// arithmetic on subnormals, so that a loop vectorises on every instruction set. c10's conversions branch, and
// use F16C only in a build for it. A GPU widens a half in one instruction.

ID3_HOST_DEVICE float widen_bfloat16(uint16_t bits) {
  return reinterpret_bits<float>(static_cast<uint32_t>(bits) << 16);
}

ID3_HOST_DEVICE float widen_half(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
#else
  constexpr uint32_t kRebias = (127 - 15) << 23;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7fff;
  const uint32_t normal = (magnitude << 13) + kRebias;
  const uint32_t special = normal + kRebias;  // infinities and NaN: exponent 31 becomes 255
  const uint32_t subnormal =
      reinterpret_bits<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400 ? subnormal : normal;
  return reinterpret_bits<float>(sign | (magnitude < 0x7c00 ? finite : special));
#endif
}

ID3_HOST_DEVICE uint16_t round_to_bfloat16(float x) {
  const uint32_t bits = reinterpret_bits<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  return static_cast<uint16_t>(nan ? 0x7fc0 : rounded);
}

ID3_HOST_DEVICE uint16_t round_to_half(float x) {
  const uint32_t bits = reinterpret_bits<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - ((127u - 15) << 23) + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 a half is a multiple of 2^-24, which is the last bit of 0.5: adding 0.5 rounds to it.
  const uint32_t subnormal =
      reinterpret_bits<uint32_t>(reinterpret_bits<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  return static_cast<uint16_t>(sign | (magnitude < 0x47800000 ? finite : special));
}

}  // namespace id3
