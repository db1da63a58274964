#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/entries.h"
#include "cpu/tiles.h"

namespace id3::cpu {

// The candidates of one call. Tiles are numbered through all tensors; a tensor without gradient has none.
template <class Value>
class Candidates {
 public:
  Candidates(at::TensorList params, const OptionalTensors& grads, const RunsView& active,
             ScoreRule<Value> rule)
      : params_(params), grads_(grads), active_(active), rule_(rule), tile_begin_(grads.size() + 1) {
    for (size_t j = 0; j < grads.size(); ++j) {
      const std::optional<at::Tensor> grad = grads.get(j);
      tile_begin_[j + 1] = tile_begin_[j] + (grad ? (grad->numel() + kTile - 1) / kTile : 0);
    }
  }

  const ScoreRule<Value>& rule() const { return rule_; }
  int64_t tensors() const { return static_cast<int64_t>(grads_.size()); }
  int64_t tiles() const { return tile_begin_.back(); }
  int64_t tile_begin(int64_t tensor) const { return tile_begin_[tensor]; }

  int64_t tensor_of(int64_t tile) const {
    return std::upper_bound(tile_begin_.begin(), tile_begin_.end(), tile) - tile_begin_.begin() - 1;
  }

  ScoredTensor<Value> tensor(int64_t j) const {
    ScoredTensor<Value> t;
    if (!params_.empty()) t.param = Strided(params_[j]);
    const at::Tensor& grad = *grads_.get(j);
    t.grad = Strided(grad);
    t.rule = rule_;
    t.numel = t.grad.numel;
    t.active = {active_.runs.data(), static_cast<int64_t>(active_.runs.size()), j};
    return t;
  }

 private:
  at::TensorList params_;
  const OptionalTensors& grads_;
  const RunsView& active_;
  ScoreRule<Value> rule_;
  std::vector<int64_t> tile_begin_;
};

}  // namespace id3::cpu
