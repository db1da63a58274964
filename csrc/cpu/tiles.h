#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/convert.h"
#include "cpu/entries.h"
#include "cpu/simd.h"
#include "cpu/strided.h"
#include "formulas/order.h"
#include "formulas/score.h"

namespace id3::cpu {

// A tile is 256 neighbouring entries of one tensor; the last of a tensor may be shorter. Its values pass
// through buffers that stay in the first-level cache, always 256 long, so that each loop has a constant count
// and there is one loop per widening and per formula, not one per pair of them.
constexpr int64_t kTile = 256;

template <class Value>
struct ScoreRule {
  Exponent exponent;
  Value eps;
  double exp;
  bool given = false;  // the gradients already hold the scores
};

// One tensor and what its scores are made of. `param` may be empty where the rule does not read it.
template <class Value>
struct ScoredTensor {
  Strided param, grad;
  ScoreRule<Value> rule;
  int64_t numel = 0;
  ActiveEntries active;  // entries that cannot be selected
};

template <class T, class Value>
ID3_INLINE void widen_tile(const Strided& t, int64_t first, int64_t count, Value* out) {
  alignas(64) T copy[kTile];
  const T* from = static_cast<const T*>(t.data) + first;
  if (!t.contiguous || count < kTile) {
    t.read(first, count, copy);
    std::fill(copy + count, copy + kTile, T(0));
    from = copy;
  }
  for (int64_t i = 0; i < kTile; ++i) out[i] = widen(from[i]);
}

// The tile's values in the arithmetic's type, zeros behind its end: where they lie, or in `buffer`.
template <class Value>
ID3_INLINE const Value* tile_values(const Strided& t, int64_t first, int64_t count, Value* buffer) {
  if constexpr (sizeof(Value) == sizeof(float)) {
    if (t.dtype == c10::ScalarType::BFloat16) {
      widen_tile<c10::BFloat16>(t, first, count, buffer);
      return buffer;
    }
    if (t.dtype == c10::ScalarType::Half) {
      widen_tile<c10::Half>(t, first, count, buffer);
      return buffer;
    }
  }
  if (t.contiguous && count == kTile) return static_cast<const Value*>(t.data) + first;
  widen_tile<Value>(t, first, count, buffer);
  return buffer;
}

// Prefetches what lies some way ahead. The processor's own prefetcher stops at each page; that shows where
// one stream is read (a third of the time of a pass with exp = 0), while with two streams it hides and the
// prefetch costs.
ID3_INLINE void prefetch_ahead(const Strided& t, int64_t first) {
  constexpr int64_t kAhead = 4096, kLine = 64;  // bytes
  if (!t.contiguous) return;
  const int64_t size = static_cast<int64_t>(c10::elementSize(t.dtype));
  const auto from = reinterpret_cast<uintptr_t>(t.data) + first * size + kAhead;
  for (int64_t byte = 0; byte < kTile * size; byte += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte));
}

// What a tile's scores are wanted for: to be shown, or to be ordered.
enum class Form { shown, ordered };

template <Exponent E, Form F, class Value>
ID3_INLINE void score_loop(const ScoreRule<Value>& rule, const Value* param, const Value* grad,
                           Value* __restrict scores) {
  const Value eps = rule.eps;
  const double exp = rule.exp;
  for (int64_t i = 0; i < kTile; ++i) {
    if constexpr (F == Form::shown)
      scores[i] = d3<E>(param[i], grad[i], eps, exp);
    else
      scores[i] = d3_unflushed<E>(param[i], grad[i], eps, exp);
  }
}

// The scores of the tile of `t` that starts at entry `first`.
template <Form F, class Value>
ID3_INLINE void tile_scores(const ScoredTensor<Value>& t, int64_t first, Value* __restrict scores) {
  alignas(64) Value param_buffer[kTile], grad_buffer[kTile];
  const int64_t count = std::min(kTile, t.numel - first);
  const Value* grad = tile_values(t.grad, first, count, grad_buffer);
  const ScoreRule<Value>& rule = t.rule;
  if (rule.given) {
    for (int64_t i = 0; i < kTile; ++i) scores[i] = grad[i];
    return;
  }
  if (rule.exponent == Exponent::zero) return score_loop<Exponent::zero, F>(rule, grad, grad, scores);
  const Value* param = tile_values(t.param, first, count, param_buffer);
  switch (rule.exponent) {
    case Exponent::half:
      return score_loop<Exponent::half, F>(rule, param, grad, scores);
    case Exponent::one:
      return score_loop<Exponent::one, F>(rule, param, grad, scores);
    case Exponent::two:
      return score_loop<Exponent::two, F>(rule, param, grad, scores);
    case Exponent::minus_half:
      return score_loop<Exponent::minus_half, F>(rule, param, grad, scores);
    case Exponent::minus_one:
      return score_loop<Exponent::minus_one, F>(rule, param, grad, scores);
    case Exponent::minus_two:
      return score_loop<Exponent::minus_two, F>(rule, param, grad, scores);
    default:
      return score_loop<Exponent::general, F>(rule, param, grad, scores);
  }
}

