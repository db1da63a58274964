#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

// Checks that guard memory when an op is called directly. The public Python functions check their arguments
// in full.
namespace id3 {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

inline std::string shape_text(c10::IntArrayRef sizes) {
  std::string text = "(";
  for (size_t d = 0; d < sizes.size(); ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string item_name(const char* list, int64_t j) {
  return std::string(list) + "[" + std::to_string(j) + "]";
}

inline void check_on_cpu(const std::string& name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.device().is_cpu() && t.layout() == c10::kStrided, name,
                    ": expected a dense tensor on cpu, got ", t.layout(), " on ", t.device());
}

inline void check_float_tensor(const std::string& name, const at::Tensor& t) {
  check_on_cpu(name, t);
  const auto dtype = t.scalar_type();
  TORCH_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble, name,
      ": expected float32, bfloat16, float16 or float64, got ", dtype);
  TORCH_CHECK_VALUE(t.numel() <= std::numeric_limits<int32_t>::max(), name,
                    ": expected fewer than 2^31 entries, got ", t.numel());
}

inline void check_params(at::TensorList params) {
  for (size_t j = 0; j < params.size(); ++j) {
    check_float_tensor(item_name("params", j), params[j]);
    TORCH_CHECK_VALUE((params[j].scalar_type() == at::kDouble) == (params[0].scalar_type() == at::kDouble),
                      item_name("params", j), ": expected float64 in all params or in none, got ",
                      params[j].scalar_type(), " and ", params[0].scalar_type());
  }
}

inline void check_grad(const std::string& name, const at::Tensor& grad, const at::Tensor& param) {
  check_float_tensor(name, grad);
  TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), name, ": expected shape ", shape_text(param.sizes()),
                    ", got ", shape_text(grad.sizes()));
  TORCH_CHECK_VALUE(grad.scalar_type() == param.scalar_type() ||
                        (grad.scalar_type() == at::kFloat && param.scalar_type() != at::kDouble),
                    name, ": expected ", param.scalar_type(), " as its parameter, got ", grad.scalar_type());
}

inline void check_grads(const OptionalTensors& grads, at::TensorList params) {
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads: expected ", params.size(), " gradients, got ",
                    grads.size());
  for (size_t j = 0; j < params.size(); ++j) {
    const std::optional<at::Tensor> grad = grads.get(j);
    if (grad) check_grad(item_name("grads", j), *grad, params[j]);
  }
}

// A contiguous vector on the CPU of at least `length` elements.
inline void check_vector(const std::string& name, const at::Tensor& t, at::ScalarType dtype, int64_t length) {
  check_on_cpu(name, t);
  TORCH_CHECK_VALUE(t.scalar_type() == dtype && t.dim() == 1 && t.is_contiguous() && t.numel() >= length,
                    name, ": expected a contiguous vector of ", length, " ", dtype, ", got ", t.scalar_type(),
                    " ", shape_text(t.sizes()));
}

inline void check_one_element(const std::string& name, const at::Tensor& t) {
  check_on_cpu(name, t);
  TORCH_CHECK_VALUE(t.numel() == 1, name, ": expected one element, got ", shape_text(t.sizes()));
}

// The number of wanted entries: k, clamped to 0 … capacity.
inline int64_t wanted(const at::Tensor& k, int64_t capacity) {
  check_one_element("k", k);
  TORCH_CHECK_VALUE(k.scalar_type() == at::kLong, "k: expected int64, got ", k.scalar_type());
  TORCH_CHECK_VALUE(capacity >= 0, "capacity: expected at least 0, got ", capacity);
  return std::clamp<int64_t>(*k.const_data_ptr<int64_t>(), 0, capacity);
}

}  // namespace id3
