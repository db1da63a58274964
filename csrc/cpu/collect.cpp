#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/best.h"
#include "cpu/cut.h"
#include "cpu/entries.h"
#include "cpu/estimate.h"
#include "cpu/simd.h"
#include "cpu/strided.h"
#include "cpu/tiles.h"

// What is kept of one tensor's gradient before it goes: the values at active entries, and the best entries
// outside them among those of all tensors seen so far.

namespace id3::cpu {
namespace {

// Tiles, and entries, per thread below which starting a thread costs more: a backward pass has hundreds of
// these loops, and on a busy machine a thread starts late.
constexpr int64_t kTileGrain = 512;
constexpr int64_t kEntryGrain = 8192;
constexpr int64_t kTogether = 32;  // tiles between two looks at active entries: they stay in the cache

template <class Value>
class Collector {
 public:
  Collector(ScoredTensor<Value> scored, const RunsView& active, Strided grad, Value* values, bool add)
      : scored_(scored), magnitude_(scored), active_(active), grad_(grad), values_(values), add_(add) {
    bounded_ = !scored.rule.given && scored.rule.exp > 0;
    magnitude_.rule.exponent = Exponent::zero;
    magnitude_.active.count = 0;
  }

  void gather_all() const {
    at::parallel_for(0, active_.length(), kEntryGrain, [&](int64_t begin, int64_t end) {
      active_.for_each_segment(begin, end,
                               [&](int64_t, int64_t first, int64_t last) { gather(first, last); });
    });
  }

  // The k best entries from `floor` on, in no order; gathers on its way.
  std::vector<Found<Value>> best(int64_t k, Key<Value> floor) const {
    const Parts parts((scored_.numel + kTile - 1) / kTile, kTileGrain);
    std::vector<std::vector<Found<Value>>> found(parts.count);
    parts.run([&](int64_t part) { stream(parts.begin(part), parts.begin(part + 1), k, floor, found[part]); });
    for (int64_t part = 1; part < parts.count; ++part)
      found[0].insert(found[0].end(), found[part].begin(), found[part].end());
    cut(k, found[0]);
    return std::move(found[0]);
  }

 private:
  void stream(int64_t tile, int64_t end, int64_t k, Key<Value> floor,
              std::vector<Found<Value>>& found) const {
    Key<Value> maxima[kTogether];
    const size_t capacity = k + std::max<int64_t>(k / 2, 1024);
    bool by_gradient = bounded_;
    int64_t from[kMostRuns];
    for (int64_t run = 0; run < scored_.active.count; ++run) from[run] = active_from(run, tile * kTile);
    for (; tile < end; tile += kTogether) {
      const int64_t together = std::min(kTogether, end - tile);
      by_gradient = mark(tile, together, floor, by_gradient && floor > 1, maxima);
      for (int64_t i = 0; i < together; ++i) {
        if (maxima[i] < floor) continue;
        look((tile + i) * kTile, floor, found);
        if (found.size() <= capacity) continue;
        cut(k, found);
        // What comes later stands at higher indices and loses every tie.
        floor = std::max_element(found.begin(), found.end(), precedes<Value>)->key + 1;
      }
      for (int64_t run = 0; run < scored_.active.count; ++run) {
        const int64_t to = active_from(run, (tile + together) * kTile);
        gather(from[run], to);
        from[run] = to;
      }
    }
  }

  // maxima: for each tile a number that none of its keys exceeds, below the floor where none reaches it. With
  // `by_gradient` that is seen from |g| alone: no score is above that of the same |g| at a weight of zero,
  // and rounding keeps the order. Returns whether to go on like that, which pays where few tiles are left.
  bool mark(int64_t tile, int64_t together, Key<Value> floor, bool by_gradient, Key<Value>* maxima) const {
    if (!by_gradient) {
      mark_by_score(tile, together, floor, maxima);
      return bounded_ && floor == 1;
    }
    run_simd<TileMaxima>(magnitude_, tile * kTile, together, maxima);
    int64_t left = 0;
    for (int64_t i = 0; i < together; ++i) {
      const bool below = at_zero_weight(score_of<Value>(maxima[i])) < score_of<Value>(floor);
      maxima[i] = below ? 0 : std::numeric_limits<Key<Value>>::max();
      left += !below;
    }
    return left <= together / 2;
  }

  void mark_by_score(int64_t tile, int64_t together, Key<Value> floor, Key<Value>* maxima) const {
    if constexpr (std::is_same_v<Value, float>) {
      if (can_estimate(scored_.rule)) {
        estimate_maxima(scored_, tile * kTile, together, maxima);
        // The floor's own logarithm is as rough as those of the scores.
        const float lowest = std::max(rough_log2(floor) - 2 * estimate_error(scored_.rule), kLowestEstimate);
        for (int64_t i = 0; i < together; ++i)
          maxima[i] = score_of<float>(maxima[i]) < lowest ? 0 : std::numeric_limits<Key<float>>::max();
        return;
      }
    }
    run_simd<TileMaxima>(scored_, tile * kTile, together, maxima);
  }

  Value at_zero_weight(Value grad) const {
    const ScoreRule<Value>& rule = scored_.rule;
    if (rule.exponent == Exponent::half) return d3_unflushed<Exponent::half>(Value(0), grad, rule.eps, 0);
    if (rule.exponent == Exponent::one) return d3_unflushed<Exponent::one>(Value(0), grad, rule.eps, 0);
    if (rule.exponent == Exponent::two) return d3_unflushed<Exponent::two>(Value(0), grad, rule.eps, 0);
    // The last bit of a power need not keep the order.
    constexpr Value kAbove = 1 + Value(0x1p-20);
    return kAbove * d3_unflushed<Exponent::general>(Value(0), grad, rule.eps, rule.exp);
  }

