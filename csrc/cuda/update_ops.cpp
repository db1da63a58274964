#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <torch/library.h>

#include <algorithm>
#include <list>
#include <mutex>

#include "cuda/torch_tensors.h"
#include "cuda/update.h"

namespace id3::cuda {
namespace {

// The step from which 1 - beta^s is 1 in float64.
int64_t last_biased_step(double beta) {
  constexpr int64_t kMost = int64_t{1} << 22;  // 32 MiB, or 16 of float; beta up to 0.99999
  return beta == 0 ? 1
                   : std::min(kMost, static_cast<int64_t>(std::ceil(-54 * std::log(2.0) / std::log(beta))));
}

// A copy of host memory that is there for every stream once this returns: it waits, so it is for what is made
// once and kept.
at::Tensor uploaded(const at::Tensor& host, const at::Tensor& like) { return host.to(like.device()); }

// The tables that were used last, of one kind. They come from the host's pow, as on every other backend. One
// for each beta: OneCycleLR moves the first at every step, whose table is short. A table that a CUDA graph
// was captured with is never dropped, since each replay reads it.
template <class Value>
class RecentTables {
 public:
  explicit RecentTables(Value (*of_power)(double)) : of_power_(of_power) {}

  at::Tensor of(double beta, const at::Tensor& like) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = std::find_if(made_.begin(), made_.end(), [&](const Made& made) {
      return made.beta == beta && made.table.device() == like.device();
    });
    if (found == made_.end())
      made_.push_front({beta, uploaded(table(beta), like), false});
    else
      made_.splice(made_.begin(), made_, found);
    Made& newest = made_.front();
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None)
      newest.in_graph = true;
    else  // another stream than that of the upload may use it
      newest.table.record_stream(c10::cuda::getCurrentCUDAStream().unwrap());
    const at::Tensor result = newest.table;
    if (made_.size() > kKept) drop_one();
    return result;
  }

 private:
  struct Made {
    double beta;
    at::Tensor table;
    bool in_graph;
  };
  static constexpr size_t kKept = 8;

  at::Tensor table(double beta) const {
    const int64_t longest = last_biased_step(beta);
    const at::Tensor out = at::ones({longest + 1}, at::CppTypeToScalarType<Value>::value);
    for (int64_t s = 1; s <= longest; ++s)
      out.mutable_data_ptr<Value>()[s] = of_power_(std::pow(beta, static_cast<double>(s)));
    return out;
  }

  void drop_one() {
    const auto oldest = std::find_if(made_.rbegin(), made_.rend(), [](const Made& m) { return !m.in_graph; });
    if (oldest != made_.rend()) made_.erase(std::prev(oldest.base()));
  }

  Value (*of_power_)(double);
  std::mutex mutex_;
  std::list<Made> made_;
};

template <class Value>
BiasTable<Value> view(const at::Tensor& table) {
  return {table.const_data_ptr<Value>(), table.numel() - 1};
}

// Never destroyed: at exit the device may be gone before them.
RecentTables<double>& unbiased_tables() {
  static auto& tables = *new RecentTables<double>([](double power) { return 1.0 - power; });
  return tables;
}
RecentTables<float>& root_tables() {
  static auto& tables =
      *new RecentTables<float>([](double power) { return static_cast<float>(std::sqrt(1.0 - power)); });
  return tables;
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
  const at::Tensor unbiased = unbiased_tables().of(beta1, offsets), root = root_tables().of(beta2, offsets);
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
  update.bias = {view<double>(unbiased), view<float>(root)};
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
