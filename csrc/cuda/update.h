#pragma once

#include <cstdint>

#include "cuda/tensors.h"
#include "formulas/update.h"

namespace id3::cuda {

// What bias correction needs of step s, for s = 0 … longest; from there on nothing changes any more.
struct BiasTables {
  const double* unbiased;  // 1 - beta1^s
  const float* root;       // sqrt(1 - beta2^s)
  int64_t longest;
};

// One AdamW step on `entries`, in place. State arrays are [n], in entry order; device memory throughout.
struct Update {
  const TensorRow* rows;
  EntriesView entries;
  const void* values;  // gradients already gathered [n], or null: they lie in the rows
  DType values_dtype;
  float *exp_avg, *exp_avg_sq;
  float* master;        // or null
  int32_t* age;         // or null: the tensor's step counts
  const int64_t* step;  // [tensors]
  BiasTables bias;
  double lr;
  AdamWScalars<float> scalars;                 // grad_scale and clip are read from below where they are given
  const float *grad_scale, *found_inf, *clip;  // one number each, or null
};

void adamw(const Update& update, int64_t n, cudaStream_t stream);

}  // namespace id3::cuda
