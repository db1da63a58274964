#include "cuda/score.h"
#include "cuda/selection.h"

// Exact top-k in one streaming pass (the delegates of Dr. Top-k, arXiv 2109.08219). The pass keeps one
// maximum per tile. All winners lie in the k tiles with the largest maxima, ties to the first, which are
// scored again.

namespace id3::cuda {
namespace {

constexpr int kPerLane = kTile / kWarp;
constexpr int kWarps = kThreads / kWarp;

template <Exponent E>
__device__ __forceinline__ int32_t key_at(const Candidates& c, float param, float grad) {
  if constexpr (E == Exponent::zero) return key_of(c.given ? grad : flush_subnormal(fabsf(grad)));
  return key_of(d3_unflushed<E>(param, grad, c.eps, c.exp));
}

__global__ void chunk_active_kernel(Candidates c) {
  for (int64_t i = thread_in_grid(); i <= c.n_chunks; i += threads_in_grid()) {
    if (i == c.n_chunks) {
      c.chunk_active[i] = c.active.count();
      continue;
    }
    const Chunk chunk = c.chunks[i];
    const int64_t* offsets = c.active.offsets + chunk.tensor;
    c.chunk_active[i] = lower_bound(c.active.indices, offsets[0], offsets[1], chunk.offset);
  }
}

// --- first look: the largest key of each tile --------------------------------------------------------------

// 16 bytes that will not be read again: they pass the caches by as well as a load can ask for it.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}

// The lane's eight entries of a tile: [0, 4) and [4, 8) from `first` and `second`.
template <DType T>
struct LaneLoad {
  uint4 bits[T == DType::float32 ? 2 : 1];

  __device__ __forceinline__ void load(const void* data, int64_t first, int64_t second) {
    if constexpr (T == DType::float32) {
      bits[0] = load_16_bytes(static_cast<const float*>(data) + first);
      bits[1] = load_16_bytes(static_cast<const float*>(data) + second);
    } else {
      bits[0] = load_16_bytes(static_cast<const uint16_t*>(data) + first);
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (T == DType::float32) {
      const uint4& b = bits[i / 4];
      const uint32_t word = i % 4 == 0 ? b.x : i % 4 == 1 ? b.y : i % 4 == 2 ? b.z : b.w;
      return reinterpret_bits<float>(word);
    } else {
      const uint32_t word = i / 2 == 0   ? bits[0].x
                            : i / 2 == 1 ? bits[0].y
                            : i / 2 == 2 ? bits[0].z
                                         : bits[0].w;
      const uint16_t half = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
      return T == DType::bfloat16 ? widen_bfloat16(half) : widen_half(half);
    }
  }
};

// Two float32 tensors are read in two runs of four entries per lane, so that each load of a warp covers whole
// sectors; a 16-bit tensor gives its eight entries in one load.
template <DType P, DType G>
__device__ __forceinline__ int second_place(int lane) {
  return P == DType::float32 && G == DType::float32 ? kTile / 2 + lane * 4 : lane * 8 + 4;
}
template <DType P, DType G>
__device__ __forceinline__ int first_place(int lane) {
  return P == DType::float32 && G == DType::float32 ? lane * 4 : lane * 8;
}

// A whole, aligned chunk: each warp takes every eighth tile, kAhead of them in flight.
template <Exponent E, DType P, DType G>
__device__ __forceinline__ void stream_chunk(const Candidates& c, const TensorRow& row, const Chunk& chunk,
                                             const uint32_t* taken, int32_t* maxima) {
  constexpr int kAhead = P == DType::float32 || G == DType::float32 ? 2 : 4;
  static_assert(kShortChunk % (kWarps * kAhead * kTile) == 0, "a round of all warps stays inside the chunk");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = c.chunk_length / kTile;
  const int first = first_place<P, G>(lane), second = second_place<P, G>(lane);
  for (int tile = warp; tile < tiles; tile += kWarps * kAhead) {
    LaneLoad<G> grads[kAhead];
    LaneLoad<P> params[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t begin = chunk.offset + static_cast<int64_t>(tile + a * kWarps) * kTile;
      grads[a].load(row.grad, begin + first, begin + second);
      if constexpr (E != Exponent::zero) params[a].load(row.param, begin + first, begin + second);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int here = (tile + a * kWarps) * kTile;
      uint32_t out = 0;
      if (taken) {
        out = taken[(here + first) / 32] >> (here + first) % 32 & 0xf;
        out |= (taken[(here + second) / 32] >> (here + second) % 32 & 0xf) << 4;
      }
      int32_t best = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float p = E == Exponent::zero ? 0.0f : params[a].value(i);
        const int32_t key = key_at<E>(c, p, grads[a].value(i));
        best = max(best, out >> i & 1 ? 0 : key);
      }
      best = __reduce_max_sync(kWholeWarp, best);
      if (lane == 0) maxima[tile + a * kWarps] = best;
    }
  }
}

// The end of a tensor, or one whose address is no multiple of 16: entry by entry.
template <Exponent E>
__device__ __forceinline__ void walk_chunk(const Candidates& c, const TensorRow& row, const Chunk& chunk,
                                           const uint32_t* taken, int32_t* maxima) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = c.chunk_length / kTile;
  for (int tile = warp; tile < tiles; tile += kWarps) {
    int32_t best = 0;
    for (int at = tile * kTile + lane; at < min((tile + 1) * kTile, chunk.length); at += kWarp) {
      if (taken && taken[at / 32] >> at % 32 & 1) continue;
      const float g = load_as_float(row.grad, row.grad_dtype, chunk.offset + at);
      const float p =
          E == Exponent::zero ? 0.0f : load_as_float(row.param, row.param_dtype, chunk.offset + at);
      best = max(best, key_at<E>(c, p, g));
    }
    best = __reduce_max_sync(kWholeWarp, best);
    if (lane == 0) maxima[tile] = best;
  }
}

// Sets a bit per active entry of the chunk; null where there is none.
__device__ __forceinline__ const uint32_t* mark_taken(const Candidates& c, const Chunk& chunk,
                                                      uint32_t* bitmap) {
  const int64_t begin = c.chunk_active[blockIdx.x], end = c.chunk_active[blockIdx.x + 1];
  if (begin == end) return nullptr;
  for (int i = threadIdx.x; i < c.chunk_length / 32; i += kThreads) bitmap[i] = 0;
  __syncthreads();
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const int at = static_cast<int>(c.active.indices[i] - chunk.offset);
    atomicOr(&bitmap[at / 32], 1u << at % 32);
  }
  __syncthreads();
  return bitmap;
}

