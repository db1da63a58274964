#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "checks.h"

namespace id3::cpu {

// A set of entries in M tensors: tensor j owns indices[offsets[j] .. offsets[j + 1]), flat and ascending.
// What lies in `indices` before offsets[0] belongs to other tensors.
struct EntriesView {
  const int64_t* offsets;
  const int32_t* indices;
  int64_t tensors;

  int64_t begin() const { return offsets[0]; }
  int64_t end() const { return offsets[tensors]; }

  // visit(tensor, first, last) for the stretches of the positions [begin, end) that lie in one tensor.
  template <class Visit>
  void for_each_segment(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t j = std::upper_bound(offsets, offsets + tensors + 1, begin) - offsets - 1;
    for (; begin < end; ++j) {
      const int64_t stop = std::min(end, offsets[j + 1]);
      if (begin < stop) visit(j, begin, stop);
      begin = std::max(begin, stop);
    }
  }
};

inline EntriesView view_entries(const char* name, const at::Tensor& offsets, const at::Tensor& indices,
                                int64_t tensors) {
  const std::string prefix(name);
  check_vector(prefix + "offsets", offsets, at::kLong, tensors + 1);
  TORCH_CHECK_VALUE(offsets.numel() == tensors + 1, prefix, "offsets: expected ", tensors + 1,
                    " offsets, got ", offsets.numel());
  const EntriesView view{offsets.const_data_ptr<int64_t>(), indices.const_data_ptr<int32_t>(), tensors};
  TORCH_CHECK_VALUE(view.begin() >= 0 && std::is_sorted(view.offsets, view.offsets + tensors + 1), prefix,
                    "offsets: expected at least 0 and no decrease");
  check_vector(prefix + "indices", indices, at::kInt, view.end());
  return view;
}

// Entries of which none belongs to other tensors.
inline EntriesView view_all_entries(const char* name, const at::Tensor& offsets, const at::Tensor& indices,
                                    int64_t tensors) {
  const EntriesView view = view_entries(name, offsets, indices, tensors);
  TORCH_CHECK_VALUE(view.begin() == 0, name, "offsets: expected 0 first, got ", view.begin());
  return view;
}

// Entries come from files and from callers: no index may reach outside its tensor.
inline void check_index_range(const int32_t* indices, int64_t count, int64_t numel, int64_t tensor) {
  const uint32_t last = static_cast<uint32_t>(numel) - 1;  // numel < 2^31
  uint32_t outside = numel == 0 ? ~0u : 0;                 // its sign bit
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t index = static_cast<uint32_t>(indices[i]);
    outside |= index | (last - index);
  }
  TORCH_CHECK_VALUE(count == 0 || static_cast<int32_t>(outside) >= 0, "indices: expected 0 to ", numel - 1,
                    " in tensor ", tensor, ", got an index outside");
}

}  // namespace id3::cpu
