#pragma once

#include <algorithm>

#include "cuda/stream.h"
#include "cuda/topk.h"

// What a step needs of one tensor's gradient, taken in three launches that synchronise with nothing (of very
// many candidates in 14): the values at its active entries, and its candidates among the best k entries of
// all tensors of a pass.
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

// How far a cut by a grid is; see cut.h. Only `found` is not zero between two cuts.
struct CutState {
  int64_t wanted;           // how many are kept; 0: nothing is cut
  unsigned long long kept;  // so far
  int32_t found[3];         // of the last one kept: its key, and how far position and index are from the largest
  TopkState rank;
  unsigned digits[kBins];
};

// What the tensors of a pass hand on to one another; zeros at its beginning.
struct CollectState {
  unsigned long long count;       // candidates held: the first ones; above the room: to be cut, see cut.h
  unsigned long long count_then;  // held before the tensor at hand
  Floor floor;
  unsigned arrived;  // blocks of the running launch that are done
  unsigned
      histogram[kScoreBins];  // how many entries of the pass have such a score, as far as the floor admits
  CutState cut;
};

struct Slots {
  float* score;
  int64_t* place;  // position << 32 | flat index
  float* grad;
};

// `n` slots in 16 bytes each.
inline Slots slots_at(void* memory, int64_t n) {
  auto* place = static_cast<int64_t*>(memory);
  auto* score = reinterpret_cast<float*>(place + n);
  return {score, place, score + n};
}

// One tensor. candidates: an empty slot is 0, -1, 0, and all empty slots are behind the candidates.
struct Collect {
  TensorRow row;     // where scores are given, they stand for the gradient here
  const void* grad;  // the gradient itself
  DType grad_dtype;
  ScoreRule rule;
  RunsView active;  // of this tensor alone
  float* values;    // at the active entries: their gradient, or with `add` more by it
  bool add;
  int64_t most_active;  // room in active.indices
  int64_t place;        // of the first entry
  Slots best;
  Slots kept;           // [wanted.capacity], for a cut by a grid; null: one block cuts
  Wanted wanted;        // of at most half the room
  int64_t room;         // 0: nothing but the values is taken
  CollectState* state;  // null: no fused candidates
  Span* spans;          // [chunks][active.runs]
  int32_t* maxima;      // [chunks · tiles of a chunk]

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ ActiveSpans active_in(int64_t chunk) const {
    return {spans + chunk * active.runs, active.indices, active.runs};
  }
#endif
};

// How much memory holds the best k entries: slots for candidates, and int64 elements of the state.
struct CandidateRoom {
  int64_t slots, state;
};

// Each of the best k has eight slots, and all of them 2^16 more, so that candidates are seldom cut to the
// best k. For a k above 2^20 that is too much memory: candidates are sorted then, in k slots and without a
// state.
constexpr int64_t kSlotsForEach = 8, kLeastSlots = 1 << 16, kMostWanted = 1 << 20;

inline CandidateRoom candidate_room(int64_t k) {
  if (k <= 0 || k > kMostWanted) return {k, 0};
  constexpr int64_t kItem = sizeof(int64_t);
  return {kSlotsForEach * k + kLeastSlots, (static_cast<int64_t>(sizeof(CollectState)) + kItem - 1) / kItem};
}

// The largest k for which candidates with a state may be cut to the best k: that of `candidate_room`, or half
// of fewer slots.
inline int64_t most_wanted(int64_t slots) {
  return slots > kLeastSlots ? std::max<int64_t>((slots - kLeastSlots) / kSlotsForEach, 1) : slots / 2;
}

// From how many slots on the grid cuts, in 11 launches that mostly return at once (2 us each, estimated): one
// block would take 6 ms for half of them (estimated), and may have to do so several times in a pass.
constexpr int64_t kLeastSlotsOfGrid = 1 << 19;

inline int64_t chunks_of(int64_t numel) { return (numel + kShortChunk - 1) / kShortChunk; }

void collect(const Collect& collect, cudaStream_t stream);

}  // namespace id3::cuda
