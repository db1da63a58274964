#pragma once

#include <cstdint>

#include "formulas/host_device.h"

namespace id3 {

// The order of a sum over tokens, t = 0, 1, …, of products a[t] · b[t]: every backend adds in this order, so
// the bits depend on a and b alone. Each product and each sum is rounded once; none is fused.
//
// 1. The tokens are cut into blocks of kBlockTokens. Where the last block has fewer, zeros stand for the
// tokens
//    that it lacks; no tokens at all are one block of zeros.
// 2. Lane l of kLanes is the sum of the products of a block's tokens l, l + 32, l + 64, l + 96, in this
// order.
// 3. Neighbouring lanes are added: sum j = lane 2j + lane 2j + 1, of which there are 16.
// 4. The sums are folded: sum j + sum j + 8, of these sum j + sum j + 4, then + 2, then + 1.
// 5. The blocks are added, the first two, then the third, and so on.
//
// Error of a sum over T tokens: below (8 + T / 128) · u · Σ |a[t] · b[t]| to first order, u the rounding
// error of one operation (2^-24 for float32).
constexpr int kLanes = 32;
constexpr int kBlockTokens = 128;

ID3_HOST_DEVICE constexpr int64_t token_blocks(int64_t tokens) {
  return tokens == 0 ? 1 : (tokens + kBlockTokens - 1) / kBlockTokens;
}

}  // namespace id3
