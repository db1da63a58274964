#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

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

// An active set: runs of entries, each in order, of which no two hold the same entry. What lies in `indices`
// between them is no entry.
struct RunsView {
  const int32_t* indices;
  int64_t tensors;
  std::vector<EntriesView> runs;

  int64_t count() const {
    int64_t count = 0;
    for (const EntriesView& run : runs) count += run.end() - run.begin();
    return count;
  }

  // How far the runs reach: what `indices` and the arrays beside it must hold.
  int64_t end() const {
    int64_t end = 0;
    for (const EntriesView& run : runs) end = std::max(end, run.end());
    return end;
  }

  // visit(tensor, first, last) for stretches of positions that lie in one tensor: those of the entries
  // [begin, end), counted through all runs.
  template <class Visit>
  void for_each_segment(int64_t begin, int64_t end, const Visit& visit) const {
    int64_t before = 0;
    for (const EntriesView& run : runs) {
      const int64_t shift = run.begin() - before, stop = before + run.end() - run.begin();
      const int64_t first = std::max(begin, before), last = std::min(end, stop);
      if (first < last) run.for_each_segment(first + shift, last + shift, visit);
      before = stop;
    }
  }
};

constexpr int64_t kMostRuns = 8;  // as many cursors stand in the loops that leave out active entries

// The active entries of one tensor: [begin(run), end(run)) for each run.
struct ActiveEntries {
  const EntriesView* runs = nullptr;
  int64_t count = 0;
  int64_t tensor = 0;

  const int32_t* begin(int64_t run) const { return runs[run].indices + runs[run].offsets[tensor]; }
  const int32_t* end(int64_t run) const { return runs[run].indices + runs[run].offsets[tensor + 1]; }
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

// offsets: [tensors + 1], one run, or [runs, tensors + 1], whose rows may lie apart.
inline RunsView view_runs(const char* name, const at::Tensor& offsets, const at::Tensor& indices,
                          int64_t tensors) {
  RunsView view{nullptr, tensors, {}};
  if (offsets.dim() != 2) {
    view.runs.push_back(view_entries(name, offsets, indices, tensors));
  } else {
    TORCH_CHECK_VALUE(offsets.size(0) <= kMostRuns, name, "offsets: expected at most ", kMostRuns,
                      " runs, got ", offsets.size(0));
    check_vector(std::string(name) + "indices", indices, at::kInt, 0);
    for (int64_t run = 0; run < offsets.size(0); ++run)
      view.runs.push_back(view_entries(name, offsets.select(0, run), indices, tensors));
  }
  view.indices = indices.const_data_ptr<int32_t>();
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
