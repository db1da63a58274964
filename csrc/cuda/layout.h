#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

// How a list of tensors is cut for a GPU. Host code, and what it makes lies in device memory.
namespace id3::cuda {

constexpr int kTile = 256;         // entries under one maximum: one 16-byte load per lane in bfloat16
constexpr int kLongChunk = 16384;  // entries of a block's work; a bitmap of them is 2 KiB of shared memory
constexpr int kShortChunk = 8192;  // for small models, whose last wave of blocks would be mostly empty

// A stretch of one tensor: the work of one block. A tensor begins a new chunk, so that
// slot = chunk number · chunk length + place in the chunk names an entry, and slots order as (tensor, index).
struct Chunk {
  int64_t offset;  // flat index of its first entry
  int32_t tensor;
  int32_t length;  // entries; less than a whole chunk at the end of a tensor
};

struct Layout {
  int32_t chunk_length;
  std::vector<Chunk> chunks;

  int64_t slots() const { return static_cast<int64_t>(chunks.size()) * chunk_length; }
  int64_t tiles() const { return slots() / kTile; }
};

// numels: entries of each tensor, below 2^31; 0 for one that is left out.
inline Layout cut_into_chunks(const std::vector<int64_t>& numels) {
  int64_t total = 0;
  for (const int64_t numel : numels) total += numel;
  Layout layout{total < (int64_t{1} << 30) ? kShortChunk : kLongChunk, {}};
  for (std::size_t j = 0; j < numels.size(); ++j)
    for (int64_t offset = 0; offset < numels[j]; offset += layout.chunk_length) {
      const int64_t left = numels[j] - offset;
      const int64_t length = left < layout.chunk_length ? left : layout.chunk_length;
      layout.chunks.push_back({offset, static_cast<int32_t>(j), static_cast<int32_t>(length)});
    }
  return layout;
}

}  // namespace id3::cuda
