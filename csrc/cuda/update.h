#pragma once

#include <cstdint>

#include "cuda/tensors.h"
#include "formulas/update.h"

namespace id3::cuda {

// A number for each step s = 0 … longest, which does not change from there on.
template <class Value>
struct BiasTable {
  const Value* values;
  int64_t longest;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ Value of(int64_t step) const { return values[step < longest ? step : longest]; }
#endif
};

// What bias correction needs of a step s.
struct BiasTables {
  BiasTable<double> unbiased;  // 1 - beta1^s
  BiasTable<float> root;       // sqrt(1 - beta2^s)
};

// One number in device memory, or null: there is none.
struct Number {
  const void* at;
  bool is_double;  // else float

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ double value() const {
    return is_double ? *static_cast<const double*>(at) : *static_cast<const float*>(at);
  }
#endif
};

// One AdamW step on `entries`, in place. State arrays are in entry order, each at the entries' own places;
// device memory throughout.
struct Update {
  const TensorRow* rows;
  RunsView entries;
  const void* values;  // gradients already gathered, or null: they lie in the rows
  DType values_dtype;
  float *exp_avg, *exp_avg_sq;
  float* master;        // or null
  int32_t* age;         // or null: the tensor's step counts
  const int64_t* step;  // [tensors]
  BiasTables bias;
  double lr, weight_decay;
  AdamWScalars<float> scalars;  // what of it is given below is read there
  Number grad_scale, found_inf, clip, tensor_lr;
};

// n: room in entries.indices.
void adamw(const Update& update, int64_t n, cudaStream_t stream);

}  // namespace id3::cuda
