#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/cut.h"

namespace id3::cpu {

inline void check_element_size(const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.element_size() <= 8, name, ": elements of ", t.element_size(),
                    " bytes are not supported");
}

// visit(T()) for an unsigned integer of so many bytes: elements are moved as bits.
template <class Visit>
void visit_bits(int64_t size, const Visit& visit) {
  if (size == 1) return visit(uint8_t());
  if (size == 2) return visit(uint16_t());
  if (size == 4) return visit(uint32_t());
  visit(uint64_t());
}

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
    const char* saved = saved_[part].data();
    for (const Gapped& array : arrays) {
      visit_bits(array.size, [&](auto bits) {
        using T = decltype(bits);
        move(part, reinterpret_cast<T*>(array.data), reinterpret_cast<const T*>(array.fill), saved);
      });
      saved += saved_count(part) * array.size;
    }
  }

  template <class T>
  void move(int64_t part, T* data, const T* fill, const char* saved) {
    const int64_t begin = parts_.begin(part), end = parts_.begin(part + 1), count = saved_count(part);
    const int64_t first = first_gap(part), last = first_gap(part + 1);
    // Moves the entries [from, to) up by `shift`.
    const auto shift_up = [&](int64_t from, int64_t to, int64_t shift) {
      const int64_t middle = std::clamp(begin + count, from, to);
      std::memmove(data + middle + shift, data + middle, (to - middle) * sizeof(T));
      if (from < middle)
        std::memcpy(data + from + shift, saved + (from - begin) * sizeof(T), (middle - from) * sizeof(T));
    };
    int64_t to = end;
    for (int64_t gap = last - 1; gap >= first; --gap) {
      const int64_t from = before(gap);
      shift_up(from, to, gap + 1);
      data[positions_[gap]] = fill ? fill[gap] : T(0);
      to = from;
    }
    shift_up(begin, to, first);
  }

  const int64_t* positions_;
  int64_t gaps_;
  Parts parts_;
  std::vector<std::vector<char>> saved_;
};

}  // namespace id3::cpu
