#pragma once

#include <cmath>
#include <cstdint>

#include "formulas/host_device.h"

namespace id3 {

// The numbers that all entries of an AdamW call share: computed in double, rounded once to Value.
template <class Value>
struct AdamWScalars {
  Value grad_scale = 1, clip = 1, sign = 1;  // sign is -1 to maximize
  Value decay;                               // 1 - lr * weight_decay
  Value one_minus_beta1, beta2, one_minus_beta2, eps;
};

template <class Value>
ID3_HOST_DEVICE Value decay_of(double lr, double weight_decay) {
  return static_cast<Value>(1.0 - lr * weight_decay);
}

template <class Value = float>
AdamWScalars<Value> adamw_scalars(double lr, double beta1, double beta2, double eps, double weight_decay,
                                  bool maximize) {
  AdamWScalars<Value> s;
  s.sign = maximize ? Value(-1) : Value(1);
  s.decay = decay_of<Value>(lr, weight_decay);
  s.one_minus_beta1 = static_cast<Value>(1.0 - beta1);
  s.beta2 = static_cast<Value>(beta2);
  s.one_minus_beta2 = static_cast<Value>(1.0 - beta2);
  s.eps = static_cast<Value>(eps);
  return s;
}

// The bias corrections of step s (the first is 1).
template <class Value>
struct BiasCorrection {
  Value step_size;  // lr / (1 - beta1^s)
  Value root;       // sqrt(1 - beta2^s)
};

template <class Value>
ID3_HOST_DEVICE BiasCorrection<Value> bias_correction(double lr, double beta1, double beta2, int64_t step) {
  const double s = static_cast<double>(step);
  return {static_cast<Value>(lr / (1.0 - std::pow(beta1, s))),
          static_cast<Value>(std::sqrt(1.0 - std::pow(beta2, s)))};
}

// torch.optim.AdamW for one entry: torch's order of operations, each rounded once.
template <class Value>
ID3_HOST_DEVICE void adamw_entry(Value grad, Value& weight, Value& exp_avg, Value& exp_avg_sq,
                                 Value step_size, Value bias_root, const AdamWScalars<Value>& s) {
  const Value g = grad / s.grad_scale * s.clip * s.sign;
  const Value m = exp_avg + (g - exp_avg) * s.one_minus_beta1;
  const Value v = exp_avg_sq * s.beta2 + (s.one_minus_beta2 * g) * g;
  const Value denominator = std::sqrt(v) / bias_root + s.eps;
  weight = weight * s.decay - (step_size * m) / denominator;
  exp_avg = m;
  exp_avg_sq = v;
}

}  // namespace id3
