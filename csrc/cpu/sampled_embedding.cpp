#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/convert.h"
#include "cpu/entries.h"

// The gradient of an embedding at active entries alone: sums of the gradients of the tokens of a row, added
// in the order of the tokens.
namespace id3::cpu {
namespace {

constexpr int64_t kGrain = 2048;  // entries per thread below which starting a thread costs more

// The tokens by their id, and those of one id in their order.
class TokensById {
 public:
  TokensById(const int64_t* ids, int64_t tokens) {
    keys_.reserve(tokens);
    for (int64_t t = 0; t < tokens; ++t)
      if (ids[t] >= 0 && ids[t] <= std::numeric_limits<int32_t>::max()) keys_.push_back(ids[t] << 32 | t);
    std::sort(keys_.begin(), keys_.end());
  }

  // visit(token) for the tokens of `id`.
  template <class Visit>
  void of(int64_t id, const Visit& visit) const {
    auto key = std::lower_bound(keys_.begin(), keys_.end(), id << 32);
    for (; key != keys_.end() && *key >> 32 == id; ++key) visit(*key & 0xffffffff);
  }

 private:
  std::vector<int64_t> keys_;  // id << 32 | token
};

// The sums of the entries at the positions first .. last.
template <class From, class Value>
void add_rows(const at::Tensor& grad, const TokensById& tokens, const int32_t* indices, int64_t first,
              int64_t last, Value* values, bool add) {
  const auto* grads = static_cast<const From*>(grad.const_data_ptr());
  const int64_t columns = grad.size(1), stride = grad.stride(0), step = grad.stride(1);
  std::vector<Value> sums;
  for (int64_t end; first < last; first = end) {
    const int64_t row = indices[first] / columns, begin = row * columns;
    for (end = first + 1; end < last && static_cast<uint32_t>(indices[end] - begin) < columns;) ++end;
    sums.assign(end - first, Value(0));
    tokens.of(row, [&](int64_t token) {
      const From* from = grads + token * stride;
      for (int64_t e = first; e < end; ++e) sums[e - first] += widen(from[(indices[e] - begin) * step]);
    });
    for (int64_t e = first; e < end; ++e) values[e] = add ? values[e] + sums[e - first] : sums[e - first];
  }
}

template <class Value>
void embedding_grad(const at::Tensor& grad, const at::Tensor& ids, const RunsView& entries,
                    const at::Tensor& values, bool add) {
  check_vector("values", values, at::CppTypeToScalarType<Value>::value, entries.end());
  auto* out = values.template mutable_data_ptr<Value>();
  const TokensById tokens(ids.const_data_ptr<int64_t>(), ids.numel());
  visit_dtype<Value>(grad.scalar_type(), [&](auto stored) {
    at::parallel_for(0, entries.length(), kGrain, [&](int64_t begin, int64_t end) {
      entries.for_each_segment(begin, end, [&](int64_t, int64_t first, int64_t last) {
        const int64_t most = grad.size(1) == 0 ? 0 : std::numeric_limits<int32_t>::max();
        check_index_range(entries.indices + first, last - first, most, 0);
        add_rows<decltype(stored)>(grad, tokens, entries.indices, first, last, out, add);
      });
    });
  });
}

void sampled_embedding_grad_cpu(const at::Tensor& grad, const at::Tensor& ids, const at::Tensor& offsets,
                                const at::Tensor& indices, const at::Tensor& values, bool add) {
  check_float_tensor("grad", grad);
  TORCH_CHECK_VALUE(grad.dim() == 2, "grad: expected a matrix, got shape ", shape_text(grad.sizes()));
  check_vector("ids", ids, at::kLong, grad.size(0));
  TORCH_CHECK_VALUE(ids.numel() == grad.size(0), "ids: expected ", grad.size(0), " ids, got ", ids.numel());
  const RunsView entries = view_runs("", offsets, indices, 1);
  grad.scalar_type() == at::kDouble ? embedding_grad<double>(grad, ids, entries, values, add)
                                    : embedding_grad<float>(grad, ids, entries, values, add);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("sampled_embedding_grad_", &sampled_embedding_grad_cpu); }

}  // namespace id3::cpu
