#pragma once

#include <cstdint>

#include "cuda/launch.h"

// The k largest of n keys in ascending order of position, ties to the lowest, without synchronisation: three
// rounds of radix selection over a histogram give the k-th key, and two ordered passes write the keys that
// reach it.
namespace id3::cuda {

constexpr int kDigits = 3, kBins = 2048;  // 11 + 10 + 10 bits: a key is a positive int32, or 0
constexpr int kKeysPerBlock = 4096;       // that are counted together

// The number of wanted keys: *k in device memory, clamped to [0, capacity]. A kernel returns at once if it is
// 0.
struct Wanted {
  const int64_t* k;
  int64_t capacity;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ int64_t count() const { return max(int64_t{0}, min(*k, capacity)); }
#endif
};

struct TopkState {
  int64_t missing;    // how many keys with the known digits are wanted
  int64_t total;      // how many are taken in all: k, or the number of positive keys where that is less
  int32_t threshold;  // the known digits of the k-th key, at the end all of them
  int32_t all;        // whether every positive key is taken
  unsigned arrived;   // blocks of the running launch that are done
  int32_t floor;      // of the last ranking: the k-th key, 0 where every positive key was taken
};

struct BlockCount {
  int64_t above, equal;  // first of the block, then of all lower blocks
};

struct ZeroedTopk {
  TopkState state;
  unsigned histogram[kBins];
};

// Device memory of a call. State and histogram are zero before the first call and after each call.
struct TopkWorkspace {
  TopkState* state;
  unsigned* histogram;  // [kBins]
  BlockCount* counts;   // [topk_blocks(n)]
};

inline int64_t topk_blocks(int64_t n) { return (n + kKeysPerBlock - 1) / kKeysPerBlock; }

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

// Keys are a function of the position and of the least key that matters: for a key below that the function
// may return 0, which spares it what such a key costs.
struct ArrayKeys {
  const int32_t* keys;
  __device__ int32_t operator()(int64_t i, int32_t) const { return keys[i]; }
};

__device__ inline int digit_shift(int round) { return 20 - 10 * round; }
__device__ inline int digit_bits(int round) { return round == 0 ? 11 : 10; }

__device__ inline void choose_digit(int round, TopkState* state, unsigned* histogram) {
  constexpr int kMine = kBins / kThreads;
  const int bins = 1 << digit_bits(round), top = bins - 1 - static_cast<int>(threadIdx.x) * kMine;
  int64_t mine = 0, total = 0;
  for (int i = 0; i < kMine; ++i) mine += top - i >= 0 ? histogram[top - i] : 0;
  int64_t above = sum_before(mine, total);
  const int64_t missing = state->missing;
  __syncthreads();
  if (total < missing) {
    if (threadIdx.x == 0) *state = {0, total, 0, 1, state->arrived, state->floor};
  } else {
    for (int i = 0; i < kMine && top - i >= 0; ++i) {
      const int64_t here = histogram[top - i];
      if (above < missing && above + here >= missing) {
        state->missing = missing - above;
        state->threshold |= (top - i) << digit_shift(round);
      }
      above += here;
    }
  }
}

// Counts the next digit of every `step`-th key from `first` on, if the key is positive and has the known
// digits of `threshold`.
template <class Keys>
__device__ inline void count_digits(const Keys& keys, int64_t first, int64_t n, int64_t step, int round,
                                    int32_t threshold, unsigned* bins) {
  const int shift = digit_shift(round), bits = digit_bits(round);
  const int64_t known = static_cast<int64_t>(threshold) >> (shift + bits);
  for (int64_t i = first; i < n; i += step) {
    const int32_t key = keys(i, threshold);
    if (key > 0 && static_cast<int64_t>(key) >> (shift + bits) == known)
      atomicAdd(&bins[key >> shift & ((1 << bits) - 1)], 1u);
  }
}

template <class Keys>
__global__ void histogram_kernel(Keys keys, int64_t n, Wanted wanted, int round, TopkState* state,
                                 unsigned* histogram) {
  if (wanted.count() == 0) return;
  __shared__ unsigned bins[kBins];
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  if (!(round > 0 && state->all))
    count_digits(keys, thread_in_grid(), n, threads_in_grid(), round, state->threshold, bins);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&histogram[i], bins[i]);
  if (!is_last_block(&state->arrived)) return;
  if (round == 0 && threadIdx.x == 0) {
    state->missing = state->total = wanted.count();
    state->all = 0;
  }
  __syncthreads();
  if (!state->all) choose_digit(round, state, histogram);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
}

