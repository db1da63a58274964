#pragma once

#include <cmath>

#include "formulas/host_device.h"

namespace id3 {

// g / d rounded to nearest, from r, which is within two ulp of 1 / d: a Newton step, a quotient and one
// correction of it. It is what a GPU's compiler makes of a division, without its test for operands that need
// scaling and without a second correction, which the first leaves nothing to do.
//
// Exact where 2^-102 <= |g|, where d, r and the quotient are normal, and where |g · r| is finite; elsewhere
// within a few ulp of the quotient, 0 where g is 0, and NaN where d is 0, infinite or NaN or g · r overflows.
// tests/kernels/test_division.py shows the exactness: it enumerates every quotient so near to the middle
// between two floats that the errors of the steps could turn its rounding.
//
// The largest mantissas of d, 2 - 2^-23 to 2 - 5 · 2^-23, need more of r, as 1 / d is near the middle between
// two floats. A GPU's own division begins with the same r and the same step and would be wrong there too.
ID3_HOST_DEVICE float quotient_by(float r, float g, float d) {
  r = std::fmaf(r, std::fmaf(-d, r, 1.0f), r);
  const float q = g * r;
  return std::fmaf(r, std::fmaf(-d, q, g), q);
}

// √d rounded to nearest, from the r of a GPU, within two ulp of 1 / √d, for d in [2^-100, 2^100]. The steps are
// those of the GPU's own IEEE root, which tests the range first.
ID3_HOST_DEVICE float root_by(float r, float d) {
  const float root = d * r;
  return std::fmaf(std::fmaf(-root, root, d), 0.5f * r, root);
}

}  // namespace id3
