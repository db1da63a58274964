#include "cpu/entries.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "checks.h"
#include "cpu/join.h"
#include "cpu/strided.h"

namespace id3::cpu {
namespace {

constexpr int64_t kGrain = 4096;  // entries per thread below which starting a thread costs more

// One walk through two ascending lists of a tensor. Writes the union from `out` on and where the entries of
// both stand in it, or nothing where `out` is null. Returns the size of the union.
struct Merge {
  int32_t* indices = nullptr;
  int64_t *pos_a = nullptr, *pos_b = nullptr;

  int64_t run(const EntriesView& a, const EntriesView& b, int64_t j, int64_t begin) const {
    int64_t i = a.offsets[j], k = b.offsets[j], out = begin;
    const int64_t a_end = a.offsets[j + 1], b_end = b.offsets[j + 1];
    for (; i < a_end || k < b_end; ++out) {
      const bool from_a = k == b_end || (i < a_end && a.indices[i] <= b.indices[k]);
      const bool from_b = i == a_end || (k < b_end && b.indices[k] <= a.indices[i]);
      if (indices) {
        indices[out] = from_a ? a.indices[i] : b.indices[k];
        if (from_a) pos_a[i] = out;
        if (from_b) pos_b[k] = out;
      }
      i += from_a, k += from_b;
    }
    return out - begin;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> union_cpu(const at::Tensor& a_offsets,
                                                                     const at::Tensor& a_indices,
                                                                     const at::Tensor& b_offsets,
                                                                     const at::Tensor& b_indices) {
  const int64_t tensors = std::max<int64_t>(a_offsets.numel() - 1, 0);
  const EntriesView a = view_all_entries("a_", a_offsets, a_indices, tensors),
                    b = view_all_entries("b_", b_offsets, b_indices, tensors);
  const at::Tensor offsets = at::zeros({tensors + 1}, at::kLong),
                   indices = at::empty({a_indices.numel() + b_indices.numel()}, at::kInt),
                   pos_a = at::empty({a_indices.numel()}, at::kLong),
                   pos_b = at::empty({b_indices.numel()}, at::kLong);
  auto* offset = offsets.mutable_data_ptr<int64_t>();
  at::parallel_for(0, tensors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) offset[j + 1] = Merge().run(a, b, j, 0);
  });
  std::partial_sum(offset, offset + tensors + 1, offset);
  const Merge write{indices.mutable_data_ptr<int32_t>(), pos_a.mutable_data_ptr<int64_t>(),
                    pos_b.mutable_data_ptr<int64_t>()};
  at::parallel_for(0, tensors, 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) write.run(a, b, j, offset[j]);
  });
  return {offsets, indices, pos_a, pos_b};
}

// For each added entry the place at which it comes to lie among all.
std::vector<int64_t> joined_positions(const EntriesView& held, const EntriesView& added) {
  std::vector<int64_t> positions(added.end());
  int64_t place = 0;  // never falls, even if the entries were not ascending: what follows relies on it
  for (int64_t j = 0; j < held.tensors; ++j) {
    place = std::max(place, held.offsets[j]);
    for (int64_t i = added.offsets[j]; i < added.offsets[j + 1]; ++i) {
      const int32_t* end = held.indices + held.offsets[j + 1];
      place = std::lower_bound(held.indices + place, end, added.indices[i]) - held.indices;
      positions[i] = place + i;
    }
  }
  return positions;
}

