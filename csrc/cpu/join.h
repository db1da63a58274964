#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <vector>

#include "cpu/cut.h"

namespace id3::cpu {

// An array and what to put into its gaps, one element each; null: zeros.
struct Gapped {
  char* data;
  const char* fill;
  int64_t size;  // of an element, in bytes
};

// Opens and fills gaps in arrays, in place and in parallel. `held` entries are in each array; gap i goes
// before the entry that stood at place before(i) = positions[i] - i, and so comes to lie at positions[i].
//
// A part owns the entries of a range and moves them from its back to its front. The part before it writes
// over the first few of them (as many as there are gaps before the range), so each part saves those first.
class Gaps {
 public:
  Gaps(const int64_t* positions, int64_t gaps, int64_t held)
      : positions_(positions), gaps_(gaps), parts_(held, kGrain), saved_(parts_.count) {}

  void open(const std::vector<Gapped>& arrays) {
    if (gaps_ == 0) return;
    parts_.run([&](int64_t part) { save(part, arrays); });
    parts_.run([&](int64_t part) { move(part, arrays); });
  }

 private:
  static constexpr int64_t kGrain = 1 << 15;

  int64_t before(int64_t gap) const { return positions_[gap] - gap; }

  // How many gaps lie before the part's range; the last range ends with the last gap.
  int64_t first_gap(int64_t part) const {
    if (part == parts_.count) return gaps_;
    int64_t low = 0, high = gaps_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before(middle) < parts_.begin(part))
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

  int64_t saved_count(int64_t part) const {
    return std::min(first_gap(part), parts_.begin(part + 1) - parts_.begin(part));
  }

  void save(int64_t part, const std::vector<Gapped>& arrays) {
    const int64_t count = saved_count(part);
    for (const auto& [data, fill, size] : arrays) {
      const char* from = data + parts_.begin(part) * size;
      saved_[part].insert(saved_[part].end(), from, from + count * size);
    }
  }

  void move(int64_t part, const std::vector<Gapped>& arrays) {
    const int64_t begin = parts_.begin(part), end = parts_.begin(part + 1), count = saved_count(part);
    const int64_t first = first_gap(part), last = first_gap(part + 1);
    const char* saved = saved_[part].data();
    for (const Gapped& array : arrays) {
      char* const data = array.data;
      const int64_t size = array.size;
      // Moves the entries [from, to) up by `shift`.
      const auto shift_up = [&](int64_t from, int64_t to, int64_t shift) {
        const int64_t middle = std::clamp(begin + count, from, to);
        std::memmove(data + (middle + shift) * size, data + middle * size, (to - middle) * size);
        std::memcpy(data + (from + shift) * size, saved + (from - begin) * size, (middle - from) * size);
      };
      int64_t to = end;
      for (int64_t gap = last - 1; gap >= first; --gap) {
        const int64_t from = before(gap);
        shift_up(from, to, gap + 1);
        if (array.fill)
          std::memcpy(data + positions_[gap] * size, array.fill + gap * size, size);
        else
          std::memset(data + positions_[gap] * size, 0, size);
        to = from;
      }
      shift_up(begin, to, first);
      saved += count * size;
    }
  }

  const int64_t* positions_;
  int64_t gaps_;
  Parts parts_;
  std::vector<std::vector<char>> saved_;
};

}  // namespace id3::cpu
