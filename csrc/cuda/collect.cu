#include "cuda/collect.h"

// The candidates are all entries that the floor admits. It rises by a histogram of the scores seen in the
// pass: k entries above a bin's lower edge are k reasons to forget what lies below it. Where that leaves too
// many, as with mass ties, one block cuts them to the best k and the floor becomes the last of these.

namespace id3::cuda {
namespace {

constexpr int kTilesTogether = 8;  // whose maxima a warp reads at once

// --- the values at active entries --------------------------------------------------------------------------

__device__ __forceinline__ int64_t chunk_length_at(const Collect& c, int64_t offset) {
  return min(static_cast<int64_t>(kShortChunk), c.row.numel - offset);
}

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

__device__ __forceinline__ Chunk chunk_in(const Collect& c, int64_t number) {
  const int64_t offset = number * kShortChunk;
  return chunk_of_row(c.row, 0, offset, static_cast<int32_t>(chunk_length_at(c, offset)));
}

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

__device__ __forceinline__ int64_t place_of(const Collect& c, int64_t index) { return c.place + index; }

// The key of an entry that the floor admits; 0: it does not, or the entry is active.
template <Exponent E>
__device__ __forceinline__ int32_t admitted_key(const Collect& c, const Floor& floor, int64_t index) {
  const int64_t number = index / kShortChunk;
  const int32_t key = key_in<E>(chunk_in(c, number), c.rule, static_cast<int32_t>(index % kShortChunk));
  if (!floor.admits(key, place_of(c, index))) return 0;
  return c.active_in(number).hold(index) ? 0 : key;
}

__device__ __forceinline__ void put(const Collect& c, int64_t slot, float score, int64_t place, float grad) {
  c.best_score[slot] = score;
  c.best_place[slot] = place;
  c.best_grad[slot] = grad;
}

__device__ __forceinline__ void put_empty(const Collect& c, int64_t begin, int64_t end) {
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) put(c, i, 0, -1, 0);
}

__device__ __forceinline__ void put_entry(const Collect& c, int64_t slot, int32_t key, int64_t index) {
  put(c, slot, score_of<float>(key), place_of(c, index), load_as_float(c.grad, c.grad_dtype, index));
}

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
    const bool admits =
        lane < kTilesTogether && mine < tiles && floor.admits(c.maxima[mine], place_of(c, mine * kTile));
    for (unsigned votes = __ballot_sync(kWholeWarp, admits); votes; votes &= votes - 1)
      if (!append_tile<E>(c, floor, first + __ffs(static_cast<int>(votes)) - 1)) return;
  }
}

// --- too many of them: one block ---------------------------------------------------------------------------

struct Ranking {
  TopkState state;
  unsigned bins[kBins];
};

// The wanted-th largest of n keys above 0, which are at least as many; `wanted` becomes how many that equal
// it are among these.
template <class Keys>
__device__ inline int32_t nth_largest(const Keys& keys, int64_t n, int64_t& wanted, Ranking& ranking) {
  if (threadIdx.x == 0) ranking.state = {wanted, 0, 0, 0, 0, 0};
  for (int round = 0; round < kDigits; ++round) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) ranking.bins[i] = 0;
    __syncthreads();
    count_digits(keys, threadIdx.x, n, kThreads, round, ranking.state.threshold, ranking.bins);
    __syncthreads();
    choose_digit(round, &ranking.state, ranking.bins);
    __syncthreads();
  }
  const int32_t threshold = ranking.state.threshold;
  wanted = ranking.state.missing;
  __syncthreads();
  return threshold;
}

__device__ __forceinline__ int32_t key_held(const Collect& c, int64_t slot) {
  return reinterpret_bits<int32_t>(c.best_score[slot]);
}

