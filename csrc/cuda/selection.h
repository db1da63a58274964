#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "cuda/topk.h"

namespace id3::cuda {

// All that is read: tensors cut into chunks, the rule of the score, the entries to leave out.
struct Candidates {
  const TensorRow* rows;
  Chunk* chunks;  // [n_chunks]; written here
  Span* spans;    // [n_chunks][active.runs]; written here
  int32_t n_chunks, chunk_length;
  RunsView active;
  ScoreRule rule;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ ActiveSpans active_in(int64_t chunk) const {
    return {spans + chunk * active.runs, active.indices, active.runs};
  }
#endif
};

// The result, in the form of the op table: offsets [tensors + 1]; indices and scores [capacity].
struct Selected {
  int64_t* offsets;
  int32_t* indices;
  float* scores;
  int64_t capacity;
};

// Device memory of one call. Few: maxima, tiles and keys; else they are null. slots: [capacity].
struct SelectionWorkspace {
  TopkWorkspace topk;
  int32_t* maxima;   // [tiles of the layout]
  int32_t* tiles;    // [capacity]: the listed tiles
  int32_t* keys;     // [capacity · kTile]
  int64_t* slots;    // [capacity]
  int64_t* n_tiles;  // [1]
  int64_t* n_slots;  // [1]
};

// Whether the maxima of the tiles are worth a pass: with many winners, most tiles would be scored again
// anyway and the keys of the listed tiles would need memory like the model's.
inline bool few_winners(int64_t capacity, int64_t tiles) { return capacity <= tiles / 64; }

// The *k best entries outside `active`, at most out.capacity of them, ties to the lowest (tensor, index).
// k lies in device memory; where it is below 1, nothing of the tensors' size is read. Issues kernels on the
// stream and nothing else.
void select_topk(const Candidates& candidates, const int64_t* k, const SelectionWorkspace& workspace,
                 const Selected& out, cudaStream_t stream);

}  // namespace id3::cuda