struct Takes {
  int32_t threshold;
  bool all;

  __device__ explicit Takes(const TopkState& state)
      : threshold(state.all ? 0 : state.threshold), all(state.all) {}
  __device__ bool above(int32_t key) const { return all ? key > 0 : key > threshold; }
  __device__ bool equal(int32_t key) const { return !all && key == threshold; }
};

// Replaces the count of each block by the sum over the lower blocks, kThreads blocks at a time.
__device__ inline void sum_counts(BlockCount* counts, int64_t blocks) {
  BlockCount before{0, 0};
  for (int64_t first = 0; first < blocks; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const BlockCount mine = i < blocks ? counts[i] : BlockCount{0, 0};
    BlockCount total;
    const int64_t above = sum_before(mine.above, total.above), equal = sum_before(mine.equal, total.equal);
    if (i < blocks) counts[i] = {before.above + above, before.equal + equal};
    before.above += total.above;
    before.equal += total.equal;
  }
}

template <class Keys>
__global__ void count_kernel(Keys keys, int64_t n, Wanted wanted, int64_t blocks, TopkState* state,
                             BlockCount* counts) {
  if (wanted.count() == 0) return;
  const Takes takes(*state);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    int64_t above = 0, equal = 0;
    for (int i = threadIdx.x; i < kKeysPerBlock; i += kThreads) {
      const int64_t at = block * kKeysPerBlock + i;
      const int32_t key = at < n ? keys(at, takes.threshold) : 0;
      above += takes.above(key);
      equal += takes.equal(key);
    }
    BlockCount total;
    sum_before(above, total.above);
    sum_before(equal, total.equal);
    if (threadIdx.x == 0) counts[block] = total;
  }
  if (is_last_block(&state->arrived)) sum_counts(counts, blocks);
}

// out[i]: the position of the i-th key taken, for i below state->total.
template <class Keys, class Position>
__global__ void __launch_bounds__(kThreads, 4)
    write_kernel(Keys keys, int64_t n, Wanted wanted, int64_t blocks, TopkState* state,
                 const BlockCount* counts, Position* out, int64_t* n_taken) {
  if (wanted.count() == 0) return;
  const Takes takes(*state);
  const int64_t ties = state->missing;
  constexpr int kMine = kKeysPerBlock / kThreads;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block * kKeysPerBlock + static_cast<int64_t>(threadIdx.x) * kMine;
    uint32_t above_bits = 0, equal_bits = 0;
    for (int i = 0; i < kMine; ++i) {
      const int32_t key = first + i < n ? keys(first + i, takes.threshold) : 0;
      above_bits |= static_cast<uint32_t>(takes.above(key)) << i;
      equal_bits |= static_cast<uint32_t>(takes.equal(key)) << i;
    }
    int64_t total = 0;
    int64_t above = counts[block].above + sum_before(__popc(above_bits), total);
    int64_t equal = counts[block].equal + sum_before(__popc(equal_bits), total);
#pragma unroll 1
    for (uint32_t left = above_bits | equal_bits; left; left &= left - 1) {
      const int i = __ffs(left) - 1;
      const bool is_above = above_bits >> i & 1;
      if (is_above || equal < ties) out[above + min(equal, ties)] = static_cast<Position>(first + i);
      above += is_above;
      equal += !is_above;
    }
  }
  if (is_last_block(&state->arrived) && threadIdx.x == 0) {
    *n_taken = state->total;
    *state = {0, 0, 0, 0, state->arrived, takes.threshold};
  }
}

// out: [wanted.capacity]. n_taken: in device memory. Neither is written if no key is wanted.
template <class Keys, class Position>
void largest_in_order(Keys keys, int64_t n, Wanted wanted, const TopkWorkspace& workspace, Position* out,
                      int64_t* n_taken, cudaStream_t stream) {
  TopkState* state = workspace.state;
  const Items items{n, kKeysPerBlock};
  for (int round = 0; round < kDigits; ++round)
    launch(histogram_kernel<Keys>, items, stream, keys, n, wanted, round, state, workspace.histogram);
  launch(count_kernel<Keys>, items, stream, keys, n, wanted, topk_blocks(n), state, workspace.counts);
  launch(write_kernel<Keys, Position>, items, stream, keys, n, wanted, topk_blocks(n), state,
         workspace.counts, out, n_taken);
}

#endif

}  // namespace id3::cuda