// The last of the best k of n held, n > k: positions and indices order downwards as their complements do up.
__device__ inline Floor last_of_best(const Collect& c, int64_t n, int64_t k, Ranking& ranking) {
  constexpr int32_t kMost = 0x7fffffff;
  const int32_t key = nth_largest([&](int64_t i, int32_t) { return key_held(c, i); }, n, k, ranking);
  const auto position = [&](int64_t i, int32_t) {
    return key_held(c, i) == key ? kMost - static_cast<int32_t>(c.best_place[i] >> 32) : 0;
  };
  const int32_t last = nth_largest(position, n, k, ranking);
  const auto index = [&](int64_t i, int32_t) {
    return position(i, 0) == last ? kMost - static_cast<int32_t>(c.best_place[i] & kMost) : 0;
  };
  const int32_t last_index = nth_largest(index, n, k, ranking);
  return {static_cast<int64_t>(kMost - last) << 32 | (kMost - last_index), key};
}

// Leaves the best k of what is held, in front.
__device__ inline void cut_to_best(const Collect& c, Ranking& ranking) {
  const int64_t n = static_cast<int64_t>(c.state->count), k = c.wanted.count();
  __syncthreads();
  if (n <= k) return;
  const Floor last = last_of_best(c, n, k, ranking);
  int64_t kept = 0, total = 0;
  for (int64_t first = 0; first < n; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const float score = i < n ? c.best_score[i] : 0, grad = i < n ? c.best_grad[i] : 0;
    const int64_t place = i < n ? c.best_place[i] : -1;
    const bool keeps = i < n && last.admits(reinterpret_bits<int32_t>(score), place - 1);
    const int64_t before =
        sum_before(keeps, total);  // all have read by now, and `kept` is behind what is read
    if (keeps) put(c, kept + before, score, place, grad);
    kept += total;
  }
  __syncthreads();
  put_empty(c, kept, n);
  if (threadIdx.x == 0) {
    c.state->count = kept;
    c.state->floor = last;
  }
  __syncthreads();
}

// Takes the tensor's candidates again, as many at a time as there is room for.
template <Exponent E>
__device__ inline void take_again(const Collect& c, Ranking& ranking) {
  const int64_t then = static_cast<int64_t>(c.state->count_then);
  put_empty(c, then, c.room);
  __syncthreads();
  if (threadIdx.x == 0) c.state->count = then;
  __syncthreads();
  for (int64_t begin = 0; begin < c.row.numel;) {
    const int64_t held = static_cast<int64_t>(c.state->count);
    const int64_t end = min(begin + c.room - held, static_cast<int64_t>(c.row.numel));
    const Floor floor = c.state->floor;
    __syncthreads();
    for (int64_t index = begin + threadIdx.x; index < end; index += kThreads) {
      if (!floor.admits(c.maxima[index / kTile], place_of(c, index))) continue;
      const int32_t key = admitted_key<E>(c, floor, index);
      if (key > 0) put_entry(c, static_cast<int64_t>(atomicAdd(&c.state->count, 1ull)), key, index);
    }
    __syncthreads();
    if (static_cast<int64_t>(c.state->count) > c.room / 2) cut_to_best(c, ranking);
    begin = end;
  }
}

template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) append_kernel(Collect c, int64_t tiles) {
  if (c.wanted.count() == 0) return;
  __shared__ Ranking ranking;
  append_tiles<E>(c, tiles);
  if (!is_last_block(&c.state->arrived)) return;
  const int64_t count = static_cast<int64_t>(c.state->count);
  if (count > c.room)
    take_again<E>(c, ranking);
  else if (count > c.room / 2)
    cut_to_best(c, ranking);
}

}  // namespace

void collect(const Collect& asked, cudaStream_t stream) {
  Collect c = asked;
  c.rule = with_bounds(c.rule);
  const int64_t chunks = c.state ? chunks_of(c.row.numel) : 0, tiles = chunks * (kShortChunk / kTile);
  const int64_t active = std::min<int64_t>(c.most_active, c.row.numel);
  launch(take_kernel, blocks_for(std::max<int64_t>(active, chunks)), kThreads, stream, c, chunks);
  if (chunks == 0) return;
  with_exponent(exponent_of(c.rule), [&](auto e) {
    launch(stream_kernel<e.value>, blocks_for(chunks, 1), kThreads, stream, c, chunks);
    launch(append_kernel<e.value>, blocks_for(tiles, kWarps * kTilesTogether), kThreads, stream, c, tiles);
  });
}

}  // namespace id3::cuda
