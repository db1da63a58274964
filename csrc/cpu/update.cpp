#include "formulas/update.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cpu/convert.h"
#include "cpu/entries.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace id3::cpu {
namespace {

constexpr int64_t kGrain = 2048;       // entries per thread below which starting a thread costs more
constexpr int64_t kAhead = 64;         // entries between the prefetch of one and its use
constexpr int64_t kLongestAge = 4096;  // ages whose bias corrections are tabulated

using OptionalTensor = std::optional<at::Tensor>;

// The arguments that adamw_ and adamw_compact_ share.
struct Arguments {
  at::TensorList params;
  const at::Tensor &offsets, &indices, &exp_avg, &exp_avg_sq;
  const OptionalTensor &master, &age;
  const at::Tensor& step;
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  const OptionalTensor &grad_scale, &found_inf, &clip;
};

// The learning rate: `tensor` in place of `number`, where there is one.
double learning_rate(double number, const OptionalTensor& tensor) {
  if (!tensor) return number;
  check_float_tensor("lr", *tensor);
  check_one_element("lr", *tensor);
  return tensor->item<double>();
}

// `count` entries from the block's buffers; the moments where they lie.
struct UpdateBlock {
  template <class Value>
  ID3_INLINE static void run(const AdamWScalars<Value>& scalars, int64_t count, const Value* __restrict grad,
                             Value* __restrict weight, Value* __restrict exp_avg,
                             Value* __restrict exp_avg_sq, const Value* __restrict step_size,
                             const Value* __restrict bias_root) {
    const AdamWScalars<Value> s = scalars;
    for (int64_t i = 0; i < count; ++i)
      adamw_entry(grad[i], weight[i], exp_avg[i], exp_avg_sq[i], step_size[i], bias_root[i], s);
  }
};

// weight, the widened parameter, becomes its master where the parameter still is the master's rounding.
template <class T>
struct ResumeMasters {
  ID3_INLINE static void run(int64_t count, const float* __restrict master, float* __restrict weight) {
    for (int64_t i = 0; i < count; ++i) {
      const float stored = weight[i], rounded = widen(round_to<T>(master[i]));
      const bool same = (rounded == stored) | ((rounded != rounded) & (stored != stored));
      weight[i] = same ? master[i] : stored;
    }
  }
};

template <class Value>
class Update {
 public:
  explicit Update(const Arguments& a)
      : a_(a), entries_(view_runs("", a.offsets, a.indices, a.params.size())) {
    const int64_t n = entries_.end();
    const auto dtype = at::CppTypeToScalarType<Value>::value;
    check_vector("exp_avg", a.exp_avg, dtype, n);
    check_vector("exp_avg_sq", a.exp_avg_sq, dtype, n);
    if (a.master) check_vector("master", *a.master, dtype, n);
    if (a.age) check_vector("age", *a.age, at::kInt, n);
    check_vector("step", a.step, at::kLong, entries_.tensors);
    exp_avg_ = a.exp_avg.template mutable_data_ptr<Value>();
    exp_avg_sq_ = a.exp_avg_sq.template mutable_data_ptr<Value>();
    if (a.master) master_ = a.master->template mutable_data_ptr<Value>();
    if (a.age) age_ = a.age->template mutable_data_ptr<int32_t>();
    step_ = a.step.template const_data_ptr<int64_t>();
    scalars_ = adamw_scalars<Value>(a.lr, a.beta1, a.beta2, a.eps, a.weight_decay, a.maximize);
    scalars_.grad_scale = scalar(a.grad_scale);
    scalars_.clip = scalar(a.clip);
    tabulate_ages();
  }

  // gradient(tensor) gives where the tensor's gradient lies: at the entries' indices, or, if `gathered`, at
  // their positions. Nothing: the tensor has none.
  template <class Gradient>
  void run(bool gathered, const Gradient& gradient) const {
    at::parallel_for(0, entries_.length(), kGrain, [&](int64_t begin, int64_t end) {
      entries_.for_each_segment(begin, end, [&](int64_t j, int64_t first, int64_t last) {
        const std::optional<Strided> grad = gradient(j);
        if (grad) update_segment(*grad, gathered, j, first, last);
      });
    });
  }

  const RunsView& entries() const { return entries_; }

 private:
  void update_segment(const Strided& grad, bool gathered, int64_t j, int64_t first, int64_t last) const {
    const Strided param(a_.params[j]);
    alignas(64) Value step_size[kBlock], bias_root[kBlock], values[kBlock];
    const auto shared = correction(step_[j]);
    std::fill_n(step_size, kBlock, shared.step_size);
    std::fill_n(bias_root, kBlock, shared.root);
    for (; first < last; first += kBlock) {
      const int64_t count = std::min(kBlock, last - first);
      check_index_range(entries_.indices + first, count, param.numel, j);
      load_gradient(grad, gathered, param, first, last, values);
      if (age_) advance_ages(first, count, step_size, bias_root);
      update_block(param, first, count, values, step_size, bias_root);
    }
  }

