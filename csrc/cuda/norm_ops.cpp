#include <torch/library.h>

#include "cuda/norm.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

at::Tensor squared_norm_op(const OptionalTensors& tensors, const at::Tensor& offsets,
                           const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor rows = stored(rows_of({}, tensors, offsets), offsets),
                   sum = at::empty({}, offsets.options().dtype(at::kDouble)),
                   state = empty<NormState>(1, offsets).zero_(),
                   values = empty<float>(indices.numel(), offsets);
  squared_norm(data<TensorRow>(rows), view_runs(offsets, indices), indices.numel(), data<float>(values),
               data<NormState>(state), data<double>(sum), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) { m.impl("squared_norm", &squared_norm_op); }

}  // namespace id3::cuda
