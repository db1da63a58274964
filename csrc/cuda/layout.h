#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/tensors.h"

// How a list of tensors is cut for a GPU.
namespace id3::cuda {

constexpr int kTile = 256;         // entries under one maximum: one 16-byte load per lane in bfloat16
constexpr int kLongChunk = 16384;  // entries of a block's work; a bitmap of them is 2 KiB of shared memory
constexpr int kShortChunk = 8192;  // for small models, whose last wave of blocks would be mostly empty

// A stretch of one tensor: the work of one block. A tensor begins a new chunk, so that
// slot = chunk number · chunk length + place in the chunk names an entry, and slots order as (tensor, index).
// It has all that reading its entries needs, so that a kernel loads nothing between the chunk and the
// entries.
struct alignas(16) Chunk {
  int64_t offset;  // flat index of its first entry
  int32_t tensor;
  int32_t length;     // entries; less than a whole chunk at the end of a tensor
  const void* param;  // addresses of its first entry
  const void* grad;
  DType param_dtype, grad_dtype;
};

// Where the active entries of a chunk stand in one run: [begin, end).
struct Span {
  int64_t begin, end;
};

struct ChunkLayout {
  int32_t chunk_length, n_chunks;

  int64_t slots() const { return static_cast<int64_t>(n_chunks) * chunk_length; }
  int64_t tiles() const { return slots() / kTile; }
};

// Numbers the chunks of the rows; a row of 0 entries has none.
inline ChunkLayout cut_into_chunks(std::vector<TensorRow>& rows) {
  int64_t total = 0;
  for (const TensorRow& row : rows) total += row.numel;
  ChunkLayout layout{total < (int64_t{1} << 30) ? kShortChunk : kLongChunk, 0};
  for (TensorRow& row : rows) {
    row.first_chunk = layout.n_chunks;
    layout.n_chunks += static_cast<int32_t>((static_cast<int64_t>(row.numel) + layout.chunk_length - 1) /
                                            layout.chunk_length);
  }
  return layout;
}

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

// The active entries of one chunk.
struct ActiveSpans {
  const Span* spans;  // [runs]
  const int32_t* indices;
  int32_t runs;

  __device__ bool none() const {
    for (int32_t run = 0; run < runs; ++run)
      if (spans[run].begin != spans[run].end) return false;
    return true;
  }

  __device__ bool hold(int64_t index) const {
    for (int32_t run = 0; run < runs; ++run) {
      const Span span = spans[run];
      const int64_t at = lower_bound(indices, span.begin, span.end, index);
      if (at < span.end && indices[at] == index) return true;
    }
    return false;
  }
};

// The entries of a run in the chunk of `tensor` that begins at `offset`.
__device__ inline Span span_at(const EntriesView& run, int32_t tensor, int64_t offset, int64_t length) {
  const int64_t* own = run.offsets + tensor;
  const int64_t begin = lower_bound(run.indices, own[0], own[1], offset);
  return {begin, lower_bound(run.indices, begin, own[1], offset + length)};
}

__device__ inline Chunk chunk_of_row(const TensorRow& row, int32_t tensor, int64_t offset, int32_t length) {
  return {offset,
          tensor,
          length,
          address_of(row.param, row.param_dtype, offset),
          address_of(row.grad, row.grad_dtype, offset),
          row.param_dtype,
          row.grad_dtype};
}

// What the rows, of which there are `tensors`, say of chunk `number`.
__device__ inline Chunk chunk_at(const TensorRow* rows, int32_t tensors, int32_t chunk_length,
                                 int64_t number) {
  int32_t tensor = 0, after = tensors;  // the last row that begins at or before this chunk has it
  while (after - tensor > 1) {
    const int32_t middle = (tensor + after) / 2;
    if (rows[middle].first_chunk <= number)
      tensor = middle;
    else
      after = middle;
  }
  const int64_t offset = (number - rows[tensor].first_chunk) * chunk_length;
  const int64_t length = min(static_cast<int64_t>(chunk_length), rows[tensor].numel - offset);
  return chunk_of_row(rows[tensor], tensor, offset, static_cast<int32_t>(length));
}

#endif

}  // namespace id3::cuda