template <Exponent E>
__global__ void __launch_bounds__(kThreads, 4) tile_maxima_kernel(Candidates c, int32_t* all_maxima) {
  __shared__ uint32_t bitmap[kLongChunk / 32];
  const Chunk chunk = c.chunks[blockIdx.x];
  const TensorRow row = c.rows[chunk.tensor];
  const int tiles = c.chunk_length / kTile;
  int32_t* maxima = all_maxima + static_cast<int64_t>(blockIdx.x) * tiles;
  if (row.grad == nullptr) {
    for (int tile = threadIdx.x; tile < tiles; tile += kThreads) maxima[tile] = 0;
    return;
  }
  const uint32_t* taken = mark_taken(c, chunk, bitmap);
  const uint64_t addresses = reinterpret_cast<uint64_t>(row.grad) |
                             (E == Exponent::zero ? 0 : reinterpret_cast<uint64_t>(row.param));
  const bool whole = chunk.length == c.chunk_length && addresses % 16 == 0;
  const DType p = E == Exponent::zero ? row.grad_dtype : row.param_dtype, g = row.grad_dtype;
  if (whole && p == DType::float32 && g == DType::float32)
    return stream_chunk<E, DType::float32, DType::float32>(c, row, chunk, taken, maxima);
  if (whole && p == DType::bfloat16 && g == DType::bfloat16)
    return stream_chunk<E, DType::bfloat16, DType::bfloat16>(c, row, chunk, taken, maxima);
  if (whole && p == DType::float16 && g == DType::float16)
    return stream_chunk<E, DType::float16, DType::float16>(c, row, chunk, taken, maxima);
  walk_chunk<E>(c, row, chunk, taken, maxima);
}

// --- second look: every key of the listed tiles ------------------------------------------------------------

__device__ __forceinline__ bool is_active(const Candidates& c, int32_t chunk, int32_t index) {
  const int64_t end = c.chunk_active[chunk + 1];
  const int64_t at = lower_bound(c.active.indices, c.chunk_active[chunk], end, index);
  return at < end && c.active.indices[at] == index;
}