  // The gradient of a block, widened; meanwhile prefetches the gradients and the parameters some way ahead,
  // most of which are a cache and a page miss.
  void load_gradient(const Strided& grad, bool gathered, const Strided& param, int64_t first, int64_t last,
                     Value* out) const {
    const int32_t* indices = entries_.indices + first;
    const int64_t count = std::min(kBlock, last - first), end = last - first - 1;
    const Prefetch fetch_param(param), fetch_grad(grad);
    visit_dtype<Value>(grad.dtype, [&](auto stored) {
      const auto* values = static_cast<const decltype(stored)*>(grad.data);
      if (gathered) {
        for (int64_t i = 0; i < count; ++i) {
          fetch_param(indices[std::min(i + kAhead, end)]);
          out[i] = widen(values[first + i]);
        }
      } else {
        with_places(grad, indices, count, [&](const auto* places) {
          for (int64_t i = 0; i < count; ++i) {
            const int32_t next = indices[std::min(i + kAhead, end)];
            fetch_grad(next);
            fetch_param(next);
            out[i] = widen(values[places[i]]);
          }
        });
      }
    });
  }

  static Value scalar(const OptionalTensor& t) {
    return t ? static_cast<Value>(t->item<double>()) : Value(1);
  }

  BiasCorrection<Value> correction(int64_t step) const {
    return bias_correction<Value>(a_.lr, a_.beta1, a_.beta2, step);
  }

  void tabulate_ages() {
    if (!age_ || entries_.tensors == 0) return;
    const int64_t oldest = *std::max_element(step_, step_ + entries_.tensors);
    const int64_t length = std::min({oldest + 1, kLongestAge, entries_.count() / 4});
    for (int64_t age = 0; age < length; ++age) by_age_.push_back(correction(age));
  }

  void advance_ages(int64_t first, int64_t count, Value* step_size, Value* bias_root) const {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t age = ++age_[first + i];
      const bool known = age >= 0 && age < static_cast<int64_t>(by_age_.size());
      const BiasCorrection<Value> bias = known ? by_age_[age] : correction(age);
      step_size[i] = bias.step_size;
      bias_root[i] = bias.root;
    }
  }

  void update_block(const Strided& param, int64_t first, int64_t count, const Value* grad,
                    const Value* step_size, const Value* bias_root) const {
    const int32_t* indices = entries_.indices + first;
    alignas(64) Value weight[kBlock];
    visit_dtype<Value>(param.dtype, [&](auto stored) {
      using T = decltype(stored);
      constexpr bool kLow = sizeof(T) < sizeof(Value);
      T* values = static_cast<T*>(const_cast<void*>(param.data));
      with_places(param, indices, count, [&](const auto* places) {
        for (int64_t i = 0; i < count; ++i) weight[i] = widen(values[places[i]]);
        if constexpr (kLow)
          if (master_) run_simd<ResumeMasters<T>>(count, master_ + first, weight);
        run_simd<UpdateBlock>(scalars_, count, grad, weight, exp_avg_ + first, exp_avg_sq_ + first, step_size,
                              bias_root);
        for (int64_t i = 0; i < count; ++i) values[places[i]] = round_to<T>(weight[i]);
      });
      if (kLow && master_) std::copy_n(weight, count, master_ + first);
    });
  }

  const Arguments& a_;
  RunsView entries_;
  AdamWScalars<Value> scalars_;
  Value *exp_avg_, *exp_avg_sq_, *master_ = nullptr;
  int32_t* age_ = nullptr;
  const int64_t* step_;
  std::vector<BiasCorrection<Value>> by_age_;
};

bool overflowed(const Arguments& a) { return a.found_inf && a.found_inf->item<double>() != 0; }

bool is_double(const Arguments& a) { return !a.params.empty() && a.params[0].scalar_type() == at::kDouble; }

template <class Value>
void update_from_grads(const Arguments& a, const OptionalTensors& grads) {
  Update<Value>(a).run(false, [&](int64_t j) -> std::optional<Strided> {
    const OptionalTensor grad = grads.get(j);
    if (!grad) return std::nullopt;
    return Strided(*grad);
  });
}

template <class Value>
void update_from_values(const Arguments& a, const at::Tensor& values) {
  const Update<Value> update(a);
  check_vector("values", values, values.scalar_type(), update.entries().end());
  update.run(true, [&](int64_t) { return std::optional<Strided>(values); });
}

void adamw_cpu(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
               const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
               const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step, double lr,
               double beta1, double beta2, double eps, double weight_decay, bool maximize,
               const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& clip,
               const OptionalTensor& tensor_lr) {
  const Arguments a{params,       offsets,    indices,
                    exp_avg,      exp_avg_sq, master,
                    age,          step,       learning_rate(lr, tensor_lr),
                    beta1,        beta2,      eps,
                    weight_decay, maximize,   grad_scale,
                    found_inf,    clip};
  if (overflowed(a)) return;
  check_params(params);
  check_grads(grads, params);
  is_double(a) ? update_from_grads<double>(a, grads) : update_from_grads<float>(a, grads);
}

void adamw_compact_cpu(at::TensorList params, const at::Tensor& values, const at::Tensor& offsets,
                       const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                       const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step,
                       double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                       const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                       const OptionalTensor& clip, const OptionalTensor& tensor_lr) {
  const Arguments a{params,       offsets,    indices,
                    exp_avg,      exp_avg_sq, master,
                    age,          step,       learning_rate(lr, tensor_lr),
                    beta1,        beta2,      eps,
                    weight_decay, maximize,   grad_scale,
                    found_inf,    clip};
  if (overflowed(a)) return;
  check_params(params);
  check_float_tensor("values", values);
  TORCH_CHECK_VALUE((values.scalar_type() == at::kDouble) == is_double(a),
                    "values: float64 goes with float64 ", "parameters, got ", values.scalar_type());
  is_double(a) ? update_from_values<double>(a, values) : update_from_values<float>(a, values);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) {
  m.impl("adamw_", &adamw_cpu);
  m.impl("adamw_compact_", &adamw_compact_cpu);
}

}  // namespace id3::cpu
