#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "formulas/low_precision.h"

namespace id3::cuda {

enum class DType : int32_t { float32, bfloat16, float16 };

// One tensor of a list, row-major. `grad` is null for a tensor without gradient.
struct TensorRow {
  void* param;
  const void* grad;
  DType param_dtype, grad_dtype;
  int32_t numel;        // entries of the gradient
  int32_t first_chunk;  // set by cut_into_chunks of layout.h
};

// A set of entries: tensor j has indices[offsets[j] .. offsets[j + 1]). The offsets may begin above 0, as
// those of a part of the tensors do.
struct EntriesView {
  const int64_t* offsets;
  const int32_t* indices;
  int32_t tensors;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ int64_t first() const { return offsets[0]; }
  __device__ int64_t end() const { return offsets[tensors]; }
  __device__ int64_t count() const { return end() - first(); }

  // The tensor of the entry at `position`, which lies in [first(), end()).
  __device__ int32_t owner(int64_t position) const {
    return static_cast<int32_t>(lower_bound(offsets, 0, tensors + 1, position + 1)) - 1;
  }
#endif
};

// An active set: runs of entries, of which no two hold the same entry. What lies between them in `indices` is
// no entry.
struct RunsView {
  const int64_t* offsets;  // [runs][tensors + 1], rows `stride` apart
  const int32_t* indices;
  int64_t stride;
  int32_t tensors, runs;

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)
  __device__ EntriesView run(int32_t number) const { return {offsets + number * stride, indices, tensors}; }
#endif
};

// Sends rows[0, count) to device memory as kernel parameters: no host memory has to outlive the call, no copy
// synchronises, and a captured graph contains the rows.
void store_rows(const TensorRow* rows, int32_t count, TensorRow* device_rows, cudaStream_t stream);

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

__device__ inline float load_as_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return dtype == DType::bfloat16 ? widen_bfloat16(bits) : widen_half(bits);
}

// Null of null.
__device__ inline const void* address_of(const void* data, DType dtype, int64_t index) {
  if (data == nullptr) return nullptr;
  return static_cast<const char*>(data) + index * (dtype == DType::float32 ? 4 : 2);
}

__device__ inline void store_float(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::float32)
    static_cast<float*>(data)[index] = value;
  else
    static_cast<uint16_t*>(data)[index] =
        dtype == DType::bfloat16 ? round_to_bfloat16(value) : round_to_half(value);
}

// The value rounded to dtype and widened to float.
__device__ inline float rounded(float value, DType dtype) {
  if (dtype == DType::float32) return value;
  return dtype == DType::bfloat16 ? widen_bfloat16(round_to_bfloat16(value))
                                  : widen_half(round_to_half(value));
}

#endif

}  // namespace id3::cuda
