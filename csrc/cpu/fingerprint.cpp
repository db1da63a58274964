#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "checks.h"
#include "cpu/entries.h"

namespace id3::cpu {
namespace {

constexpr int64_t kGrain = 16384;   // entries per thread below which starting a thread costs more
constexpr int64_t kTogether = 512;  // entries whose hashed places lie in the first cache meanwhile

// splitmix64 (Steele, Lea, Flood 2014); the same as id3_kernels/hashing.py.
constexpr uint64_t kIncrement = 0x9E3779B97F4A7C15;

uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// Bits is signed, so that a value of 2 or 4 bytes is sign-extended.
template <class Bits>
uint64_t sum_of_hashes(const uint64_t* places, const void* values, int64_t first, int64_t count) {
  const Bits* bits = static_cast<const Bits*>(values) + first;
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += mix64(places[i] ^ static_cast<uint64_t>(int64_t{bits[i]}));
  return sum;
}

uint64_t sum_of_hashes(int64_t size, const uint64_t* places, const void* values, int64_t first,
                       int64_t count) {
  if (size == 2) return sum_of_hashes<int16_t>(places, values, first, count);
  if (size == 4) return sum_of_hashes<int32_t>(places, values, first, count);
  return sum_of_hashes<int64_t>(places, values, first, count);
}

at::Tensor fingerprint_cpu(at::TensorList values, const at::Tensor& keys, const at::Tensor& offsets,
                           const at::Tensor& indices) {
  const int64_t tensors = std::max<int64_t>(offsets.numel() - 1, 0);
  const EntriesView entries = view_all_entries("", offsets, indices, tensors);
  check_vector("keys", keys, at::kLong, tensors);
  for (size_t i = 0; i < values.size(); ++i) {
    check_vector(item_name("values", i), values[i], values[i].scalar_type(), entries.end());
    const int64_t size = values[i].element_size();
    TORCH_CHECK_VALUE(size > 1 && size <= 8, item_name("values", i), ": expected 2, 4 or 8 bytes, got ",
                      values[i].scalar_type());
  }
  std::vector<std::atomic<uint64_t>> totals(values.size());  // modulo 2^64 the order of a sum is no matter
  const int64_t* key = keys.const_data_ptr<int64_t>();
  at::parallel_for(0, entries.end(), kGrain, [&](int64_t begin, int64_t end) {
    uint64_t places[kTogether];
    entries.for_each_segment(begin, end, [&](int64_t j, int64_t first, int64_t last) {
      for (; first < last; first += kTogether) {
        const int64_t count = std::min(kTogether, last - first);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t index = entries.indices[first + i];
          places[i] = mix64(static_cast<uint64_t>(key[j]) + static_cast<uint64_t>(index) * kIncrement);
        }
        for (size_t v = 0; v < values.size(); ++v)
          totals[v] +=
              sum_of_hashes(values[v].element_size(), places, values[v].const_data_ptr(), first, count);
      }
    });
  });
  const at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  for (size_t v = 0; v < values.size(); ++v)
    out.mutable_data_ptr<int64_t>()[v] = static_cast<int64_t>(totals[v].load());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("fingerprint", &fingerprint_cpu); }

}  // namespace id3::cpu
