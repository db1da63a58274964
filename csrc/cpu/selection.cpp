#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "cpu/candidates.h"
#include "cpu/cut.h"
#include "cpu/entries.h"
#include "cpu/estimate.h"
#include "cpu/tiles.h"

// Exact top-k in one streaming pass (the delegates of Dr. Top-k, arXiv 2109.08219). The pass
// keeps one maximum per tile. The k-th largest maximum is a lower bound of the k-th best score, so that all
// winners lie in the tiles above it and, for ties, in the first tiles at it: k tiles, which are scored again.

namespace id3::cpu {
namespace {

// Tiles, and keys, per thread below which starting a thread costs more than it saves: a machine that has
// other work to do may take milliseconds to start one.
constexpr int64_t kTileGrain = 256, kKeyGrain = 1 << 18;

using Selection = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The tiles that can hold winners, ascending, and a key that no winner's lies below.
template <class Value>
struct Shortlist {
  bool all = true;
  std::vector<int64_t> tiles;  // unless all
  Key<Value> floor = 1;
  at::Tensor kept_keys;    // where the maxima were: the keys of the list's first tiles
  int64_t kept_tiles = 0;  // how many tiles these are

  int64_t tile(int64_t item) const { return all ? item : tiles[item]; }
};

// Gives the keys of listed tiles, in ascending order: kept ones, or scored again.
template <class Value>
class TileScorer {
 public:
  TileScorer(const Candidates<Value>& candidates, const Shortlist<Value>& list)
      : candidates_(candidates), list_(list) {
    if (list.kept_tiles) kept_ = list.kept_keys.template const_data_ptr<Key<Value>>();
  }

  const Key<Value>* keys(int64_t item) {
    seek(list_.tile(item));
    if (item < list_.kept_tiles) return kept_ + item * kTile;
    run_simd<TileKeys>(scored_, first_, keys_);
    return keys_;
  }

  int64_t tensor() const { return tensor_; }  // of the tile whose keys were read last
  int64_t first() const { return first_; }    // the flat index of its first entry

 private:
  void seek(int64_t tile) {
    if (tile >= end_) {
      tensor_ = candidates_.tensor_of(tile);
      end_ = candidates_.tile_begin(tensor_ + 1);
      scored_ = candidates_.tensor(tensor_);
    }
    first_ = (tile - candidates_.tile_begin(tensor_)) * kTile;
  }

