#pragma once

#include <cstdint>

#include "cuda/tensors.h"
#include "formulas/sampled.h"

namespace id3::cuda {

// [tokens, columns], of any strides (in items).
struct TokenMatrix {
  const void* data;
  DType dtype;
  int64_t token_stride, column_stride, tokens, columns;

  ID3_HOST_DEVICE int64_t padded_tokens() const { return token_blocks(tokens) * kBlockTokens; }
};

// values = or += the sums over tokens of left[t, row] · right[t, column] at the entries, of the weight
// [left.columns, right.columns]. left and right are of one dtype; turned_left, turned_right: room for
// columns · padded_tokens() items of it each. n: room in the indices.
void sampled_weight_grad(const TokenMatrix& left, const TokenMatrix& right, void* turned_left,
                         void* turned_right, const RunsView& entries, int64_t n, float* values, bool add,
                         cudaStream_t stream);

// values = or += the sums of grad[t, column] over the tokens of the row. ids: ascending; tokens: where each
// was before, ascending for equal ids.
void sampled_embedding_grad(const TokenMatrix& grad, const int64_t* ids, const int64_t* tokens,
                            const RunsView& entries, int64_t n, float* values, bool add, cudaStream_t stream);

}  // namespace id3::cuda
