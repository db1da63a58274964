#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <vector>

#include "checks.h"
#include "cuda/tensors.h"

// For the *_ops.cpp: torch tensors as arguments of the launchers, and memory from torch's allocator. Tensors
// are row-major, as id3_kernels/cuda.py makes them, and float64 only where values are moved.
namespace id3::cuda {

using OptionalTensor = std::optional<at::Tensor>;

inline DType dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return DType::float32;
  if (t.scalar_type() == at::kBFloat16) return DType::bfloat16;
  TORCH_CHECK_VALUE(t.scalar_type() == at::kHalf,
                    "tensor: expected float32, bfloat16 or float16 for backend 'cuda', got ",
                    t.scalar_type());
  return DType::float16;
}

inline void check_row_major(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device() && t.is_contiguous(),
                    "tensor: expected a row-major tensor on ", like.device(), ", got one on ", t.device());
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

// offsets: [tensors + 1], one run, or [runs, tensors + 1], whose rows may lie apart.
inline RunsView view_runs(const at::Tensor& offsets, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong && indices.scalar_type() == at::kInt,
                    "entries: expected int64 offsets and int32 indices");
  TORCH_CHECK_VALUE(offsets.dim() > 0 && (offsets.size(-1) < 2 || offsets.stride(-1) == 1),
                    "offsets: expected rows of stride 1, got strides ", offsets.strides());
  const bool many = offsets.dim() == 2;
  return {offsets.const_data_ptr<int64_t>(), indices.const_data_ptr<int32_t>(), many ? offsets.stride(0) : 0,
          static_cast<int32_t>(offsets.size(-1) - 1), many ? static_cast<int32_t>(offsets.size(0)) : 1};
}

inline at::Tensor stored(const std::vector<TensorRow>& rows, const at::Tensor& like) {
  const at::Tensor out = empty<TensorRow>(rows.size(), like);
  store_rows(rows.data(), static_cast<int32_t>(rows.size()), data<TensorRow>(out),
             c10::cuda::getCurrentCUDAStream());
  return out;
}

// The addresses of a tensor and its gradient; one of the two may be absent.
inline TensorRow row_of(const OptionalTensor& param, const OptionalTensor& grad, const at::Tensor& like) {
  TensorRow row{};
  if (param) {
    check_row_major(*param, like);
    row.param = param->data_ptr();
    if (param->element_size() < 8) row.param_dtype = dtype_of(*param);
  }
  if (grad) {
    check_row_major(*grad, like);
    row.grad = grad->const_data_ptr();
    row.grad_dtype = dtype_of(*grad);
    TORCH_CHECK_VALUE(grad->numel() <= std::numeric_limits<int32_t>::max(),
                      "grad: expected fewer than 2^31 entries, got ", grad->numel());
    row.numel = static_cast<int32_t>(grad->numel());
  }
  return row;
}

// params or grads may be empty.
inline std::vector<TensorRow> rows_of(at::TensorList params, const OptionalTensors& grads,
                                      const at::Tensor& like) {
  std::vector<TensorRow> rows(std::max<size_t>(params.size(), grads.size()));
  for (size_t j = 0; j < rows.size(); ++j)
    rows[j] = row_of(j < params.size() ? OptionalTensor(params[j]) : OptionalTensor(),
                     j < grads.size() ? grads.get(j) : OptionalTensor(), like);
  return rows;
}

// The argument k of an op, which kernels read in device memory.
inline const int64_t* count_at(const at::Tensor& k, const at::Tensor& like) {
  check_row_major(k, like);
  TORCH_CHECK_VALUE(k.scalar_type() == at::kLong && k.numel() == 1, "k: expected one int64, got ", k.numel(),
                    " ", k.scalar_type());
  return k.const_data_ptr<int64_t>();
}

}  // namespace id3::cuda
