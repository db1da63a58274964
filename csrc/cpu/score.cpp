#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "cpu/cut.h"
#include "cpu/tiles.h"

namespace id3::cpu {
namespace {

template <class Value>
at::Tensor score_tensor(const at::Tensor& param, const at::Tensor& grad, double eps, double exp) {
  const at::Tensor scores = at::empty(param.sizes(), at::CppTypeToScalarType<Value>::value);
  ScoredTensor<Value> tensor;
  tensor.param = Strided(param);
  tensor.grad = Strided(grad);
  tensor.rule = {exponent_of(exp), static_cast<Value>(eps), exp};
  tensor.numel = param.numel();
  Value* out = scores.template mutable_data_ptr<Value>();
  const Parts parts((tensor.numel + kTile - 1) / kTile, 64);
  parts.run([&](int64_t part) {
    alignas(64) Value buffer[kTile];
    for (int64_t tile = parts.begin(part); tile < parts.begin(part + 1); ++tile) {
      const int64_t first = tile * kTile;
      run_simd<TileScores>(tensor, first, &buffer[0]);
      std::copy_n(buffer, std::min(kTile, tensor.numel - first), out + first);
    }
  });
  return scores;
}

at::Tensor d3_score_cpu(const at::Tensor& param, const at::Tensor& grad, double eps, double exp) {
  check_float_tensor("param", param);
  check_grad("grad", grad, param);
  return param.scalar_type() == at::kDouble ? score_tensor<double>(param, grad, eps, exp)
                                            : score_tensor<float>(param, grad, eps, exp);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("d3_score", &d3_score_cpu); }

}  // namespace id3::cpu
