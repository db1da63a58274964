#pragma once

#include <cstdint>

#include "cuda/stream.h"
#include "cuda/topk.h"

namespace id3::cuda {

// All that is read: tensors cut into chunks, the rule of the score, the entries to leave out.
struct Candidates {
  const TensorRow* rows;
  Chunk* chunks;                   // [n_chunks]; written here
  Span* spans;                     // [n_chunks][active.runs]; written here
  int32_t n_chunks, chunk_length;  // a power of two
  RunsView active;
  ScoreRule rule;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ ActiveSpans active_in(int64_t chunk) const {
    return {spans + chunk * active.runs, active.indices, active.runs};
  }
  __device__ int64_t chunk_of(int64_t slot) const { return slot >> (__ffs(chunk_length) - 1); }
  __device__ int32_t place_in_chunk(int64_t slot) const {
    return static_cast<int32_t>(slot) & (chunk_length - 1);
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

// Device memory of one call; what a form does not use is null.
struct SelectionWorkspace {
  TopkWorkspace topk;
  int32_t* maxima;   // [tiles of the layout]
  int32_t* tiles;    // [capacity]: the listed tiles
  int32_t* keys;     // [capacity · kTile], where they are stored
  int64_t* slots;    // [capacity]
  int64_t* n_tiles;  // [1]
  int64_t* n_slots;  // [1]
};

// How the winners are found. `stored`, `listed`: one pass over all entries keeps the maxima of the tiles, and
// the best of these tiles are scored again: once, or, where their keys would need memory like the model's, in
// each of five passes. `all`: with more winners than a quarter of the tiles, the five passes read all
// entries.
enum class Form : int32_t { stored, listed, all };

inline Form form_of(int64_t capacity, int64_t tiles) {
  return capacity <= tiles / 64 ? Form::stored : capacity <= tiles / 4 ? Form::listed : Form::all;
}

// How many keys the largest ranking of a call ranks.
inline int64_t most_ranked(Form form, int64_t capacity, const ChunkLayout& layout) {
  return form == Form::all ? layout.slots() : std::max(layout.tiles(), capacity * kTile);
}

// The *k best entries outside `active`, at most out.capacity of them, ties to the lowest (tensor, index).
// k lies in device memory; where it is below 1, nothing of the tensors' size is read. Issues kernels on the
// stream and nothing else.
void select_topk(const Candidates& candidates, const int64_t* k, const SelectionWorkspace& workspace,
                 const Selected& out, cudaStream_t stream);

}  // namespace id3::cuda
