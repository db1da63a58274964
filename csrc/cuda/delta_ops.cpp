#include <torch/library.h>

#include "cuda/delta.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

at::Tensor gather_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const auto dtype = tensors.empty() ? at::kFloat : tensors[0].scalar_type();
  const at::Tensor values = at::empty({indices.numel()}, offsets.options().dtype(dtype));
  const at::Tensor rows = rows_of(tensors, OptionalTensors(), offsets);
  gather(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
         values.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return values;
}

void scatter_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices,
                const at::Tensor& values) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  check_row_major(values, offsets);
  const at::Tensor rows = rows_of(tensors, OptionalTensors(), offsets);
  scatter(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
          values.const_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor squared_norm_op(const OptionalTensors& tensors, const at::Tensor& offsets,
                           const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor rows = rows_of({}, tensors, offsets),
                   sum = at::zeros({}, offsets.options().dtype(at::kDouble));
  const int64_t n = indices.numel();
  const at::Tensor sums = empty<double>((n + kSumBlock - 1) / kSumBlock, offsets);
  squared_norm(data<TensorRow>(rows), view(offsets, indices), n, data<double>(sums), data<double>(sum),
               c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

at::Tensor join_op(at::TensorList arrays, const at::Tensor& offsets, const at::Tensor& b_offsets,
                   const at::Tensor& b_indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  TORCH_CHECK_VALUE(!arrays.empty() && arrays.size() <= kMostArrays, "arrays: expected 1 to ", kMostArrays,
                    ", got ", arrays.size());
  const at::Tensor positions = at::empty({b_indices.numel()}, offsets.options());
  Join args{};
  std::vector<at::Tensor> scratch;
  for (const at::Tensor& array : arrays) {
    check_row_major(array, offsets);
    scratch.push_back(at::empty_like(array));
    args.arrays[args.n_arrays++] = {array.mutable_data_ptr(), scratch.back().mutable_data_ptr(),
                                    static_cast<int32_t>(array.element_size())};
  }
  args.offsets = data<int64_t>(offsets);
  args.added = view(b_offsets, b_indices);
  args.positions = data<int64_t>(positions);
  args.n_held = arrays[0].numel();
  args.n_added = b_indices.numel();
  join(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return positions;
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("gather", &gather_op);
  m.impl("scatter_", &scatter_op);
  m.impl("squared_norm", &squared_norm_op);
  m.impl("join_", &join_op);
}

}  // namespace id3::cuda
