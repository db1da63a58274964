#pragma once

#include <cstdint>

#include "cuda/tensors.h"

namespace id3::cuda {

// values[i] = the value of the entry at i, moved by its bits, and 0 behind the last; rows hold the tensors as
// `param`. item_bytes: 2, 4 or 8. The offsets begin at 0. n: room in indices and values.
void gather(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, void* values,
            cudaStream_t stream);
void scatter(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, const void* values,
             cudaStream_t stream);

constexpr int kMostArrays = 16;

// One array of a sorted set of entries.
struct JoinArray {
  void* array;
  void* scratch;      // as large
  const void* added;  // what the new entries begin with; null: zeros
  int32_t item_bytes;
};

struct Join {
  JoinArray arrays[kMostArrays];  // the indices first, whose `added` is that of the entries below
  int32_t n_arrays;
  int64_t* offsets;    // of the set; made those of the joined set
  EntriesView added;   // none of them in the set
  unsigned* arrived;   // blocks of the running launch that are done; written here
  int64_t room;        // of every array
  int64_t room_added;  // of every array of new entries
};

// Inserts `added`. Where the arrays have no room for all, nothing changes.
void join(const Join& join, cudaStream_t stream);

}  // namespace id3::cuda
