#include "cuda/cut.h"

// A radix selection as that of topk.h, of a number of 94 bits: the key, then how early the place is. Nine
// rounds find the last candidate that is kept, and comparing with it finds the rest, in no order.

namespace id3::cuda {
namespace {

// What is cut: the candidates held, and where they have no room, those of before the tensor and all entries of
// the tensor. The floor is that of the append.
template <Exponent E>
struct Offered {
  const Collect& c;
  Floor floor;
  int64_t held, size;

  __device__ __forceinline__ explicit Offered(const Collect& collect) : c(collect), floor(c.state->floor) {
    const int64_t count = static_cast<int64_t>(c.state->count);
    const bool overflows = count > c.room;
    held = overflows ? static_cast<int64_t>(c.state->count_then) : count;
    size = overflows ? held + c.row.numel : held;
  }

  __device__ __forceinline__ int32_t key(int64_t i) const {
    if (i < held) return key_held(c, i);
    return may_admit(c, floor, (i - held) / kTile) ? admitted_key<E>(c, floor, i - held) : 0;
  }
  __device__ __forceinline__ int64_t place(int64_t i) const {
    return i < held ? c.best.place[i] : place_of(c, i - held);
  }
  __device__ __forceinline__ float grad(int64_t i) const {
    return i < held ? c.best.grad[i] : load_as_float(c.grad, c.grad_dtype, i - held);
  }

  // What part `part` of the number ranks, of those that equal the last one kept in the parts before: above 0.
  __device__ __forceinline__ int32_t part_of(int64_t i, int part) const {
    const int32_t* found = c.state->cut.found;
    const int32_t mine = key(i);
    if (part == 0 || mine == 0) return mine;
    if (mine != found[0]) return 0;
    const int32_t position = kMost - static_cast<int32_t>(place(i) >> 32);
    if (part == 1) return position;
    return position == found[1] ? kMost - static_cast<int32_t>(place(i) & kMost) : 0;
  }
};

template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) rank_kernel(Collect c, int part, int round) {
  CutState& cut = c.state->cut;
  if (cut.wanted == 0) return;
  __shared__ unsigned bins[kBins];
  for (int i = threadIdx.x; i < kBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Offered<E> offered(c);
  count_digits([&](int64_t i, int32_t) { return offered.part_of(i, part); }, thread_in_grid(), offered.size,
               threads_in_grid(), round, cut.rank.threshold, bins);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads)
    if (bins[i]) atomicAdd(&cut.digits[i], bins[i]);
  if (!is_last_block(&cut.rank.arrived)) return;
  choose_digit(round, &cut.rank, cut.digits);
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) cut.digits[i] = 0;
  if (threadIdx.x == 0 && round == kDigits - 1) {
    cut.found[part] = cut.rank.threshold;
    cut.rank.threshold = 0;
  }
}

__device__ __forceinline__ Floor last_kept(const CutState& cut) {
  return floor_at(cut.found[0], cut.found[1], cut.found[2]);
}

// To memory of their own, since the slots of some are still to be read.
template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) keep_kernel(Collect c) {
  CutState& cut = c.state->cut;
  if (cut.wanted == 0) return;
  const Offered<E> offered(c);
  const Floor last = last_kept(cut);
  const unsigned lane = threadIdx.x % kWarp;
  for (int64_t first = thread_in_grid() - lane; first < offered.size; first += threads_in_grid()) {
    const int64_t i = first + lane;
    const int32_t key = i < offered.size ? offered.key(i) : 0;
    const bool keeps = key > 0 && last.admits(key, offered.place(i) - 1);
    const unsigned votes = __ballot_sync(kWholeWarp, keeps);
    unsigned long long before = 0;
    if (lane == 0 && votes) before = atomicAdd(&cut.kept, static_cast<unsigned long long>(__popc(votes)));
    const int64_t slot =
        static_cast<int64_t>(__shfl_sync(kWholeWarp, before, 0)) + __popc(votes & ((1u << lane) - 1));
    if (!keeps) continue;
    c.kept.score[slot] = score_of<float>(key);
    c.kept.place[slot] = offered.place(i);
    c.kept.grad[slot] = offered.grad(i);
  }
}

__global__ void put_back_kernel(Collect c) {
  CutState& cut = c.state->cut;
  if (cut.wanted == 0) return;
  const int64_t wanted = cut.wanted, n = min(static_cast<int64_t>(c.state->count), c.room);
  for (int64_t i = thread_in_grid(); i < n; i += threads_in_grid()) {
    if (i < wanted)
      put(c, i, c.kept.score[i], c.kept.place[i], c.kept.grad[i]);
    else
      put(c, i, 0, -1, 0);
  }
  if (!is_last_block(&cut.rank.arrived) || threadIdx.x != 0) return;
  c.state->count = static_cast<unsigned long long>(wanted);
  c.state->floor = last_kept(cut);
  cut.wanted = 0;
  cut.kept = 0;
  cut.rank.missing = 0;
}

}  // namespace

void cut_by_grid(const Collect& c, cudaStream_t stream) {
  const Items items{std::max<int64_t>(c.room, c.row.numel)};
  with_exponent(exponent_of(c.rule), [&](auto e) {
    for (int part = 0; part < 3; ++part)
      for (int round = 0; round < kDigits; ++round)
        launch(rank_kernel<e.value>, items, stream, c, part, round);
    launch(keep_kernel<e.value>, items, stream, c);
  });
  launch(put_back_kernel, items, stream, c);
}

}  // namespace id3::cuda