inline const int32_t* first_active(const ActiveEntries& active, int64_t run, int64_t first) {
  return std::lower_bound(active.begin(run), active.end(run), first);
}

// Per run of the active entries: the next of them.
struct ActiveCursors {
  const int32_t *next[kMostRuns], *end[kMostRuns];
  int64_t count;

  ActiveCursors(const ActiveEntries& active, int64_t first) : count(active.count) {
    for (int64_t run = 0; run < count; ++run) {
      next[run] = first_active(active, run, first);
      end[run] = active.end(run);
    }
  }
};

// Stores 0 for the active among the `count` entries from `first` on. The cursors stand at the first of them
// and are moved behind the last.
template <class Value>
ID3_INLINE void exclude_active(ActiveCursors& active, int64_t first, int64_t count, Value* scores) {
  for (int64_t run = 0; run < active.count; ++run) {
    const int32_t *next = active.next[run], *end = active.end[run];
    for (; next < end && *next < first + count; ++next) {
      const uint64_t i = static_cast<uint64_t>(*next - first);
      if (i < static_cast<uint64_t>(count)) scores[i] = 0;  // indices out of order must not write elsewhere
    }
    active.next[run] = next;
  }
}

struct TileScores {
  template <class Value>
  ID3_INLINE static void run(const ScoredTensor<Value>& t, int64_t first, Value* scores) {
    tile_scores<Form::shown>(t, first, scores);
  }
};

// The tile's sortable keys, 0 for active entries.
struct TileKeys {
  template <class Value>
  ID3_INLINE static void run(const ScoredTensor<Value>& t, int64_t first, Key<Value>* keys) {
    alignas(64) Value scores[kTile];
    ActiveCursors active(t.active, first);
    tile_scores<Form::ordered>(t, first, scores);
    exclude_active(active, first, kTile, scores);
    for (int64_t i = 0; i < kTile; ++i) keys[i] = key_of(scores[i]);
  }
};

// The largest key of each of `count` tiles from entry `first` on.
struct TileMaxima {
  template <class Value>
  ID3_INLINE static void run(const ScoredTensor<Value>& t, int64_t first, int64_t count, Key<Value>* maxima) {
    // A few tiles at a time: the loop over active entries costs a mispredicted branch at its end, and a
    // vector load of a zero just stored stalls.
    constexpr int64_t kTogether = 4;
    alignas(64) Value scores[kTogether * kTile];
    ActiveCursors active(t.active, first);
    const bool reads_param = !t.rule.given && t.rule.exponent != Exponent::zero;
    for (int64_t tile = 0; tile < count; tile += kTogether, first += kTogether * kTile) {
      const int64_t together = std::min(kTogether, count - tile);
      for (int64_t i = 0; i < together; ++i) {
        if (!reads_param) prefetch_ahead(t.grad, first + i * kTile);
        tile_scores<Form::ordered>(t, first + i * kTile, scores + i * kTile);
      }
      exclude_active(active, first, together * kTile, scores);
      for (int64_t i = 0; i < together; ++i) maxima[tile + i] = largest_key(scores + i * kTile);
    }
  }

 private:
  // The key of the largest bit pattern, and only if that is infinite or NaN the largest of all keys.
  template <class Value>
  ID3_INLINE static Key<Value> largest_key(const Value* scores) {
    Key<Value> largest = 0;
    for (int64_t i = 0; i < kTile; ++i) largest = std::max(largest, reinterpret_bits<Key<Value>>(scores[i]));
    if (largest < FloatBits<Value>::kInfinity) return key_of(reinterpret_bits<Value>(largest));
    largest = 0;
    for (int64_t i = 0; i < kTile; ++i) largest = std::max(largest, key_of(scores[i]));
    return largest;
  }
};

}  // namespace id3::cpu