void join_cpu(at::TensorList arrays, const at::Tensor& offsets, const at::Tensor& b_offsets,
              const at::Tensor& b_indices, const OptionalTensors& b_values) {
  TORCH_CHECK_VALUE(!arrays.empty(), "arrays: expected the indices first, got none");
  TORCH_CHECK_VALUE(b_values.size() == arrays.size() - 1, "b_values: expected ", arrays.size() - 1, ", got ",
                    b_values.size());
  const int64_t tensors = std::max<int64_t>(offsets.numel() - 1, 0);
  const EntriesView held = view_all_entries("", offsets, arrays[0], tensors),
                    added = view_all_entries("b_", b_offsets, b_indices, tensors);
  std::vector<Gapped> gapped;
  for (size_t a = 0; a < arrays.size(); ++a) {
    const at::Tensor& array = arrays[a];
    const auto dtype = array.scalar_type();
    check_vector(item_name("arrays", a), array, dtype, held.end() + added.end());
    check_element_size("arrays", array);
    const std::optional<at::Tensor> fill = a == 0 ? b_indices : b_values.get(a - 1);
    if (fill && a > 0) check_vector(item_name("b_values", a - 1), *fill, dtype, added.end());
    gapped.push_back({static_cast<char*>(array.mutable_data_ptr()),
                      fill ? static_cast<const char*>(fill->const_data_ptr()) : nullptr,
                      static_cast<int64_t>(array.element_size())});
  }
  const std::vector<int64_t> positions = joined_positions(held, added);
  Gaps(positions.data(), added.end(), held.end()).open(gapped);
  auto* offset = offsets.mutable_data_ptr<int64_t>();
  for (int64_t j = 0; j <= tensors; ++j) offset[j] += added.offsets[j];
}

// visit(first, count, places) for all entries of the tensors in blocks; places is where they lie.
template <class Visit>
void for_each_block(at::TensorList tensors, const EntriesView& entries, const Visit& visit) {
  at::parallel_for(0, entries.end(), kGrain, [&](int64_t begin, int64_t end) {
    entries.for_each_segment(begin, end, [&](int64_t j, int64_t first, int64_t last) {
      const Strided tensor(tensors[j]);
      for (; first < last; first += kBlock) {
        const int64_t count = std::min(kBlock, last - first);
        check_index_range(entries.indices + first, count, tensor.numel, j);
        with_places(tensor, entries.indices + first, count,
                    [&](const auto* places) { visit(tensor, first, count, places); });
      }
    });
  });
}

void check_one_dtype(at::TensorList tensors) {
  if (!tensors.empty()) check_element_size("tensors", tensors[0]);
  for (size_t j = 0; j < tensors.size(); ++j) {
    check_on_cpu(item_name("tensors", j), tensors[j]);
    TORCH_CHECK_VALUE(tensors[j].scalar_type() == tensors[0].scalar_type(), item_name("tensors", j),
                      ": expected ", tensors[0].scalar_type(), " as tensors[0], got ",
                      tensors[j].scalar_type());
  }
}

at::Tensor gather_cpu(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices) {
  check_one_dtype(tensors);
  const EntriesView entries = view_all_entries("", offsets, indices, tensors.size());
  if (tensors.empty()) return at::empty({indices.numel()}, at::kFloat);
  const at::Tensor out = at::empty({indices.numel()}, tensors[0].scalar_type());
  visit_bits(out.element_size(), [&](auto bits) {
    using T = decltype(bits);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    for_each_block(tensors, entries,
                   [&](const Strided& tensor, int64_t first, int64_t count, const auto* places) {
                     const T* from = static_cast<const T*>(tensor.data);
                     for (int64_t i = 0; i < count; ++i) to[first + i] = from[places[i]];
                   });
  });
  return out;
}

void scatter_cpu(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices,
                 const at::Tensor& values) {
  check_one_dtype(tensors);
  const EntriesView entries = view_all_entries("", offsets, indices, tensors.size());
  if (tensors.empty()) return;
  check_vector("values", values, tensors[0].scalar_type(), entries.end());
  visit_bits(values.element_size(), [&](auto bits) {
    using T = decltype(bits);
    const T* from = static_cast<const T*>(values.const_data_ptr());
    for_each_block(tensors, entries,
                   [&](const Strided& tensor, int64_t first, int64_t count, const auto* places) {
                     T* to = static_cast<T*>(const_cast<void*>(tensor.data));
                     for (int64_t i = 0; i < count; ++i) to[places[i]] = from[first + i];
                   });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) {
  m.impl("union", &union_cpu);
  m.impl("join_", &join_cpu);
  m.impl("gather", &gather_cpu);
  m.impl("scatter_", &scatter_cpu);
}

}  // namespace id3::cpu
