#include <torch/library.h>

#include "cuda/sampled.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

TokenMatrix matrix_of(const char* name, const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device() && t.dim() == 2, name,
                    ": expected a matrix on ", like.device(), ", got ", shape_text(t.sizes()), " on ",
                    t.device());
  return {t.const_data_ptr(), dtype_of(t), t.stride(0), t.stride(1), t.size(0), t.size(1)};
}

at::Tensor room_for(const TokenMatrix& m, const at::Tensor& like) {
  const int64_t items = m.columns * m.padded_tokens();
  return m.dtype == DType::float32 ? empty<uint32_t>(items, like) : empty<uint16_t>(items, like);
}

void check_values(const at::Tensor& values, const at::Tensor& indices) {
  check_row_major(values, indices);
  TORCH_CHECK_VALUE(values.scalar_type() == at::kFloat && values.numel() >= indices.numel(),
                    "values: expected ", indices.numel(), " float32, got ", values.numel(), " ",
                    values.scalar_type());
}

void sampled_weight_grad_op(const at::Tensor& left, const at::Tensor& right, const at::Tensor& offsets,
                            const at::Tensor& indices, const at::Tensor& values, bool add) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const TokenMatrix a = matrix_of("left", left, offsets), b = matrix_of("right", right, offsets);
  TORCH_CHECK_VALUE(a.tokens == b.tokens && a.dtype == b.dtype, "right: expected ", a.tokens, " tokens of ",
                    left.scalar_type(), " as left, got ", b.tokens, " of ", right.scalar_type());
  check_values(values, indices);
  const at::Tensor turned_left = room_for(a, offsets), turned_right = room_for(b, offsets);
  sampled_weight_grad(a, b, turned_left.mutable_data_ptr(), turned_right.mutable_data_ptr(),
                      view_runs(offsets, indices), indices.numel(), data<float>(values), add,
                      c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void sampled_embedding_grad_op(const at::Tensor& grad, const at::Tensor& ids, const at::Tensor& offsets,
                               const at::Tensor& indices, const at::Tensor& values, bool add) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const TokenMatrix m = matrix_of("grad", grad, offsets);
  check_row_major(ids, offsets);
  TORCH_CHECK_VALUE(ids.scalar_type() == at::kLong && ids.numel() == m.tokens, "ids: expected ", m.tokens,
                    " int64, got ", ids.numel(), " ", ids.scalar_type());
  check_values(values, indices);
  const auto [sorted, tokens] = at::sort(ids, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  sampled_embedding_grad(m, sorted.const_data_ptr<int64_t>(), tokens.const_data_ptr<int64_t>(),
                         view_runs(offsets, indices), indices.numel(), data<float>(values), add,
                         c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("sampled_weight_grad_", &sampled_weight_grad_op);
  m.impl("sampled_embedding_grad_", &sampled_embedding_grad_op);
}

}  // namespace id3::cuda
