#pragma once

#include "cuda/collect.h"

// The candidates of a pass, and the entries of the tensor at hand that may be among them.
namespace id3::cuda {

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

__device__ __forceinline__ int64_t chunk_length_at(const Collect& c, int64_t offset) {
  return min(static_cast<int64_t>(kShortChunk), c.row.numel - offset);
}

__device__ __forceinline__ Chunk chunk_in(const Collect& c, int64_t number) {
  const int64_t offset = number * kShortChunk;
  return chunk_of_row(c.row, 0, offset, static_cast<int32_t>(chunk_length_at(c, offset)));
}

__device__ __forceinline__ int64_t place_of(const Collect& c, int64_t index) { return c.place + index; }

// Whether the floor may admit an entry of the tile.
__device__ __forceinline__ bool may_admit(const Collect& c, const Floor& floor, int64_t tile) {
  return floor.admits(c.maxima[tile], place_of(c, tile * kTile));
}

// The key of an entry that the floor admits; 0: it does not, or the entry is active.
template <Exponent E>
__device__ __forceinline__ int32_t admitted_key(const Collect& c, const Floor& floor, int64_t index) {
  const int64_t number = index / kShortChunk;
  const int32_t key = key_in<E>(chunk_in(c, number), c.rule, static_cast<int32_t>(index % kShortChunk));
  if (!floor.admits(key, place_of(c, index))) return 0;
  return c.active_in(number).hold(index) ? 0 : key;
}

__device__ __forceinline__ void put(const Collect& c, int64_t slot, float score, int64_t place, float grad) {
  c.best.score[slot] = score;
  c.best.place[slot] = place;
  c.best.grad[slot] = grad;
}

__device__ __forceinline__ void put_empty(const Collect& c, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) put(c, i, 0, -1, 0);
}

__device__ __forceinline__ void put_entry(const Collect& c, int64_t slot, int32_t key, int64_t index) {
  put(c, slot, score_of<float>(key), place_of(c, index), load_as_float(c.grad, c.grad_dtype, index));
}

__device__ __forceinline__ int32_t key_held(const Collect& c, int64_t slot) {
  return reinterpret_bits<int32_t>(c.best.score[slot]);
}

#endif

}  // namespace id3::cuda
