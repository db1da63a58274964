#pragma once

#include <cstdint>

#include "cuda/tensors.h"
#include "formulas/norm.h"

namespace id3::cuda {

// What the blocks of a squared norm share; zeros before the first launch.
struct NormState {
  unsigned long long high, low;  // of SquareSum
  int32_t largest;               // magnitude_bits of the largest |g|
  unsigned arrived;              // blocks of the running launch that are done
};

// *sum = the sum of squares of the rows' gradients at the entries. values: float32, one beside each of the n
// indices; of `entries` alone they are written and read.
void squared_norm(const TensorRow* rows, const RunsView& entries, int64_t n, float* values, NormState* state,
                  double* sum, cudaStream_t stream);

}  // namespace id3::cuda
