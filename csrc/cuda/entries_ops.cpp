#include <torch/library.h>

#include "cuda/entries.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

at::Tensor gather_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const auto dtype = tensors.empty() ? at::kFloat : tensors[0].scalar_type();
  const at::Tensor values = at::empty({indices.numel()}, offsets.options().dtype(dtype));
  const at::Tensor rows = stored(rows_of(tensors, OptionalTensors(), offsets), offsets);
  gather(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
         values.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return values;
}

void scatter_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices,
                const at::Tensor& values) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  check_row_major(values, offsets);
  const at::Tensor rows = stored(rows_of(tensors, OptionalTensors(), offsets), offsets);
  scatter(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
          values.const_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void join_op(at::TensorList arrays, const at::Tensor& offsets, const at::Tensor& b_offsets,
             const at::Tensor& b_indices, const OptionalTensors& b_values) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  TORCH_CHECK_VALUE(!arrays.empty() && arrays.size() <= kMostArrays, "arrays: expected 1 to ", kMostArrays,
                    ", got ", arrays.size());
  TORCH_CHECK_VALUE(b_values.size() + 1 == arrays.size(), "b_values: expected ", arrays.size() - 1, ", got ",
                    b_values.size());
  Join args{};
  args.room = arrays[0].numel();
  args.room_added = b_indices.numel();
  std::vector<at::Tensor> scratch;
  for (size_t a = 0; a < arrays.size(); ++a) {
    const at::Tensor& array = arrays[a];
    check_row_major(array, offsets);
    const OptionalTensor added = a == 0 ? b_indices : b_values.get(a - 1);
    if (added) {
      check_row_major(*added, offsets);
      TORCH_CHECK_VALUE(added->scalar_type() == array.scalar_type() && added->numel() >= args.room_added,
                        "b_values: expected ", args.room_added, " ", array.scalar_type(), ", got ",
                        added->numel(), " ", added->scalar_type());
    }
    scratch.push_back(at::empty_like(array));
    args.room = std::min(args.room, array.numel());
    args.arrays[args.n_arrays++] = {array.mutable_data_ptr(), scratch.back().mutable_data_ptr(),
                                    added ? added->const_data_ptr() : nullptr,
                                    static_cast<int32_t>(array.element_size())};
  }
  const at::Tensor arrived = empty<unsigned>(1, offsets);
  args.offsets = data<int64_t>(offsets);
  args.added = view(b_offsets, b_indices);
  args.arrived = data<unsigned>(arrived);
  join(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("gather", &gather_op);
  m.impl("scatter_", &scatter_op);
  m.impl("join_", &join_op);
}

}  // namespace id3::cuda
