#include "cuda/score.h"

namespace id3::cuda {
namespace {

template <Exponent E>
__global__ void score_kernel(TensorRow row, int64_t numel, float eps, double exp, float* scores) {
  for (int64_t i = thread_in_grid(); i < numel; i += threads_in_grid()) {
    const float g = load_as_float(row.grad, row.grad_dtype, i);
    const float p = E == Exponent::zero ? 0.0f : load_as_float(row.param, row.param_dtype, i);
    scores[i] = d3<E>(p, g, eps, exp);
  }
}

}  // namespace

void d3_score(const TensorRow& row, int64_t numel, float eps, double exp, float* scores,
              cudaStream_t stream) {
  with_exponent(exponent_of(exp), [&](auto e) {
    launch(score_kernel<e.value>, Items{numel}, stream, row, numel, eps, exp, scores);
  });
}

}  // namespace id3::cuda
