#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace id3::cpu {

// Work is cut into contiguous parts, one per thread, and results are combined in the order of the parts, so
// they are the same for every number of threads.
struct Parts {
  int64_t items, count;

  Parts(int64_t items, int64_t grain)
      : items(items),
        count(std::clamp<int64_t>((items + grain - 1) / grain, 1, std::max(1, at::get_num_threads()))) {}

  int64_t begin(int64_t part) const { return items * part / count; }

  template <class Work>
  void run(const Work& work) const {
    at::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t part = first; part < last; ++part) work(part);
    });
  }
};

// The k largest keys: all above the threshold, and the first of those equal to it.
template <class Key>
struct Cut {
  struct Part {
    int64_t begin;  // how many keys the lower parts take
    int64_t ties;   // how many keys equal to the threshold this part takes
  };
  Key threshold;
  int64_t total;  // k, or the number of keys from the floor on if that is less
  std::vector<Part> parts;

  bool takes(Key key, int64_t& ties) const { return key > threshold || (key == threshold && ties-- > 0); }
};

// The cut that takes every key from the floor on; each part has counts[part] of them.
template <class Key>
Cut<Key> take_all(Key floor, const std::vector<int64_t>& counts) {
  Cut<Key> cut{floor - 1, 0, {}};
  for (const int64_t count : counts) {
    cut.parts.push_back({cut.total, 0});
    cut.total += count;
  }
  return cut;
}

// Radix selection from the highest digit down. The keys need not be stored: for_each_block(part, visit) calls
// visit(const Key*, count) for all keys of the part in order, once per digit. Keys below `floor` (at least 1)
// are skipped.
template <class Key, class ForEachBlock>
Cut<Key> cut_at(int64_t k, Key floor, const Parts& parts, const ForEachBlock& for_each_block) {
  constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;
  std::vector<int64_t> histograms(parts.count * kBins), above(parts.count), equal(parts.count);
  Key prefix = 0;                   // the threshold's digits known so far
  int64_t missing = k;              // how many of the k share that prefix
  int known = 8 * sizeof(Key) - 1;  // lowest known bit; keys are not negative
  while (known > 0) {
    const int shift = std::max(0, known - kDigitBits);
    const Key mask = (Key(1) << (known - shift)) - 1;
    std::fill(histograms.begin(), histograms.end(), 0);
    parts.run([&](int64_t part) {
      int64_t* bins = histograms.data() + part * kBins;
      for_each_block(part, [&](const Key* keys, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          if (keys[i] >= floor && keys[i] >> known == prefix) ++bins[keys[i] >> shift & mask];
      });
    });
    Key bin = mask;
    for (;; --bin) {
      if (bin < 0) return take_all(floor, above);
      int64_t here = 0;
      for (int64_t part = 0; part < parts.count; ++part) here += equal[part] = histograms[part * kBins + bin];
      if (here >= missing) break;
      missing -= here;
      for (int64_t part = 0; part < parts.count; ++part) above[part] += equal[part];
    }
    prefix = prefix << (known - shift) | bin;
    known = shift;
  }
  Cut<Key> cut{prefix, k, {}};
  int64_t begin = 0;
  for (int64_t part = 0; part < parts.count; ++part) {
    const int64_t ties = std::min(missing, equal[part]);
    cut.parts.push_back({begin, ties});
    begin += above[part] + ties;
    missing -= ties;
  }
  return cut;
}

}  // namespace id3::cpu
