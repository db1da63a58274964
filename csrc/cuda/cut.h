#pragma once

#include "cuda/candidates.h"

// Cuts too many candidates to the best k: by one block, as a part of a kernel, or by a grid, in kernels of its
// own. What the grid costs in launches a small cut does not repay.
namespace id3::cuda {

// Where the append has set `cut.wanted`, leaves the best so many of what is held, or, where there was no room
// for all, of what was held and of the whole tensor. Else its kernels return at once.
void cut_by_grid(const Collect& collect, cudaStream_t stream);

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

constexpr int32_t kMost = 0x7fffffff;  // positions and indices order downwards as their distances to it do up

// The last one kept, of its key and these distances of its position and index.
__device__ __forceinline__ Floor floor_at(int32_t key, int32_t position, int32_t index) {
  return {static_cast<int64_t>(kMost - position) << 32 | (kMost - index), key};
}

// Lets `cut_by_grid` cut; the last block of the append calls it.
__device__ __forceinline__ void begin_cut(const Collect& c) {
  if (threadIdx.x != 0) return;
  c.state->cut.wanted = c.wanted.count();
  c.state->cut.rank = {c.wanted.count(), 0, 0, 0, 0, 0};
}

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

// The last of the best k of n held, n > k.
__device__ inline Floor last_of_best(const Collect& c, int64_t n, int64_t k, Ranking& ranking) {
  const int32_t key = nth_largest([&](int64_t i, int32_t) { return key_held(c, i); }, n, k, ranking);
  const auto position = [&](int64_t i, int32_t) {
    return key_held(c, i) == key ? kMost - static_cast<int32_t>(c.best.place[i] >> 32) : 0;
  };
  const int32_t last = nth_largest(position, n, k, ranking);
  const auto index = [&](int64_t i, int32_t) {
    return position(i, 0) == last ? kMost - static_cast<int32_t>(c.best.place[i] & kMost) : 0;
  };
  const int32_t last_index = nth_largest(index, n, k, ranking);
  return floor_at(key, last, last_index);
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
    const float score = i < n ? c.best.score[i] : 0, grad = i < n ? c.best.grad[i] : 0;
    const int64_t place = i < n ? c.best.place[i] : -1;
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

// How many of the tiles [begin, end) the floor may admit entries of. Every thread of the block must call it.
__device__ inline int64_t tiles_admitted(const Collect& c, int64_t begin, int64_t end) {
  int64_t mine = 0, total = 0;
  for (int64_t tile = begin + threadIdx.x; tile < end; tile += kThreads)
    mine += may_admit(c, c.state->floor, tile);
  sum_before(mine, total);
  return total;
}

// Takes the candidates among the entries [begin, end), as many at a time as there is room for.
template <Exponent E>
__device__ inline void take_stretch(const Collect& c, int64_t begin, int64_t end, Ranking& ranking) {
  while (begin < end) {
    const int64_t held = static_cast<int64_t>(c.state->count), next = min(begin + c.room - held, end);
    const Floor floor = c.state->floor;
    __syncthreads();
    for (int64_t index = begin + threadIdx.x; index < next; index += kThreads) {
      if (!may_admit(c, floor, index / kTile)) continue;
      const int32_t key = admitted_key<E>(c, floor, index);
      if (key > 0) put_entry(c, static_cast<int64_t>(atomicAdd(&c.state->count, 1ull)), key, index);
    }
    __syncthreads();
    if (static_cast<int64_t>(c.state->count) > c.room / 2) cut_to_best(c, ranking);
    begin = next;
  }
}

// Takes the tensor's candidates again, and skips the stretches in which the floor, which rises, admits none.
template <Exponent E>
__device__ inline void take_again(const Collect& c, Ranking& ranking) {
  constexpr int64_t kTiles = 16 * kThreads;
  const int64_t then = static_cast<int64_t>(c.state->count_then), tiles = (c.row.numel - 1) / kTile + 1;
  put_empty(c, then, c.room);
  __syncthreads();
  if (threadIdx.x == 0) c.state->count = then;
  __syncthreads();
  for (int64_t tile = 0; tile < tiles; tile += kTiles)
    if (tiles_admitted(c, tile, min(tile + kTiles, tiles)) > 0)
      take_stretch<E>(c, tile * kTile, min((tile + kTiles) * kTile, int64_t{c.row.numel}), ranking);
}

#endif

}  // namespace id3::cuda
