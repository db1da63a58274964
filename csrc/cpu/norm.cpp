#include "formulas/norm.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/convert.h"
#include "cpu/cut.h"
#include "cpu/entries.h"
#include "cpu/simd.h"
#include "cpu/strided.h"

namespace id3::cpu {
namespace {

constexpr int64_t kGrain = 4096;  // entries per thread below which starting a thread costs more

// Both in an order that the compiler chooses: sums of integers do not depend on it.
struct Largest {
  template <class Value>
  ID3_INLINE static void run(const Value* values, int64_t count, Key<Value>& largest) {
    Key<Value> key = largest;
    for (int64_t i = 0; i < count; ++i) key = std::max(key, magnitude_bits(values[i]));
    largest = key;
  }
};

struct AddSquares {
  template <class Value>
  ID3_INLINE static void run(const Value* values, int64_t count, double inverse, SquareSum& sum) {
    int64_t high = 0, low = 0;
    for (int64_t i = 0; i < count; ++i) add_square(values[i], inverse, high, low);
    sum.high += high, sum.low += low;
  }
};

// visit(T()) for the type of a stored tensor; float64 is stored where Value is double alone.
template <class Value, class Visit>
void visit_stored(c10::ScalarType dtype, const Visit& visit) {
  if constexpr (sizeof(Value) == sizeof(double))
    if (dtype == at::kDouble) return visit(double());
  visit_dtype<float>(dtype, visit);
}

// Reads every entry once, as most of them are a cache miss: the values go to a buffer, which is read again.
template <class Value>
class SquaredNorm {
 public:
  SquaredNorm(const OptionalTensors& tensors, const RunsView& entries)
      : tensors_(tensors),
        entries_(entries),
        parts_(entries.length(), kGrain),
        buffer_(at::empty({entries.count()}, at::CppTypeToScalarType<Value>::value)),
        values_(buffer_.template mutable_data_ptr<Value>()) {}

  double sum() const {
    const Key<Value> largest = gather();
    if (largest >= FloatBits<Value>::kInfinity)
      return largest == FloatBits<Value>::kInfinity ? std::numeric_limits<double>::infinity()
                                                    : std::numeric_limits<double>::quiet_NaN();
    const double scale = norm_scale(reinterpret_bits<Value>(largest));
    std::vector<SquareSum> sums(parts_.count);
    parts_.run([&](int64_t part) {
      const int64_t begin = entries_.before(parts_.begin(part));
      const int64_t count = entries_.before(parts_.begin(part + 1)) - begin;
      run_simd<AddSquares>(values_ + begin, count, 1 / scale, sums[part]);
    });
    SquareSum total;
    for (const SquareSum& sum : sums) total.high += sum.high, total.low += sum.low;
    return norm_total(total.high, total.low, scale);
  }

 private:
  // Fills the buffer. The bits of the largest |g|.
  Key<Value> gather() const {
    std::vector<Key<Value>> largest(parts_.count);
    parts_.run([&](int64_t part) {
      Value* out = values_ + entries_.before(parts_.begin(part));
      const auto segment = [&](int64_t j, int64_t first, int64_t last) {
        largest[part] = std::max(largest[part], gather(j, first, last, out));
        out += last - first;
      };
      entries_.for_each_segment(parts_.begin(part), parts_.begin(part + 1), segment);
    });
    return *std::max_element(largest.begin(), largest.end());
  }

  // The values of one tensor's entries at the positions first .. last; zeros where there is no tensor.
  Key<Value> gather(int64_t j, int64_t first, int64_t last, Value* out) const {
    const std::optional<at::Tensor> given = tensors_.get(j);
    if (!given) {
      std::fill_n(out, last - first, Value(0));
      return 0;
    }
    const Strided tensor(*given);
    Key<Value> largest = 0;
    visit_stored<Value>(tensor.dtype, [&](auto stored) {
      const auto* from = static_cast<const decltype(stored)*>(tensor.data);
      for (; first < last; first += kBlock, out += kBlock) {
        const int32_t* indices = entries_.indices + first;
        const int64_t count = std::min(kBlock, last - first);
        check_index_range(indices, count, tensor.numel, j);
        with_places(tensor, indices, count, [&](const auto* places) {
          for (int64_t i = 0; i < count; ++i) out[i] = widen(from[places[i]]);
        });
        run_simd<Largest>(out, count, largest);
      }
    });
    return largest;
  }

  const OptionalTensors& tensors_;
  const RunsView& entries_;
  Parts parts_;
  at::Tensor buffer_;
  Value* values_;
};

at::Tensor squared_norm_cpu(const OptionalTensors& tensors, const at::Tensor& offsets,
                            const at::Tensor& indices) {
  const RunsView entries = view_runs("", offsets, indices, tensors.size());
  bool has_double = false;
  for (size_t j = 0; j < tensors.size(); ++j) {
    const std::optional<at::Tensor> tensor = tensors.get(j);
    if (!tensor) continue;
    check_float_tensor(item_name("tensors", j), *tensor);
    has_double |= tensor->scalar_type() == at::kDouble;
  }
  const double sum =
      has_double ? SquaredNorm<double>(tensors, entries).sum() : SquaredNorm<float>(tensors, entries).sum();
  return at::scalar_tensor(sum, at::kDouble);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("squared_norm", &squared_norm_cpu); }

}  // namespace id3::cpu