  // The position of the first active entry of a run from `index` on; behind the tensor's end that of the end.
  int64_t active_from(int64_t run, int64_t index) const {
    const ActiveEntries& active = scored_.active;
    const int32_t* at = index >= scored_.numel ? active.end(run) : first_active(active, run, index);
    return at - active_.indices;
  }

  void look(int64_t first, Key<Value> floor, std::vector<Found<Value>>& found) const {
    alignas(64) Key<Value> keys[kTile];
    run_simd<TileKeys>(scored_, first, &keys[0]);
    visit_dtype<Value>(grad_.dtype, [&](auto stored) {
      const auto* grads = static_cast<const decltype(stored)*>(grad_.data);
      for (int64_t i = 0; i < kTile; ++i) {
        if (keys[i] < floor) continue;
        const int64_t index = first + i;
        found.push_back({keys[i], static_cast<int32_t>(index), widen(grads[grad_.place(index)])});
      }
    });
  }

  static void cut(int64_t k, std::vector<Found<Value>>& found) {
    if (static_cast<int64_t>(found.size()) <= k) return;
    std::nth_element(found.begin(), found.begin() + k - 1, found.end(), precedes<Value>);
    found.resize(k);
  }

  // values = or += the gradient at the active entries at the positions first .. last.
  void gather(int64_t first, int64_t last) const {
    visit_dtype<Value>(grad_.dtype, [&](auto stored) {
      const auto* grads = static_cast<const decltype(stored)*>(grad_.data);
      for (; first < last; first += kBlock) {
        const int64_t count = std::min(kBlock, last - first);
        check_index_range(active_.indices + first, count, grad_.numel, 0);
        with_places(grad_, active_.indices + first, count, [&](const auto* places) {
          Value* out = values_ + first;
          for (int64_t i = 0; i < count; ++i) {
            const Value here = widen(grads[places[i]]);
            out[i] = add_ ? out[i] + here : here;
          }
        });
      }
    });
  }

  ScoredTensor<Value> scored_, magnitude_;
  bool bounded_;  // whether |g| alone bounds a score
  const RunsView& active_;
  Strided grad_;
  Value* values_;
  bool add_;
};

struct Arguments {
  const at::Tensor &param, &grad;
  const std::optional<at::Tensor>& score;
  const at::Tensor &offsets, &indices, &values;
  bool add;
  int64_t place;
  const at::Tensor &best_score, &best_place, &best_grad, &k;
  bool again;
  double eps, exp;
};

template <class Value>
void collect(const Arguments& a) {
  const auto dtype = at::CppTypeToScalarType<Value>::value;
  const RunsView active = view_runs("", a.offsets, a.indices, 1);
  const int64_t room = a.best_score.numel(), k = wanted(a.k, room);
  check_vector("values", a.values, dtype, active.end());
  check_vector("best_score", a.best_score, dtype, room);
  check_vector("best_place", a.best_place, at::kLong, room);
  check_vector("best_grad", a.best_grad, dtype, room);
  ScoredTensor<Value> scored;
  scored.param = Strided(a.param);
  scored.grad = Strided(a.score ? *a.score : a.grad);
  scored.rule = {exponent_of(a.exp), static_cast<Value>(a.eps), a.exp, a.score.has_value()};
  scored.numel = a.grad.numel();
  scored.active = {active.runs.data(), static_cast<int64_t>(active.runs.size()), 0};
  const Collector<Value> collector(scored, active, Strided(a.grad),
                                   a.values.template mutable_data_ptr<Value>(), a.add);
  if (k == 0) return collector.gather_all();
  Best<Value> best{a.best_score.template mutable_data_ptr<Value>(), a.best_place.mutable_data_ptr<int64_t>(),
                   a.best_grad.template mutable_data_ptr<Value>(), k, room};
  best.drop_behind();
  std::vector<Found<Value>> found = collector.best(k, best.floor(a.place));
  if (a.again) best.drop_repeated(a.place, found);
  std::sort(found.begin(), found.end(), precedes<Value>);
  best.merge(a.place, found);
}

void collect_cpu(const at::Tensor& param, const at::Tensor& grad, const std::optional<at::Tensor>& score,
                 const at::Tensor& offsets, const at::Tensor& indices, const at::Tensor& values, bool add,
                 int64_t place, const at::Tensor& best_score, const at::Tensor& best_place,
                 const at::Tensor& best_grad, const at::Tensor&, const at::Tensor& k, bool again, double eps,
                 double exp) {
  check_float_tensor("param", param);
  check_grad("grad", grad, param);
  const bool is_double = param.scalar_type() == at::kDouble;
  if (score) {
    check_float_tensor("score", *score);
    TORCH_CHECK_VALUE(score->sizes() == grad.sizes(), "score: expected shape ", shape_text(grad.sizes()),
                      ", got ", shape_text(score->sizes()));
    TORCH_CHECK_VALUE(score->scalar_type() == (is_double ? at::kDouble : at::kFloat),
                      "score: expected float32, or float64 as its parameter, got ", score->scalar_type());
  }
  const Arguments a{param,      grad,       score,     offsets, indices, values, add, place,
                    best_score, best_place, best_grad, k,       again,   eps,    exp};
  is_double ? collect<double>(a) : collect<float>(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("collect_", &collect_cpu); }

}  // namespace id3::cpu