  const Candidates<Value>& candidates_;
  const Shortlist<Value>& list_;
  const Key<Value>* kept_ = nullptr;
  ScoredTensor<Value> scored_;
  int64_t tensor_ = -1, end_ = 0, first_ = 0;
  alignas(64) Key<Value> keys_[kTile];
};

// use(tensor, first, count, tile): each thread's tiles in runs within one tensor. The run's `count` tiles are
// numbered from `tile` on, and start at the tensor's entry `first`.
template <class Value, class Use>
void for_each_run(const Candidates<Value>& candidates, const Use& use) {
  const Parts parts(candidates.tiles(), kTileGrain);
  parts.run([&](int64_t part) {
    const int64_t end = parts.begin(part + 1);
    for (int64_t tile = parts.begin(part); tile < end;) {
      const int64_t j = candidates.tensor_of(tile);
      const int64_t stop = std::min(end, candidates.tile_begin(j + 1));
      use(candidates.tensor(j), (tile - candidates.tile_begin(j)) * kTile, stop - tile, tile);
      tile = stop;
    }
  });
}

template <class Key>
Cut<Key> cut_maxima(int64_t k, const Key* maxima, int64_t tiles) {
  const Parts parts(tiles, kKeyGrain);
  return cut_at<Key>(k, 1, parts, [&](int64_t part, const auto& visit) {
    visit(maxima + parts.begin(part), parts.begin(part + 1) - parts.begin(part));
  });
}

// As stream_maxima, with 0 for each tile whose maximum is below those of k other tiles. Estimates exclude
// these tiles, the rest is scored. The k tiles with the largest estimates have maxima at least as large as
// the k-th estimate less one error; a tile that reaches that maximum has an estimate of at least that less
// another error.
void stream_estimates(const Candidates<float>& candidates, int64_t k, Key<float>* maxima) {
  for_each_run(candidates, [&](const auto& tensor, int64_t first, int64_t count, int64_t tile) {
    estimate_maxima(tensor, first, count, maxima + tile);
  });
  const Cut<Key<float>> cut = cut_maxima(k, maxima, candidates.tiles());
  const float error = estimate_error(candidates.rule());
  const float lowest = std::max(score_of<float>(cut.threshold) - 2 * error, kLowestEstimate);
  for_each_run(candidates, [&](const auto& tensor, int64_t first, int64_t count, int64_t tile) {
    for (const int64_t end = tile + count; tile < end; ++tile, first += kTile) {
      if (score_of<float>(maxima[tile]) < lowest)
        maxima[tile] = 0;
      else
        run_simd<TileMaxima>(tensor, first, int64_t(1), maxima + tile);
    }
  });
}

template <class Value>
void stream_maxima(const Candidates<Value>& candidates, int64_t k, Key<Value>* maxima) {
  if constexpr (std::is_same_v<Value, float>)
    if (can_estimate(candidates.rule())) return stream_estimates(candidates, k, maxima);
  for_each_run(candidates, [&](const auto& tensor, int64_t first, int64_t count, int64_t tile) {
    run_simd<TileMaxima>(tensor, first, count, maxima + tile);
  });
}

template <class Value>
Shortlist<Value> shortlist(const Candidates<Value>& candidates, int64_t k) {
  // With as many winners as tiles the maxima bound nothing, and the list would be all tiles anyway.
  if (k > candidates.tiles() / 2) return {};
  const at::Tensor storage = at::empty({candidates.tiles()}, at::CppTypeToScalarType<Key<Value>>::value);
  auto* maxima = storage.template mutable_data_ptr<Key<Value>>();
  stream_maxima(candidates, k, maxima);
  const Parts parts(candidates.tiles(), kKeyGrain);
  const auto cut = cut_maxima(k, maxima, candidates.tiles());
  Shortlist<Value> list{false, std::vector<int64_t>(cut.total), std::max<Key<Value>>(cut.threshold, 1),
                        storage};
  parts.run([&](int64_t part) {
    auto [out, ties] = cut.parts[part];
    const int64_t end = parts.begin(part + 1);
    for (int64_t tile = parts.begin(part); tile < end; ++tile)
      if (cut.takes(maxima[tile], ties)) list.tiles[out++] = tile;
  });
  return list;
}

// The maxima have done their work: their memory takes the keys of the list's first tiles, for most lists of
// all, which spares the passes below from scoring them once each.
template <class Value>
void keep_keys(const Candidates<Value>& candidates, Shortlist<Value>& list) {
  if (list.all) return;
  auto* kept = list.kept_keys.template mutable_data_ptr<Key<Value>>();
  const int64_t tiles = std::min<int64_t>(list.tiles.size(), list.kept_keys.numel() / kTile);
  const Parts parts(tiles, kTileGrain);
  parts.run([&](int64_t part) {
    TileScorer<Value> scorer(candidates, list);
    const int64_t end = parts.begin(part + 1);
    for (int64_t item = parts.begin(part); item < end; ++item)
      std::copy_n(scorer.keys(item), kTile, kept + item * kTile);
  });
  list.kept_tiles = tiles;
}

// Where the results go. What lies behind the last winner is zero.
template <class Value>
struct Winners {
  at::Tensor offsets, indices, scores;

  Winners(int64_t tensors, int64_t capacity)
      : offsets(at::zeros({tensors + 1}, at::kLong)),
        indices(at::empty({capacity}, at::kInt)),
        scores(at::empty({capacity}, at::CppTypeToScalarType<Value>::value)) {}

