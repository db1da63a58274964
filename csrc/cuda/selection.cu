#include "cuda/selection.h"

// Exact top-k in one streaming pass (the delegates of Dr. Top-k, arXiv 2109.08219). The pass keeps one
// maximum per tile. All winners lie in the k tiles with the largest maxima, ties to the first, which are
// scored again.

namespace id3::cuda {
namespace {

__global__ void chunks_kernel(Candidates c, Wanted wanted) {
  if (wanted.count() == 0) return;
  for (int64_t i = thread_in_grid(); i < c.n_chunks; i += threads_in_grid()) {
    const Chunk chunk = chunk_at(c.rows, c.active.tensors, c.chunk_length, i);
    c.chunks[i] = chunk;
    for (int32_t run = 0; run < c.active.runs; ++run)
      c.spans[i * c.active.runs + run] = span_at(c.active.run(run), chunk.tensor, chunk.offset, chunk.length);
  }
}

// First look: the largest key of each tile.
template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4)
    tile_maxima_kernel(Candidates c, Wanted wanted, int32_t* maxima) {
  if (wanted.count() == 0) return;
  __shared__ uint32_t bitmap[kLongChunk / 32];
  const Chunk chunk = c.chunks[blockIdx.x];
  tile_maxima<E>(c.rule, c.rows[chunk.tensor], chunk, c.active_in(blockIdx.x), c.chunk_length, bitmap,
                 maxima + static_cast<int64_t>(blockIdx.x) * (c.chunk_length / kTile), NoTally());
}

// --- second look: every key of the listed tiles ------------------------------------------------------------

// The keys as a function of the slot.
template <Exponent E>
struct SlotKeys {
  Candidates c;

  __device__ int32_t operator()(int64_t slot) const {
    const int32_t at = static_cast<int32_t>(slot % c.chunk_length);
    const int64_t number = slot / c.chunk_length;
    const Chunk chunk = c.chunks[number];
    if (at >= chunk.length) return 0;
    const int32_t key = key_in<E>(c.rows[chunk.tensor], c.rule, chunk.offset + at);
    return key && !c.active_in(number).hold(chunk.offset + at) ? key : 0;
  }
};

template <Exponent E>
__global__ void tile_keys_kernel(SlotKeys<E> keys_of, Wanted wanted, const int32_t* tiles,
                                 const int64_t* n_tiles, int32_t* keys) {
  if (wanted.count() == 0) return;
  const int64_t listed = *n_tiles;
  for (int64_t i = thread_in_grid(); i < wanted.capacity * kTile; i += threads_in_grid()) {
    const int64_t tile = i / kTile;
    keys[i] = tile < listed ? keys_of(static_cast<int64_t>(tiles[tile]) * kTile + i % kTile) : 0;
  }
}

// --- the result --------------------------------------------------------------------------------------------

// places[i]: where the i-th winner lies among the listed tiles; becomes its slot.
__global__ void slots_kernel(Wanted wanted, const int32_t* tiles, const int64_t* n_slots, int64_t* places) {
  if (wanted.count() == 0) return;
  for (int64_t i = thread_in_grid(); i < *n_slots; i += threads_in_grid())
    places[i] = static_cast<int64_t>(tiles[places[i] / kTile]) * kTile + places[i] % kTile;
}

__device__ __forceinline__ int32_t tensor_of(const Candidates& c, int64_t slot) {
  return c.chunks[slot / c.chunk_length].tensor;
}

// The winners' indices and scores, zeros behind the last of them, and where each tensor's begin.
template <Exponent E>
__global__ void result_kernel(SlotKeys<E> keys_of, Wanted wanted, const int64_t* slots,
                              const int64_t* n_slots, Selected out) {
  const Candidates& c = keys_of.c;
  const int64_t n = wanted.count() == 0 ? 0 : *n_slots;
  for (int64_t i = thread_in_grid(); i < max(out.capacity, int64_t{1}); i += threads_in_grid()) {
    int32_t index = 0;
    float score = 0;
    if (i < n) {
      const Chunk chunk = c.chunks[slots[i] / c.chunk_length];
      index = static_cast<int32_t>(chunk.offset + slots[i] % c.chunk_length);
      score = score_of<float>(keys_of(slots[i]));
    }
    if (i < out.capacity) {
      out.indices[i] = index;
      out.scores[i] = score;
    }
    // Thread i writes the offsets of the tensors that begin with winner i; the first and the last write more.
    if (i < n) {
      const int32_t mine = tensor_of(c, slots[i]), before = i == 0 ? -1 : tensor_of(c, slots[i - 1]);
      for (int32_t j = before + 1; j <= mine; ++j) out.offsets[j] = i;
    }
    if (i == max(n - 1, int64_t{0})) {
      const int32_t last = n == 0 ? -1 : tensor_of(c, slots[n - 1]);
      for (int32_t j = last + 1; j <= c.active.tensors; ++j) out.offsets[j] = n;
    }
  }
}

template <Exponent E>
void select_by(const Candidates& c, const Wanted& wanted, const SelectionWorkspace& w, const Selected& out,
               cudaStream_t stream) {
  const SlotKeys<E> keys_of{c};
  const int64_t slots = static_cast<int64_t>(c.n_chunks) * c.chunk_length, tiles = slots / kTile;
  launch(chunks_kernel, blocks_for(c.n_chunks), kThreads, stream, c, wanted);
  if (few_winners(out.capacity, tiles)) {
    const int64_t places = out.capacity * kTile;
    launch(tile_maxima_kernel<E>, c.n_chunks, kThreads, stream, c, wanted, w.maxima);
    largest_in_order(ArrayKeys{w.maxima}, tiles, wanted, w.topk, w.tiles, w.n_tiles, stream);
    launch(tile_keys_kernel<E>, blocks_for(places), kThreads, stream, keys_of, wanted, w.tiles, w.n_tiles,
           w.keys);
    largest_in_order(ArrayKeys{w.keys}, places, wanted, w.topk, w.slots, w.n_slots, stream);
    launch(slots_kernel, blocks_for(out.capacity), kThreads, stream, wanted, w.tiles, w.n_slots, w.slots);
  } else {
    largest_in_order(keys_of, slots, wanted, w.topk, w.slots, w.n_slots, stream);
  }
  launch(result_kernel<E>, blocks_for(out.capacity), kThreads, stream, keys_of, wanted, w.slots, w.n_slots,
         out);
}

}  // namespace

void select_topk(const Candidates& candidates, const int64_t* k, const SelectionWorkspace& workspace,
                 const Selected& out, cudaStream_t stream) {
  const Exponent exponent = candidates.rule.given ? Exponent::zero : exponent_of(candidates.rule.exp);
  const Wanted wanted{k, out.capacity};
  with_exponent(exponent, [&](auto e) { select_by<e.value>(candidates, wanted, workspace, out, stream); });
}

}  // namespace id3::cuda
