#pragma once

#include "cuda/layout.h"
#include "cuda/quick.h"

// The one pass over all entries: the largest key of each tile, entries of the active set left out.
namespace id3::cuda {

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

constexpr int kPerLane = kTile / kWarp;
constexpr int kWarps = kThreads / kWarp;

template <Exponent E>
__device__ __forceinline__ int32_t key_at(const ScoreRule& rule, float param, float grad) {
  if constexpr (E == Exponent::zero) return key_of(rule.given ? grad : flush_subnormal(fabsf(grad)));
  return key_of(d3_unflushed<E>(param, grad, rule.eps, rule.exp));
}

// The key of the entry at `at` of a chunk, active or not.
template <Exponent E>
__device__ __forceinline__ int32_t key_in(const Chunk& chunk, const ScoreRule& rule, int32_t at) {
  const float g = load_as_float(chunk.grad, chunk.grad_dtype, at);
  const float p = E == Exponent::zero ? 0.0f : load_as_float(chunk.param, chunk.param_dtype, at);
  return key_at<E>(rule, p, g);
}

// Sees no key; see stream_chunk.
struct NoTally {
  __device__ __forceinline__ bool wants(int32_t) const { return false; }
  __device__ __forceinline__ void operator()(int32_t) const {}
};

// --- a chunk in 16-byte loads ------------------------------------------------------------------------------

// 16 bytes that will not be read again: the load hints that no cache keeps them.
__device__ __forceinline__ uint4 load_16_bytes(const void* address) {
  return __ldcs(static_cast<const uint4*>(address));
}

// The lane's eight entries of a tile: four from `first` on and four from `second` on.
template <DType T>
struct LaneLoad {
  static constexpr bool kWide = T == DType::float32;
  using Item = std::conditional_t<kWide, float, uint16_t>;
  uint4 bits[kWide ? 2 : 1];

  __device__ __forceinline__ void load(const void* data, int first, int second) {
    bits[0] = load_16_bytes(static_cast<const Item*>(data) + first);
    if constexpr (kWide) bits[1] = load_16_bytes(static_cast<const Item*>(data) + second);
  }

  __device__ __forceinline__ float value(int i) const {
    const uint4& b = bits[kWide ? i / 4 : 0];
    const int word_at = kWide ? i % 4 : i / 2;
    const uint32_t word = word_at == 0 ? b.x : word_at == 1 ? b.y : word_at == 2 ? b.z : b.w;
    if constexpr (kWide) return reinterpret_bits<float>(word);
    const uint16_t half = static_cast<uint16_t>(i % 2 ? word >> 16 : word);
    return T == DType::bfloat16 ? widen_bfloat16(half) : widen_half(half);
  }
};

// Two float32 tensors are read in two runs of four entries per lane, so that each load of a warp covers whole
// sectors; a 16-bit tensor gives its eight entries in one load.
template <DType P, DType G>
struct Lane {
  static constexpr bool kApart = P == DType::float32 && G == DType::float32;
  static constexpr int kStep = kApart ? 4 : 8;
  static constexpr int kSecond = kApart ? kTile / 2 : 4;  // behind the first

  // Bit i: whether entry i is active, of the tile that begins at `here`; what is above bit 7 means nothing.
  __device__ __forceinline__ static uint32_t taken(const uint32_t* bitmap, int here) {
    const int at = here + static_cast<int>(threadIdx.x % kWarp) * kStep;
    if (bitmap == nullptr) return 0;
    const uint32_t word = bitmap[at / 32] >> at % 32;
    if constexpr (kApart)
      return (word & 0xf) | bitmap[(at + kSecond) / 32] >> at % 32 << 4;
    else
      return word;
  }
};

// A whole, aligned chunk: each warp takes every eighth tile, kAhead of them in flight. `tally` is called with
// the keys of a lane's entries where its `wants` is true of the largest of them. Returns which of the warp's
// tiles are to be scored again, a bit for each; of these nothing was tallied.
template <Exponent E, DType P, DType G, class Tally>
__device__ __forceinline__ uint32_t stream_chunk(const ScoreRule& rule, const Chunk& chunk,
                                                 const uint32_t* bitmap, int32_t* maxima,
                                                 const Tally& tally) {
  constexpr int kAhead = P == DType::float32 || G == DType::float32 ? 2 : 4;
  static_assert(kShortChunk % (kWarps * kAhead * kTile) == 0, "a round of all warps stays inside the chunk");
  using Mine = Lane<P, G>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, tiles = chunk.length / kTile;
  uint32_t again = 0;
  for (int tile = warp; tile < tiles; tile += kWarps * kAhead) {
    LaneLoad<G> grads[kAhead];
    LaneLoad<P> params[kAhead];
    const int first = tile * kTile + lane * Mine::kStep;
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int at = first + a * kWarps * kTile;
      grads[a].load(chunk.grad, at, at + Mine::kSecond);
      if constexpr (E != Exponent::zero) params[a].load(chunk.param, at, at + Mine::kSecond);
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int number = tile + a * kWarps;
      const uint32_t taken = Mine::taken(bitmap, number * kTile);
      int32_t keys[kPerLane], best = 0;
      QuickBest quick;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const float p = E == Exponent::zero ? 0.0f : params[a].value(i), g = grads[a].value(i);
        if constexpr (kQuick<E>) {
          keys[i] = quick.see<E>(rule, p, g, taken >> i & 1);
        } else {
          keys[i] = taken >> i & 1 ? 0 : key_at<E>(rule, p, g);
          best = max(best, keys[i]);
        }
      }
      if constexpr (kQuick<E>) best = quick.key(rule);
      const int32_t all = __reduce_max_sync(kWholeWarp, best);
      const bool unsure = kQuick<E> && all != 0 && !(all > rule.low && all < rule.high);
      again |= static_cast<uint32_t>(unsure) << number / kWarps;
      if (!unsure && tally.wants(best)) {
#pragma unroll
        for (int i = 0; i < kPerLane; ++i)
          if (!kQuick<E> || keys[i] > rule.low) tally(keys[i]);
      }
      if (lane == 0) maxima[number] = all;
    }
  }
  return again;
}