  void clear_from(int64_t n) const {
    const int64_t left = indices.numel() - n;
    std::fill_n(indices.template mutable_data_ptr<int32_t>() + n, left, 0);
    std::fill_n(scores.template mutable_data_ptr<Value>() + n, left, Value(0));
  }
};

// Writes the keys that the cut takes, tile by tile of the list.
template <class Value>
void write(const Candidates<Value>& candidates, const Shortlist<Value>& list, const Parts& parts,
           const Cut<Key<Value>>& cut, const Winners<Value>& winners) {
  auto* offset = winners.offsets.template mutable_data_ptr<int64_t>();
  auto* index = winners.indices.template mutable_data_ptr<int32_t>();
  auto* score = winners.scores.template mutable_data_ptr<Value>();
  parts.run([&](int64_t part) {
    auto [out, ties] = cut.parts[part];
    TileScorer<Value> scorer(candidates, list);
    const int64_t end = parts.begin(part + 1);
    // Tensor `begun` is the last whose offset is written: by this part, or by those before it.
    int64_t begun = part == 0 ? -1 : candidates.tensor_of(list.tile(parts.begin(part) - 1));
    for (int64_t item = parts.begin(part); item < end; ++item) {
      const Key<Value>* keys = scorer.keys(item);
      while (begun < scorer.tensor()) offset[++begun] = out;
      for (int64_t i = 0; i < kTile; ++i) {
        if (!cut.takes(keys[i], ties)) continue;
        index[out] = static_cast<int32_t>(scorer.first() + i);
        score[out++] = score_of<Value>(keys[i]);
      }
    }
    while (part + 1 == parts.count && begun < candidates.tensors()) offset[++begun] = out;
  });
  winners.clear_from(cut.total);
}

template <class Value>
Selection select(const Candidates<Value>& candidates, const at::Tensor& k_tensor, int64_t capacity) {
  const int64_t k = wanted(k_tensor, capacity);
  const Winners<Value> winners(candidates.tensors(), capacity);
  if (k == 0) {
    winners.clear_from(0);
    return {winners.offsets, winners.indices, winners.scores};
  }
  Shortlist<Value> list = shortlist(candidates, k);
  keep_keys(candidates, list);
  const Parts parts(list.all ? candidates.tiles() : list.tiles.size(), kTileGrain);
  const auto cut = cut_at<Key<Value>>(k, list.floor, parts, [&](int64_t part, const auto& visit) {
    TileScorer<Value> scorer(candidates, list);
    const int64_t end = parts.begin(part + 1);
    for (int64_t item = parts.begin(part); item < end; ++item) visit(scorer.keys(item), kTile);
  });
  write(candidates, list, parts, cut, winners);
  return {winners.offsets, winners.indices, winners.scores};
}

template <class Value>
Selection select_by_d3(at::TensorList params, const OptionalTensors& grads, const RunsView& active,
                       const at::Tensor& k, int64_t capacity, double eps, double exp) {
  const ScoreRule<Value> rule{exponent_of(exp), static_cast<Value>(eps), exp};
  return select(Candidates<Value>(params, grads, active, rule), k, capacity);
}

template <class Value>
Selection select_by_given(const OptionalTensors& scores, const RunsView& active, const at::Tensor& k,
                          int64_t capacity) {
  const ScoreRule<Value> rule{Exponent::zero, 0, 0, true};
  return select(Candidates<Value>({}, scores, active, rule), k, capacity);
}

Selection select_topk_cpu(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
                          const at::Tensor& indices, const at::Tensor& k, int64_t capacity, double eps,
                          double exp) {
  check_params(params);
  check_grads(grads, params);
  const RunsView active = view_runs("active.", offsets, indices, params.size());
  if (!params.empty() && params[0].scalar_type() == at::kDouble)
    return select_by_d3<double>(params, grads, active, k, capacity, eps, exp);
  return select_by_d3<float>(params, grads, active, k, capacity, eps, exp);
}

Selection select_topk_by_score_cpu(const OptionalTensors& scores, const at::Tensor& offsets,
                                   const at::Tensor& indices, const at::Tensor& k, int64_t capacity) {
  const RunsView active = view_runs("active.", offsets, indices, scores.size());
  std::optional<at::ScalarType> dtype;
  for (size_t j = 0; j < scores.size(); ++j) {
    const std::optional<at::Tensor> score = scores.get(j);
    if (!score) continue;
    check_float_tensor(item_name("scores", j), *score);
    if (!dtype) dtype = score->scalar_type();
    TORCH_CHECK_VALUE(score->scalar_type() == *dtype && (*dtype == at::kFloat || *dtype == at::kDouble),
                      item_name("scores", j), ": expected all float32 or all float64, got ",
                      score->scalar_type());
  }
  return dtype == at::kDouble ? select_by_given<double>(scores, active, k, capacity)
                              : select_by_given<float>(scores, active, k, capacity);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) {
  m.impl("select_topk", &select_topk_cpu);
  m.impl("select_topk_by_score", &select_topk_by_score_cpu);
}

}  // namespace id3::cpu
