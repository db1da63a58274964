#include "cuda/cut.h"

// The candidates are all entries that the floor admits. It rises by a histogram of the scores seen in the
// pass: k entries above a bin's lower edge are k reasons to forget what lies below it. Where that leaves too
// many, as with mass ties, they are cut to the best k and the floor becomes the last of these.

namespace id3::cuda {
namespace {

constexpr int kTilesTogether = 8;  // whose maxima a warp reads at once

// --- the values at active entries --------------------------------------------------------------------------

__global__ void take_kernel(Collect c, int64_t chunks) {
  const bool spans = chunks > 0 && c.wanted.count() > 0;
  for (int32_t run = 0; run < c.active.runs; ++run) {
    const EntriesView own = c.active.run(run);
    const int64_t end = own.end();
    for (int64_t at = own.first() + thread_in_grid(); at < end; at += threads_in_grid()) {
      const float value = load_as_float(c.grad, c.grad_dtype, own.indices[at]);
      c.values[at] = c.add ? c.values[at] + value : value;
    }
    for (int64_t i = thread_in_grid(); spans && i < chunks; i += threads_in_grid())
      c.spans[i * c.active.runs + run] =
          span_at(own, 0, i * kShortChunk, chunk_length_at(c, i * kShortChunk));
  }
}

// --- one pass over the tensor: tile maxima, and the floor --------------------------------------------------

struct Tally {
  Floor floor;
  unsigned* bins;

  __device__ __forceinline__ bool wants(int32_t key) const { return key > floor.key; }
  __device__ __forceinline__ void operator()(int32_t key) const {
    if (wants(key)) atomicAdd(&bins[key >> kScoreShift], 1u);
  }
};

// Raises the floor to the highest bin edge that k entries reach. Every thread of one block must call it.
__device__ inline void raise_floor(const Collect& c) {
  constexpr int kMine = kScoreBins / kThreads;
  CollectState& state = *c.state;
  const int top = kScoreBins - 1 - static_cast<int>(threadIdx.x) * kMine;
  int64_t mine = 0, total = 0;
  for (int i = 0; i < kMine; ++i) mine += state.histogram[top - i];
  int64_t above = sum_before(mine, total);
  const int64_t k = c.wanted.count();
  for (int i = 0; i < kMine; ++i) {
    const int64_t here = state.histogram[top - i];
    const int32_t below = ((top - i) << kScoreShift) - 1;
    if (above < k && above + here >= k && below > state.floor.key) state.floor = {0, below};
    above += here;
  }
  if (threadIdx.x == 0) state.count_then = state.count;
}

template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) stream_kernel(Collect c, int64_t chunks) {
  if (c.wanted.count() == 0) return;
  __shared__ unsigned bins[kScoreBins];
  __shared__ uint32_t bitmap[kShortChunk / 32];
  for (int i = threadIdx.x; i < kScoreBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Tally tally{c.state->floor, bins};
  for (int64_t number = blockIdx.x; number < chunks; number += gridDim.x) {
    tile_maxima<E>(c.rule, chunk_in(c, number), c.active_in(number), kShortChunk, bitmap,
                   c.maxima + number * (kShortChunk / kTile), tally);
    __syncthreads();  // the bitmap is the next chunk's now
  }
  for (int i = threadIdx.x; i < kScoreBins; i += kThreads)
    if (bins[i]) atomicAdd(&c.state->histogram[i], bins[i]);
  if (is_last_block(&c.state->arrived)) raise_floor(c);
}

// --- candidates --------------------------------------------------------------------------------------------

// Appends what is admitted of a tile; a whole warp calls it. False once there is no room left.
template <Exponent E>
__device__ __forceinline__ bool append_tile(const Collect& c, const Floor& floor, int64_t tile) {
  const unsigned lane = threadIdx.x % kWarp;
  for (int row = 0; row < kPerLane; ++row) {
    const int64_t index = tile * kTile + row * kWarp + lane;
    const int32_t key = index < c.row.numel ? admitted_key<E>(c, floor, index) : 0;
    const unsigned votes = __ballot_sync(kWholeWarp, key > 0);
    if (votes == 0) continue;
    unsigned long long before = 0;
    if (lane == 0) before = atomicAdd(&c.state->count, static_cast<unsigned long long>(__popc(votes)));
    const int64_t first = static_cast<int64_t>(__shfl_sync(kWholeWarp, before, 0));
    const int64_t slot = first + __popc(votes & ((1u << lane) - 1));
    if (key > 0 && slot < c.room) put_entry(c, slot, key, index);
    if (first >= c.room) return false;
  }
  return true;
}

template <Exponent E>
__device__ __forceinline__ void append_tiles(const Collect& c, int64_t tiles) {
  const Floor floor = c.state->floor;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = thread_in_grid() / kWarp * kTilesTogether; first < tiles;
       first += threads_in_grid() / kWarp * kTilesTogether) {
    const int64_t mine = first + lane;
    const bool admits = lane < kTilesTogether && mine < tiles && may_admit(c, floor, mine);
    for (unsigned votes = __ballot_sync(kWholeWarp, admits); votes; votes &= votes - 1)
      if (!append_tile<E>(c, floor, first + __ffs(static_cast<int>(votes)) - 1)) return;
  }
}

template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(Collect c, int64_t tiles) {
  if (c.wanted.count() == 0) return;
  __shared__ Ranking ranking;
  append_tiles<E>(c, tiles);
  if (!is_last_block(&c.state->arrived)) return;
  const int64_t count = static_cast<int64_t>(c.state->count);
  if (count <= c.room / 2) return;
  if (c.kept.score != nullptr)
    begin_cut(c);
  else if (count > c.room)
    take_again<E>(c, ranking);
  else
    cut_to_best(c, ranking);
}

}  // namespace

void collect(const Collect& asked, cudaStream_t stream) {
  Collect c = asked;
  c.rule = with_bounds(c.rule);
  const int64_t chunks = c.state ? chunks_of(c.row.numel) : 0, tiles = chunks * (kShortChunk / kTile);
  const int64_t active = std::min<int64_t>(c.most_active, c.row.numel);
  launch(take_kernel, Items{std::max<int64_t>(active, chunks)}, stream, c, chunks);
  if (chunks == 0) return;
  with_exponent(exponent_of(c.rule), [&](auto e) {
    launch(stream_kernel<e.value>, Items{chunks, 1}, stream, c, chunks);
    launch(append_kernel<e.value>, Items{tiles, kWarps * kTilesTogether}, stream, c, tiles);
  });
  if (c.kept.score != nullptr) cut_by_grid(c, stream);
}

}  // namespace id3::cuda
