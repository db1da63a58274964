#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
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

constexpr int64_t kMostRuns = 8;  // as many cursors stand in the loops over active entries

// An active set: runs of entries, each in order, of which no two hold the same entry. What lies in `indices`
// between them is no entry.
//
// Threads share the set by the entries of the longest run: [begin, end) of them stand for all entries of all
// runs from the first of them on, up to that at `end`.
class RunsView {
 public:
  RunsView(const int32_t* indices, int64_t tensors, std::vector<EntriesView> runs)
      : indices(indices), tensors(tensors), runs(std::move(runs)) {
    for (const EntriesView& run : this->runs)
      if (run.end() - run.begin() > length()) longest_ = &run - this->runs.data();
  }

  const int32_t* indices;
  int64_t tensors;
  std::vector<EntriesView> runs;

  // How many entries the longest run has.
  int64_t length() const { return runs.empty() ? 0 : runs[longest_].end() - runs[longest_].begin(); }

  // How many entries of all runs stand before the entry `at` of the longest one; at its length all.
  int64_t before(int64_t at) const {
    int64_t count = 0;
    for (const EntriesView& run : runs) count += place(run, at) - run.begin();
    return count;
  }

  int64_t count() const { return before(length()); }

  // How far the runs reach: what `indices` and the arrays beside it must hold.
  int64_t end() const {
    int64_t end = 0;
    for (const EntriesView& run : runs) end = std::max(end, run.end());
    return end;
  }

  // visit(tensor, first, last) for stretches of positions that lie in one tensor: all entries of the share
  // [begin, end). Neighbours of different runs are visited soon after one another, so that the second finds
  // the pages and cache lines of the first.
  template <class Visit>
  void for_each_segment(int64_t begin, int64_t end, const Visit& visit) const {
    if (begin >= end) return;
    const EntriesView& longest = runs[longest_];
    if (runs.size() == 1)
      return longest.for_each_segment(longest.begin() + begin, longest.begin() + end, visit);
    int64_t next[kMostRuns], stop[kMostRuns];
    for (size_t run = 0; run < runs.size(); ++run) {
      next[run] = place(runs[run], begin);
      stop[run] = place(runs[run], end);
    }
    const int64_t first = begin == 0 ? 0 : tensor_at(begin);
    const int64_t last = end == length() ? tensors - 1 : tensor_at(end);
    for (int64_t j = first; j <= last; ++j) visit_tensor(j, next, stop, visit);
  }

 private:
  // Entries of one run that are visited before those of the next: some hundred KiB apart.
  static constexpr int64_t kTogether = 2048;

  int64_t tensor_at(int64_t at) const {
    const EntriesView& run = runs[longest_];
    return std::upper_bound(run.offsets, run.offsets + tensors + 1, run.begin() + at) - run.offsets - 1;
  }

  // Where in `run` the share that begins with the entry `at` of the longest run begins.
  int64_t place(const EntriesView& run, int64_t at) const {
    if (at <= 0) return run.begin();
    if (at >= length()) return run.end();
    const EntriesView& longest = runs[longest_];
    if (&run == &longest) return run.begin() + at;
    const int64_t j = tensor_at(at);
    return lower_bound(run.offsets[j], run.offsets[j + 1], indices[longest.begin() + at]);
  }

  int64_t lower_bound(int64_t first, int64_t last, int32_t index) const {
    return std::lower_bound(indices + first, indices + last, index) - indices;
  }

  // What tensor j has of the positions next .. stop of each run; moves `next` behind it.
  template <class Visit>
  void visit_tensor(int64_t j, int64_t* next, const int64_t* stop, const Visit& visit) const {
    const int64_t end = std::min(stop[longest_], runs[longest_].offsets[j + 1]);
    bool more = true;
    while (more) {
      const int64_t last = std::min(next[longest_] + kTogether, end);
      more = last < end;
      for (size_t run = 0; run < runs.size(); ++run) {
        int64_t to = std::min(stop[run], runs[run].offsets[j + 1]);
        if (more)
          to = static_cast<int64_t>(run) == longest_ ? last : lower_bound(next[run], to, indices[last]);
        if (next[run] < to) visit(j, next[run], to);
        next[run] = std::max(next[run], to);
      }
    }
  }

  int64_t longest_ = 0;
};

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
  std::vector<EntriesView> runs;
  if (offsets.dim() != 2) {
    runs.push_back(view_entries(name, offsets, indices, tensors));
  } else {
    TORCH_CHECK_VALUE(offsets.size(0) <= kMostRuns, name, "offsets: expected at most ", kMostRuns,
                      " runs, got ", offsets.size(0));
    check_vector(std::string(name) + "indices", indices, at::kInt, 0);
    for (int64_t run = 0; run < offsets.size(0); ++run)
      runs.push_back(view_entries(name, offsets.select(0, run), indices, tensors));
  }
  return RunsView(indices.const_data_ptr<int32_t>(), tensors, std::move(runs));
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
