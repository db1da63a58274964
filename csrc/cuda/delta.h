#pragma once

#include <cstdint>

#include "cuda/tensors.h"

namespace id3::cuda {

// values[i] = the i-th entry's value, moved by its bits; rows hold the tensors as `param`. item_bytes: 2, 4
// or 8.
void gather(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, void* values,
            cudaStream_t stream);
void scatter(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, const void* values,
             cudaStream_t stream);

constexpr int kSumBlock = 4096;  // entries summed by one block: fixed, so that the sum has one order

// The sum of squares of the rows' gradients at the entries; block_sums: [(n + kSumBlock - 1) / kSumBlock].
void squared_norm(const TensorRow* rows, EntriesView entries, int64_t n, double* block_sums, double* sum,
                  cudaStream_t stream);

constexpr int kMostArrays = 8;

// The arrays of a sorted set of entries, the indices first; `scratch` is as large as `array`.
struct JoinArray {
  void* array;
  void* scratch;
  int32_t item_bytes;
};

struct Join {
  JoinArray arrays[kMostArrays];
  int32_t n_arrays;
  int64_t* offsets;         // of the set; made those of the joined set
  EntriesView added;        // none of them in the set
  int64_t* positions;       // [added's capacity]: where each new entry comes to stand
  int64_t n_held, n_added;  // capacities: the true counts are offsets[tensors] and added.count()
};

// Inserts `added`: its indices into the first array, zeros into the others.
void join(const Join& join, cudaStream_t stream);

}  // namespace id3::cuda
