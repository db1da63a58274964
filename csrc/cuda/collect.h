#pragma once

#include "cuda/stream.h"
#include "cuda/topk.h"

// What a step needs of one tensor's gradient, taken in three launches that wait for nobody: the values at its
// active entries, and its candidates among the best k entries of all tensors of a pass.
namespace id3::cuda {

constexpr int kScoreBins = 4096, kScoreShift = 19;  // a score's exponent and four bits of its mantissa

// Entries that are no better are not among the best k: a key, and below which place it still counts.
struct Floor {
  int64_t place;
  int32_t key;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ bool admits(int32_t other, int64_t at) const {
    return other > key || (other == key && at < place);
  }
#endif
};

// What the tensors of a pass hand on to one another; zeros at its beginning.
struct CollectState {
  unsigned long long count;  // candidates held: the first ones; more than there is room for: see `settle`
  unsigned long long count_then;  // held before the tensor at hand
  Floor floor;
  unsigned arrived;  // blocks of the running launch that are done
  unsigned
      histogram[kScoreBins];  // how many entries of the pass have such a score, as far as the floor admits
};

// One tensor. candidates: nobody is 0, -1, 0, and all of them are behind the others.
struct Collect {
  TensorRow row;     // where scores are given, they stand for the gradient here
  const void* grad;  // the gradient itself
  DType grad_dtype;
  ScoreRule rule;
  RunsView active;  // of this tensor alone
  float* values;    // at the active entries: their gradient, or with `add` more by it
  bool add;
  int64_t most_active;  // room in active.indices
  int64_t position;     // of the tensor
  float* best_score;
  int64_t* best_place;  // position << 32 | flat index
  float* best_grad;
  Wanted wanted;        // of at most half the room
  int64_t room;         // 0: nothing but the values is taken
  CollectState* state;  // null: as above
  Span* spans;          // [chunks][active.runs]
  int32_t* maxima;      // [chunks · tiles of a chunk]

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ ActiveSpans active_in(int64_t chunk) const {
    return {spans + chunk * active.runs, active.indices, active.runs};
  }
#endif
};

inline int32_t chunks_of(int32_t numel) { return (numel + kShortChunk - 1) / kShortChunk; }

void collect(const Collect& collect, cudaStream_t stream);

}  // namespace id3::cuda
