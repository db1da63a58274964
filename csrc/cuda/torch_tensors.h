#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "checks.h"
#include "cuda/tensors.h"

// What the *_ops.cpp share: torch's tensors as the launchers see them, memory from torch's allocator. The
// Python module id3_kernels/cuda.py makes tensors row-major before they come here and leaves float64 to the
// reference.
namespace id3::cuda {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return DType::float32;
  if (t.scalar_type() == at::kBFloat16) return DType::bfloat16;
  TORCH_CHECK_VALUE(t.scalar_type() == at::kHalf, "cuda backend: expected float32, bfloat16 or float16, got ",
                    t.scalar_type());
  return DType::float16;
}

inline void check_row_major(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device() && t.is_contiguous(),
                    "cuda backend: expected a row-major tensor on ", like.device(), ", got one on ",
                    t.device());
}

// Device memory for `n` numbers.
template <class T>
at::Tensor empty(int64_t n, const at::Tensor& like) {
  return at::empty({std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(T))},
                   like.options().dtype(at::kByte));
}
template <class T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline EntriesView view(const at::Tensor& offsets, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong && indices.scalar_type() == at::kInt,
                    "entries: expected int64 offsets and int32 indices");
  return {offsets.const_data_ptr<int64_t>(), indices.const_data_ptr<int32_t>(),
          static_cast<int32_t>(offsets.numel() - 1)};
}

inline at::Tensor stored(const std::vector<TensorRow>& rows, const at::Tensor& like) {
  const at::Tensor out = empty<TensorRow>(rows.size(), like);
  store_rows(rows.data(), static_cast<int32_t>(rows.size()), data<TensorRow>(out),
             c10::cuda::getCurrentCUDAStream());
  return out;
}

// grads empty: there are none.
inline at::Tensor rows_of(at::TensorList params, const OptionalTensors& grads, const at::Tensor& like) {
  const size_t n = std::max<size_t>(params.size(), grads.size());
  std::vector<TensorRow> rows(n);
  for (size_t j = 0; j < n; ++j) {
    TensorRow row{};
    if (j < params.size()) {
      check_row_major(params[j], like);
      row.param = params[j].data_ptr();
      if (params[j].element_size() < 8) row.param_dtype = dtype_of(params[j]);
    }
    const OptionalTensor grad = j < grads.size() ? grads.get(j) : OptionalTensor();
    if (grad) {
      check_row_major(*grad, like);
      row.grad = grad->const_data_ptr();
      row.grad_dtype = dtype_of(*grad);
    }
    rows[j] = row;
  }
  return stored(rows, like);
}

}  // namespace id3::cuda
