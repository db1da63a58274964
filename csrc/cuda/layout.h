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
struct Chunk {
  int64_t offset;  // flat index of its first entry
  int32_t tensor;
  int32_t length;                    // entries; less than a whole chunk at the end of a tensor
  int64_t active_begin, active_end;  // where its own active entries stand among all
};

struct Layout {
  int32_t chunk_length, n_chunks;

  int64_t slots() const { return static_cast<int64_t>(n_chunks) * chunk_length; }
  int64_t tiles() const { return slots() / kTile; }
};

// Numbers the chunks of the rows; a row of 0 entries has none.
inline Layout cut_into_chunks(std::vector<TensorRow>& rows) {
  int64_t total = 0;
  for (const TensorRow& row : rows) total += row.numel;
  Layout layout{total < (int64_t{1} << 30) ? kShortChunk : kLongChunk, 0};
  for (TensorRow& row : rows) {
    row.first_chunk = layout.n_chunks;
    layout.n_chunks += static_cast<int32_t>((static_cast<int64_t>(row.numel) + layout.chunk_length - 1) /
                                            layout.chunk_length);
  }
  return layout;
}

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

// What the rows say of chunk `number`, and which of the active entries lie in it.
__device__ inline Chunk chunk_at(const TensorRow* rows, const EntriesView& active, int32_t chunk_length,
                                 int64_t number) {
  int32_t tensor = 0, after = active.tensors;  // the last row that begins at or before this chunk has it
  while (after - tensor > 1) {
    const int32_t middle = (tensor + after) / 2;
    if (rows[middle].first_chunk <= number)
      tensor = middle;
    else
      after = middle;
  }
  const int64_t offset = (number - rows[tensor].first_chunk) * chunk_length;
  const int64_t length = min(static_cast<int64_t>(chunk_length), rows[tensor].numel - offset);
  const int64_t* own = active.offsets + tensor;
  const int64_t begin = lower_bound(active.indices, own[0], own[1], offset);
  return {offset, tensor, static_cast<int32_t>(length), begin,
          lower_bound(active.indices, begin, own[1], offset + length)};
}

#endif

}  // namespace id3::cuda