// Those of the warp's tiles whose bit is set, entry by entry.
template <Exponent E, class Tally>
__device__ __forceinline__ void walk_tiles(uint32_t which, const ScoreRule& rule, const Chunk& chunk,
                                           int tiles, const uint32_t* bitmap, int32_t* maxima,
                                           const Tally& tally) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll 1
  for (; which; which &= which - 1) {
    const int tile = (__ffs(static_cast<int>(which)) - 1) * kWarps + warp;
    if (tile >= tiles) return;
    int32_t best = 0;
#pragma unroll 1
    for (int at = tile * kTile + lane; at < min((tile + 1) * kTile, chunk.length); at += kWarp) {
      if (bitmap && bitmap[at / 32] >> at % 32 & 1) continue;
      const int32_t key = key_in<E>(chunk, rule, at);
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

// Where the loads of 16 bytes fit, the tiles to score again; else all of them, as at the end of a tensor and
// where its address is no multiple of 16.
template <Exponent E, class Tally>
__device__ __forceinline__ uint32_t stream_if_whole(const ScoreRule& rule, const Chunk& chunk, bool whole,
                                                    const uint32_t* bitmap, int32_t* maxima,
                                                    const Tally& tally) {
  constexpr uint32_t kAll = 0xffffffff;
  const uint64_t addresses = reinterpret_cast<uint64_t>(chunk.grad) |
                             (E == Exponent::zero ? 0 : reinterpret_cast<uint64_t>(chunk.param));
  const DType p = E == Exponent::zero ? chunk.grad_dtype : chunk.param_dtype, g = chunk.grad_dtype;
  if (!whole || addresses % 16 != 0) return kAll;
  if (E != Exponent::zero && p == DType::bfloat16 && g == DType::float32)
    return stream_chunk<E, DType::bfloat16, DType::float32>(rule, chunk, bitmap, maxima, tally);
  if (p != g) return kAll;
  if (p == DType::float32)
    return stream_chunk<E, DType::float32, DType::float32>(rule, chunk, bitmap, maxima, tally);
  if (p == DType::bfloat16)
    return stream_chunk<E, DType::bfloat16, DType::bfloat16>(rule, chunk, bitmap, maxima, tally);
  return stream_chunk<E, DType::float16, DType::float16>(rule, chunk, bitmap, maxima, tally);
}

// maxima [chunk_length / kTile]: the largest key of each of the chunk's tiles, 0 where there is none.
// bitmap: [chunk_length / 32], in shared memory. Every thread of the block must call it.
template <Exponent E, class Tally>
__device__ __forceinline__ void tile_maxima(const ScoreRule& rule, const Chunk& chunk,
                                            const ActiveSpans& active, int chunk_length, uint32_t* bitmap,
                                            int32_t* maxima, const Tally& tally) {
  static_assert(kLongChunk / kTile / kWarps <= 32, "a bit for each of a warp's tiles");
  const uint32_t* taken = mark_taken(active, chunk, chunk_length, bitmap);
  const bool whole = chunk.length == chunk_length;
  const uint32_t again = stream_if_whole<E>(rule, chunk, whole, taken, maxima, tally);
  walk_tiles<E>(again, rule, chunk, chunk_length / kTile, taken, maxima, tally);
}

#endif

}  // namespace id3::cuda
