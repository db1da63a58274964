#pragma once

#include "cuda/layout.h"
#include "cuda/score.h"

// The one pass over all entries: the largest key of each tile, entries of the active set left out.
namespace id3::cuda {

struct ScoreRule {
  float eps;
  double exp;
  bool given;  // the gradients are the scores themselves
};

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

constexpr int kPerLane = kTile / kWarp;
constexpr int kWarps = kThreads / kWarp;

template <Exponent E>
__device__ __forceinline__ int32_t key_at(const ScoreRule& rule, float param, float grad) {
  if constexpr (E == Exponent::zero) return key_of(rule.given ? grad : flush_subnormal(fabsf(grad)));
  return key_of(d3_unflushed<E>(param, grad, rule.eps, rule.exp));
}

// The key of one entry of a tensor, active or not.
template <Exponent E>
__device__ __forceinline__ int32_t key_in(const TensorRow& row, const ScoreRule& rule, int64_t index) {
  const float g = load_as_float(row.grad, row.grad_dtype, index);
  const float p = E == Exponent::zero ? 0.0f : load_as_float(row.param, row.param_dtype, index);
  return key_at<E>(rule, p, g);
}

// Sees no key; see stream_chunk.
struct NoTally {
  __device__ __forceinline__ bool wants(int32_t) const { return false; }
  __device__ __forceinline__ void operator()(int32_t) const {}
};

// 16 bytes that will not be read again: the load hints that no cache keeps them.
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

// A whole, aligned chunk: each warp takes every eighth tile, kAhead of them in flight. `tally` is called with
// the keys of a lane's entries where its `wants` is true of the largest of them.
template <Exponent E, DType P, DType G, class Tally>
__device__ __forceinline__ void stream_chunk(const ScoreRule& rule, const TensorRow& row, const Chunk& chunk,
                                             const uint32_t* taken, int32_t* maxima, const Tally& tally) {
  constexpr int kAhead = P == DType::float32 || G == DType::float32 ? 2 : 4;
  static_assert(kShortChunk % (kWarps * kAhead * kTile) == 0, "a round of all warps stays inside the chunk");
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = chunk.length / kTile;
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
      int32_t keys[kPerLane], best = 0;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float p = E == Exponent::zero ? 0.0f : params[a].value(i);
        const int32_t key = key_at<E>(rule, p, grads[a].value(i));
        keys[i] = out >> i & 1 ? 0 : key;
        best = max(best, keys[i]);
      }
      if (tally.wants(best)) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) tally(keys[i]);
      }
      best = __reduce_max_sync(kWholeWarp, best);
      if (lane == 0) maxima[tile + a * kWarps] = best;
    }
  }
}

// The end of a tensor, or one whose address is no multiple of 16: entry by entry.
template <Exponent E, class Tally>
__device__ __forceinline__ void walk_chunk(const ScoreRule& rule, const TensorRow& row, const Chunk& chunk,
                                           int tiles, const uint32_t* taken, int32_t* maxima,
                                           const Tally& tally) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int tile = warp; tile < tiles; tile += kWarps) {
    int32_t best = 0;
    for (int at = tile * kTile + lane; at < min((tile + 1) * kTile, chunk.length); at += kWarp) {
      if (taken && taken[at / 32] >> at % 32 & 1) continue;
      const int32_t key = key_in<E>(row, rule, chunk.offset + at);
      if (tally.wants(key)) tally(key);
      best = max(best, key);
    }
    best = __reduce_max_sync(kWholeWarp, best);
    if (lane == 0) maxima[tile] = best;
  }
}

// Sets a bit per active entry of the chunk; null where there is none.
__device__ __forceinline__ const uint32_t* mark_taken(const ActiveSpans& active, const Chunk& chunk,
                                                      int chunk_length, uint32_t* bitmap) {
  if (active.none()) return nullptr;
  for (int i = threadIdx.x; i < chunk_length / 32; i += kThreads) bitmap[i] = 0;
  __syncthreads();
  for (int32_t run = 0; run < active.runs; ++run) {
    const Span span = active.spans[run];
    for (int64_t i = span.begin + threadIdx.x; i < span.end; i += kThreads) {
      const int at = static_cast<int>(active.indices[i] - chunk.offset);
      atomicOr(&bitmap[at / 32], 1u << at % 32);
    }
  }
  __syncthreads();
  return bitmap;
}

// maxima [chunk_length / kTile]: the largest key of each of the chunk's tiles, 0 where there is none.
// bitmap: [chunk_length / 32], in shared memory. Every thread of the block must call it.
template <Exponent E, class Tally>
__device__ __forceinline__ void tile_maxima(const ScoreRule& rule, const TensorRow& row, const Chunk& chunk,
                                            const ActiveSpans& active, int chunk_length, uint32_t* bitmap,
                                            int32_t* maxima, const Tally& tally) {
  const uint32_t* taken = mark_taken(active, chunk, chunk_length, bitmap);
  const uint64_t addresses = reinterpret_cast<uint64_t>(row.grad) |
                             (E == Exponent::zero ? 0 : reinterpret_cast<uint64_t>(row.param));
  const bool whole = chunk.length == chunk_length && addresses % 16 == 0;
  const DType p = E == Exponent::zero ? row.grad_dtype : row.param_dtype, g = row.grad_dtype;
  if (whole && p == DType::float32 && g == DType::float32)
    return stream_chunk<E, DType::float32, DType::float32>(rule, row, chunk, taken, maxima, tally);
  if (whole && p == DType::bfloat16 && g == DType::bfloat16)
    return stream_chunk<E, DType::bfloat16, DType::bfloat16>(rule, row, chunk, taken, maxima, tally);
  if (whole && p == DType::float16 && g == DType::float16)
    return stream_chunk<E, DType::float16, DType::float16>(rule, row, chunk, taken, maxima, tally);
  walk_chunk<E>(rule, row, chunk, chunk_length / kTile, taken, maxima, tally);
}

#endif

}  // namespace id3::cuda
