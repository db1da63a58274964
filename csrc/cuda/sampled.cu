#include "cuda/sampled.h"

// Both factors are transposed, which pads the tokens to whole blocks, and a warp takes one entry after the
// other: its lanes are those of formulas/sampled.h, so that neither splits nor atomics change the order.
//
// Instructions per entry and block of 128 tokens: 8 loads (a warp reads 64 or 128 neighbouring bytes), 8
// conversions below float32, 4 products, 8 sums, 5 shuffles, about 40 with the loop. Bytes: 128 items of a
// column of `right` from the L2 cache; those of `left` come from L1, as neighbouring entries share a row.
// Predicted, not measured, of a weight [4096, 4096] with 0.1 % active, 8192 tokens of bfloat16 on an H200:
// 43 million instructions of warps (0.05 ms at 132 · 4 per clock, 1.7 GHz) beside 275 MB from L2 (0.05 ms at
// 5.5 TB/s), and 268 MB of transposing (0.06 ms); the dense product takes 0.4 ms.
namespace id3::cuda {
namespace {

constexpr int kSide = 32;  // of the tile that a block turns

template <class Bits>
__global__ void transpose_kernel(TokenMatrix m, Bits* to) {
  __shared__ Bits tile[kSide][kSide + 1];  // the odd stride spreads a column over the banks
  const auto* from = static_cast<const Bits*>(m.data);
  const int64_t padded = m.padded_tokens(), across = (m.columns + kSide - 1) / kSide;
  const int x = threadIdx.x % kSide, first = threadIdx.x / kSide;
  for (int64_t number = blockIdx.x; number < padded / kSide * across; number += gridDim.x) {
    const int64_t token = number / across * kSide, column = number % across * kSide;
    for (int y = first; y < kSide; y += kThreads / kSide)
      tile[y][x] = token + y < m.tokens && column + x < m.columns
                       ? from[(token + y) * m.token_stride + (column + x) * m.column_stride]
                       : Bits(0);
    __syncthreads();
    for (int y = first; y < kSide; y += kThreads / kSide)
      if (column + y < m.columns) to[(column + y) * padded + token + x] = tile[x][y];
    __syncthreads();
  }
}

// The sum of the lanes of a warp, steps 3 and 4 of formulas/sampled.h: every lane gets it.
__device__ __forceinline__ float folded(float lane) {
  float sum = lane + __shfl_xor_sync(kWholeWarp, lane, 1);
  for (int distance = kWarp / 2; distance > 1; distance /= 2)
    sum += __shfl_xor_sync(kWholeWarp, sum, distance);
  return sum;
}

template <DType kType>
__global__ void products_kernel(const void* left, const void* right, int64_t blocks, int64_t columns,
                                RunsView entries, float* values, bool add) {
  static_assert(kLanes == kWarp);
  const int64_t padded = blocks * kBlockTokens;
  const int lane = threadIdx.x % kWarp;
  for (int32_t run = 0; run < entries.runs; ++run) {
    const EntriesView own = entries.run(run);
    const int64_t end = own.end(), warps = threads_in_grid() / kWarp;
    for (int64_t at = own.first() + thread_in_grid() / kWarp; at < end; at += warps) {
      const int64_t index = own.indices[at], row = index / columns;
      int64_t a = row * padded + lane, b = (index - row * columns) * padded + lane;
      float total = 0;
      for (int64_t block = 0; block < blocks; ++block) {
        float sum = load_as_float(left, kType, a) * load_as_float(right, kType, b);
        for (int step = kLanes; step < kBlockTokens; step += kLanes)
          sum += load_as_float(left, kType, a + step) * load_as_float(right, kType, b + step);
        sum = folded(sum);
        total = block == 0 ? sum : total + sum;
        a += kBlockTokens, b += kBlockTokens;
      }
      if (lane == 0) values[at] = add ? values[at] + total : total;
    }
  }
}

// A thread takes one entry. A row of many tokens is one thread's loop over them.
__global__ void embedding_kernel(TokenMatrix grad, const int64_t* ids, const int64_t* tokens,
                                 RunsView entries, float* values, bool add) {
  for (int32_t run = 0; run < entries.runs; ++run) {
    const EntriesView own = entries.run(run);
    const int64_t end = own.end();
    for (int64_t at = own.first() + thread_in_grid(); at < end; at += threads_in_grid()) {
      const int64_t index = own.indices[at], row = index / grad.columns, column = index - row * grad.columns;
      float sum = 0;
      for (int64_t i = lower_bound(ids, 0, grad.tokens, row); i < grad.tokens && ids[i] == row; ++i)
        sum +=
            load_as_float(grad.data, grad.dtype, tokens[i] * grad.token_stride + column * grad.column_stride);
      values[at] = add ? values[at] + sum : sum;
    }
  }
}

void transpose(const TokenMatrix& m, void* to, cudaStream_t stream) {
  const int64_t tiles = m.padded_tokens() / kSide * ((m.columns + kSide - 1) / kSide);
  if (m.dtype == DType::float32)
    launch(transpose_kernel<uint32_t>, Items{tiles, 1}, stream, m, static_cast<uint32_t*>(to));
  else
    launch(transpose_kernel<uint16_t>, Items{tiles, 1}, stream, m, static_cast<uint16_t*>(to));
}

}  // namespace

void sampled_weight_grad(const TokenMatrix& left, const TokenMatrix& right, void* turned_left,
                         void* turned_right, const RunsView& entries, int64_t n, float* values, bool add,
                         cudaStream_t stream) {
  transpose(left, turned_left, stream);
  transpose(right, turned_right, stream);
  const auto kernel = left.dtype == DType::float32    ? products_kernel<DType::float32>
                      : left.dtype == DType::bfloat16 ? products_kernel<DType::bfloat16>
                                                      : products_kernel<DType::float16>;
  launch(kernel, Items{n, kThreads / kWarp}, stream, turned_left, turned_right, token_blocks(left.tokens),
         right.columns, entries, values, add);
}

void sampled_embedding_grad(const TokenMatrix& grad, const int64_t* ids, const int64_t* tokens,
                            const RunsView& entries, int64_t n, float* values, bool add,
                            cudaStream_t stream) {
  launch(embedding_kernel, Items{n}, stream, grad, ids, tokens, entries, values, add);
}

}  // namespace id3::cuda