// The keys as a function of the slot.
template <Exponent E>
struct SlotKeys {
  Candidates c;

  __device__ int32_t operator()(int64_t slot) const {
    const int32_t number = static_cast<int32_t>(slot / c.chunk_length);
    const int32_t at = static_cast<int32_t>(slot % c.chunk_length);
    const Chunk chunk = c.chunks[number];
    const TensorRow row = c.rows[chunk.tensor];
    if (at >= chunk.length || row.grad == nullptr) return 0;
    const int64_t index = chunk.offset + at;
    const float g = load_as_float(row.grad, row.grad_dtype, index);
    const float p = E == Exponent::zero ? 0.0f : load_as_float(row.param, row.param_dtype, index);
    const int32_t key = key_at<E>(c, p, g);
    return key && !is_active(c, number, static_cast<int32_t>(index)) ? key : 0;
  }
};

template <Exponent E>
__global__ void tile_keys_kernel(SlotKeys<E> keys_of, const int32_t* tiles, const int64_t* n_tiles,
                                 int64_t capacity, int32_t* keys) {
  const int64_t listed = *n_tiles;
  for (int64_t i = thread_in_grid(); i < capacity * kTile; i += threads_in_grid()) {
    const int64_t tile = i / kTile;
    keys[i] = tile < listed ? keys_of(static_cast<int64_t>(tiles[tile]) * kTile + i % kTile) : 0;
  }
}

// --- the result --------------------------------------------------------------------------------------------

// places[i]: where the i-th winner lies among the listed tiles; becomes its slot.
__global__ void slots_kernel(const int32_t* tiles, const int64_t* n_slots, int64_t* places) {
  for (int64_t i = thread_in_grid(); i < *n_slots; i += threads_in_grid())
    places[i] = static_cast<int64_t>(tiles[places[i] / kTile]) * kTile + places[i] % kTile;
}

__device__ __forceinline__ int32_t tensor_of(const Candidates& c, int64_t slot) {
  return c.chunks[slot / c.chunk_length].tensor;
}

// The winners' indices and scores, zeros behind the last of them, and where each tensor's begin.
template <Exponent E>
__global__ void result_kernel(SlotKeys<E> keys_of, const int64_t* slots, const int64_t* n_slots,
                              Selected out) {
  const Candidates& c = keys_of.c;
  const int64_t n = *n_slots;
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
void select_by(const Candidates& c, const int64_t* k, const SelectionWorkspace& w, const Selected& out,
               cudaStream_t stream) {
  const SlotKeys<E> keys_of{c};
  const int64_t slots = static_cast<int64_t>(c.n_chunks) * c.chunk_length, tiles = slots / kTile;
  launch(chunk_active_kernel, blocks_for(c.n_chunks + 1), kThreads, stream, c);
  if (few_winners(out.capacity, tiles)) {
    const int64_t places = out.capacity * kTile;
    launch(tile_maxima_kernel<E>, c.n_chunks, kThreads, stream, c, w.maxima);
    largest_in_order(ArrayKeys{w.maxima}, tiles, k, w.topk, w.tiles, w.n_tiles, stream);
    launch(tile_keys_kernel<E>, blocks_for(places), kThreads, stream, keys_of, w.tiles, w.n_tiles,
           out.capacity, w.keys);
    largest_in_order(ArrayKeys{w.keys}, places, k, w.topk, w.slots, w.n_slots, stream);
    launch(slots_kernel, blocks_for(out.capacity), kThreads, stream, w.tiles, w.n_slots, w.slots);
  } else {
    largest_in_order(keys_of, slots, k, w.topk, w.slots, w.n_slots, stream);
  }
  launch(result_kernel<E>, blocks_for(out.capacity), kThreads, stream, keys_of, w.slots, w.n_slots, out);
}

}  // namespace

void select_topk(const Candidates& candidates, const int64_t* k, const SelectionWorkspace& workspace,
                 const Selected& out, cudaStream_t stream) {
  const Exponent exponent = candidates.given ? Exponent::zero : exponent_of(candidates.exp);
  with_exponent(exponent, [&](auto e) { select_by<e.value>(candidates, k, workspace, out, stream); });
}

}  // namespace id3::cuda
