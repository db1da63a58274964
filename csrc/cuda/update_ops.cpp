#include <torch/library.h>

#include <map>
#include <mutex>

#include "cuda/torch_tensors.h"
#include "cuda/update.h"

namespace id3::cuda {
namespace {

// The tables of bias correction come from the host's pow, as on every other backend.
struct DeviceBias {
  at::Tensor unbiased, root;
  int64_t longest;
};

// The step from which 1 - beta^s is 1 in float64.
int64_t last_biased_step(double beta) {
  constexpr int64_t kMost = int64_t{1} << 22;  // 48 MiB of tables; beta up to 0.99999
  return beta == 0 ? 1
                   : std::min(kMost, static_cast<int64_t>(std::ceil(-54 * std::log(2.0) / std::log(beta))));
}

// A copy of host memory that is there for every stream once this returns: it waits, so it is for what is made
// once and kept.
at::Tensor uploaded(const at::Tensor& host, const at::Tensor& like) { return host.to(like.device()); }

DeviceBias bias_tables(double beta1, double beta2, const at::Tensor& like) {
  const int64_t longest = std::max(last_biased_step(beta1), last_biased_step(beta2));
  const at::Tensor unbiased = at::ones({longest + 1}, at::kDouble),
                   root = at::ones({longest + 1}, at::kFloat);
  for (int64_t s = 1; s <= longest; ++s) {
    unbiased.mutable_data_ptr<double>()[s] = 1.0 - std::pow(beta1, static_cast<double>(s));
    root.mutable_data_ptr<float>()[s] =
        static_cast<float>(std::sqrt(1.0 - std::pow(beta2, static_cast<double>(s))));
  }
  return {uploaded(unbiased, like), uploaded(root, like), longest};
}

DeviceBias bias_for(double beta1, double beta2, const at::Tensor& like) {
  static std::mutex mutex;
  static auto& kept = *new std::map<std::tuple<double, double, c10::DeviceIndex>, DeviceBias>();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key{beta1, beta2, like.device().index()};
  const auto found = kept.find(key);
  return found != kept.end() ? found->second
                             : kept.emplace(key, bias_tables(beta1, beta2, like)).first->second;
}

void adamw_with(at::TensorList params, const OptionalTensors& grads, const OptionalTensor& values,
                const at::Tensor& offsets, const at::Tensor& indices, const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq, const OptionalTensor& master, const OptionalTensor& age,
                const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, const OptionalTensor& clip,
                const OptionalTensor& tensor_lr) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor rows = stored(rows_of(params, grads, offsets), offsets);
  const DeviceBias bias = bias_for(beta1, beta2, offsets);
  std::vector<at::Tensor> alive;
  const auto number = [&](const OptionalTensor& t) -> Number {
    if (!t) return {};
    check_row_major(*t, offsets);
    const bool is_double = t->scalar_type() == at::kDouble;
    alive.push_back(is_double ? *t : t->toType(at::kFloat));
    return {alive.back().const_data_ptr(), is_double};
  };
  check_row_major(step, offsets);
  Update update{};
  update.rows = data<TensorRow>(rows);
  update.entries = view_runs(offsets, indices);
  if (values) {
    check_row_major(*values, offsets);
    update.values = values->const_data_ptr();
    update.values_dtype = dtype_of(*values);
  }
  update.exp_avg = exp_avg.mutable_data_ptr<float>();
  update.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  update.master = master ? master->mutable_data_ptr<float>() : nullptr;
  update.age = age ? age->mutable_data_ptr<int32_t>() : nullptr;
  update.step = step.const_data_ptr<int64_t>();
  update.bias = {bias.unbiased.const_data_ptr<double>(), bias.root.const_data_ptr<float>(), bias.longest};
  update.lr = lr;
  update.weight_decay = weight_decay;
  update.scalars = adamw_scalars(lr, beta1, beta2, eps, weight_decay, maximize);
  update.grad_scale = number(grad_scale);
  update.found_inf = number(found_inf);
  update.clip = number(clip);
  update.tensor_lr = number(tensor_lr);
  adamw(update, indices.numel(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void adamw_op(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
              const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
              const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step, double lr,
              double beta1, double beta2, double eps, double weight_decay, bool maximize,
              const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& clip,
              const OptionalTensor& tensor_lr) {
  adamw_with(params, grads, std::nullopt, offsets, indices, exp_avg, exp_avg_sq, master, age, step, lr, beta1,
             beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr);
}

void adamw_compact_op(at::TensorList params, const at::Tensor& values, const at::Tensor& offsets,
                      const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                      const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step,
                      double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                      const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                      const OptionalTensor& clip, const OptionalTensor& tensor_lr) {
  adamw_with(params, OptionalTensors(), values, offsets, indices, exp_avg, exp_avg_sq, master, age, step, lr,
             beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip, tensor_lr);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("adamw_", &adamw_op);
  m.impl("adamw_compact_", &adamw_compact_op);
}

}  // namespace id3::cuda
