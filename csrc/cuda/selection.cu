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
  const Chunk chunk = c.chunks[blockIdx.x];  // before k is known, so that both are on their way together
  if (wanted.count() == 0) return;
  __shared__ uint32_t bitmap[kLongChunk / 32];
  tile_maxima<E>(c.rule, chunk, c.active_in(blockIdx.x), c.chunk_length, bitmap,
                 maxima + static_cast<int64_t>(blockIdx.x) * (c.chunk_length / kTile), NoTally());
}

// --- second look: every key of the listed tiles ------------------------------------------------------------

// The keys as a function of the slot.
template <Exponent E>
struct SlotKeys {
  Candidates c;

  __device__ int32_t operator()(int64_t slot, int32_t least) const {
    const int64_t number = c.chunk_of(slot);
    const int32_t at = c.place_in_chunk(slot);
    const Chunk chunk = c.chunks[number];
    if (at >= chunk.length) return 0;
    const int32_t key = key_in<E>(chunk, c.rule, at);
    return key > 0 && key >= least && !c.active_in(number).hold(chunk.offset + at) ? key : 0;
  }
};

// The keys as a function of the place in the listed tiles. An entry below the floor, the least maximum of a
// listed tile where k tiles are listed, is not among the best k.
template <Exponent E>
struct ListedKeys {
  SlotKeys<E> keys_of;
  const int32_t* tiles;
  const int64_t* n_tiles;
  const TopkState* ranked;

  __device__ int32_t operator()(int64_t place, int32_t least) const {
    if (place / kTile >= *n_tiles) return 0;
    const int64_t slot = static_cast<int64_t>(tiles[place / kTile]) * kTile + place % kTile;
    return keys_of(slot, max(least, ranked->floor));
  }
};

template <Exponent E>
__global__ void tile_keys_kernel(ListedKeys<E> keys_of, Wanted wanted, int32_t* keys) {
  if (wanted.count() == 0) return;
  for (int64_t i = thread_in_grid(); i < wanted.capacity * kTile; i += threads_in_grid())
    keys[i] = keys_of(i, 0);
}

// --- the result --------------------------------------------------------------------------------------------

// The slots of the winners. at[i]: where the i-th lies in the listed tiles; the slot itself where tiles is
// null.
struct Winners {
  const int64_t* at;
  const int64_t* count;
  const int32_t* tiles;

  __device__ int64_t slot(int64_t i) const {
    if (tiles == nullptr) return at[i];
    return static_cast<int64_t>(tiles[at[i] / kTile]) * kTile + at[i] % kTile;
  }
};

__device__ __forceinline__ int32_t tensor_of(const Candidates& c, int64_t slot) {
  return c.chunks[c.chunk_of(slot)].tensor;
}

// The winners' indices and scores, zeros behind the last of them, and where each tensor's begin.
template <Exponent E>
__global__ void result_kernel(SlotKeys<E> keys_of, Wanted wanted, Winners winners, Selected out) {
  const Candidates& c = keys_of.c;
  const int64_t n = wanted.count() == 0 ? 0 : *winners.count;
  for (int64_t i = thread_in_grid(); i < max(out.capacity, int64_t{1}); i += threads_in_grid()) {
    int32_t index = 0;
    float score = 0;
    if (i < n) {
      index = static_cast<int32_t>(c.chunks[c.chunk_of(winners.slot(i))].offset +
                                   c.place_in_chunk(winners.slot(i)));
      score = score_of<float>(keys_of(winners.slot(i), 0));
    }
    if (i < out.capacity) {
      out.indices[i] = index;
      out.scores[i] = score;
    }
    // Thread i writes the offsets of the tensors that begin with winner i; the first and the last write more.
    if (i < n) {
      const int32_t mine = tensor_of(c, winners.slot(i)),
                    before = i == 0 ? -1 : tensor_of(c, winners.slot(i - 1));
      for (int32_t j = before + 1; j <= mine; ++j) out.offsets[j] = i;
    }
    if (i == max(n - 1, int64_t{0})) {
      const int32_t last = n == 0 ? -1 : tensor_of(c, winners.slot(n - 1));
      for (int32_t j = last + 1; j <= c.active.tensors; ++j) out.offsets[j] = n;
    }
  }
}

// The slots of the winners, by the maxima of the tiles.
template <Exponent E>
void rank_listed(const SlotKeys<E>& keys_of, bool stored, const Wanted& wanted, const SelectionWorkspace& w,
                 int64_t tiles, cudaStream_t stream) {
  const Candidates& c = keys_of.c;
  const int64_t places = wanted.capacity * kTile;
  launch(tile_maxima_kernel<E>, static_cast<unsigned>(c.n_chunks), stream, c, wanted, w.maxima);
  largest_in_order(ArrayKeys{w.maxima}, tiles, wanted, w.topk, w.tiles, w.n_tiles, stream);
  const ListedKeys<E> listed{keys_of, w.tiles, w.n_tiles, w.topk.state};
  if (stored) {
    launch(tile_keys_kernel<E>, Items{places}, stream, listed, wanted, w.keys);
    largest_in_order(ArrayKeys{w.keys}, places, wanted, w.topk, w.slots, w.n_slots, stream);
  } else {
    largest_in_order(listed, places, wanted, w.topk, w.slots, w.n_slots, stream);
  }
}

template <Exponent E>
void select_by(const Candidates& c, const Wanted& wanted, const SelectionWorkspace& w, const Selected& out,
               cudaStream_t stream) {
  const SlotKeys<E> keys_of{c};
  const int64_t slots = static_cast<int64_t>(c.n_chunks) * c.chunk_length, tiles = slots / kTile;
  const Form form = form_of(out.capacity, tiles);
  launch(chunks_kernel, Items{c.n_chunks}, stream, c, wanted);
  if (form == Form::all)
    largest_in_order(keys_of, slots, wanted, w.topk, w.slots, w.n_slots, stream);
  else
    rank_listed(keys_of, form == Form::stored, wanted, w, tiles, stream);
  launch(result_kernel<E>, Items{out.capacity}, stream, keys_of, wanted,
         Winners{w.slots, w.n_slots, form == Form::all ? nullptr : w.tiles}, out);
}

}  // namespace

void select_topk(const Candidates& asked, const int64_t* k, const SelectionWorkspace& workspace,
                 const Selected& out, cudaStream_t stream) {
  Candidates candidates = asked;
  candidates.rule = with_bounds(candidates.rule);
  const Wanted wanted{k, out.capacity};
  with_exponent(exponent_of(candidates.rule),
                [&](auto e) { select_by<e.value>(candidates, wanted, workspace, out, stream); });
}

}  // namespace id3::cuda
