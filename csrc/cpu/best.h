#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "formulas/order.h"

namespace id3::cpu {

template <class Value>
struct Found {
  Key<Value> key;
  int32_t index;
  Value grad;
};

// Best first.
template <class Value>
bool precedes(const Found<Value>& a, const Found<Value>& b) {
  return a.key != b.key ? a.key > b.key : a.index < b.index;
}

template <class Value>
bool lower_index(const Found<Value>& a, const Found<Value>& b) {
  return a.index < b.index;
}

// The best k entries of all tensors so far, best first. Slots after the last entry are empty and have score
// 0; slots beyond k stay empty.
template <class Value>
struct Best {
  Value* score;
  int64_t* place;  // tensor position << 32 | flat index
  Value* grad;
  int64_t k, room;

  // Empties the slots beyond k, which a call with a larger k has filled.
  void drop_behind() {
    for (int64_t i = k; i < room && place[i] != -1; ++i) put(i, 0, -1, 0);
  }

  int64_t held() const {
    return std::partition_point(score, score + k, [](Value s) { return s > Value(0); }) - score;
  }

  Key<Value> key(int64_t i) const { return reinterpret_bits<Key<Value>>(score[i]); }

  // The smallest key with which an entry from the place `first` on still becomes a candidate: ties go to the
  // lowest place.
  Key<Value> floor(int64_t first) const {
    if (k == 0 || !(score[k - 1] > Value(0))) return 1;
    return key(k - 1) + (place[k - 1] < first ? 1 : 0);
  }

  // An entry that is a candidate already keeps the larger score, and of equal scores the older. Leaves in
  // `found`, whose indices count from the place `first`, the entries that are no candidates yet, in index
  // order.
  void drop_repeated(int64_t first, std::vector<Found<Value>>& found) {
    std::sort(found.begin(), found.end(), lower_index<Value>);
    int64_t kept = 0;
    const int64_t count = held();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = place[i] - first;
      if (index >= 0 && index <= std::numeric_limits<int32_t>::max()) {
        const Found<Value> same{0, static_cast<int32_t>(index), 0};
        const auto at = std::lower_bound(found.begin(), found.end(), same, lower_index<Value>);
        if (at != found.end() && at->index == same.index) {
          if (at->key > key(i)) continue;
          at->key = 0;
        }
      }
      put(kept++, score[i], place[i], grad[i]);
    }
    for (int64_t i = kept; i < count; ++i) put(i, 0, -1, 0);
    found.erase(std::remove_if(found.begin(), found.end(), [](const auto& f) { return f.key == 0; }),
                found.end());
  }

  // Merges `found`, best first, in place and from the back.
  void merge(int64_t first, const std::vector<Found<Value>>& found) {
    int64_t i = held() - 1, j = static_cast<int64_t>(found.size()) - 1;
    for (int64_t out = i + j + 1; j >= 0; --out) {
      const int64_t here = first + found[j].index;
      const bool held_is_worse = i >= 0 && (key(i) != found[j].key ? key(i) < found[j].key : place[i] > here);
      if (out < k) {
        if (held_is_worse)
          put(out, score[i], place[i], grad[i]);
        else
          put(out, score_of<Value>(found[j].key), here, found[j].grad);
      }
      held_is_worse ? --i : --j;
    }
  }

 private:
  void put(int64_t at, Value new_score, int64_t new_place, Value new_grad) {
    score[at] = new_score, place[at] = new_place, grad[at] = new_grad;
  }
};

}  // namespace id3::cpu
