#include <torch/library.h>

#include <list>
#include <mutex>

#include "cuda/score.h"
#include "cuda/selection.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

// A layout in device memory; those of the lists of tensors seen last are kept.
struct DeviceLayout {
  std::vector<int64_t> numels;
  c10::Device device;
  int32_t n_chunks, chunk_length;
  at::Tensor chunks;
};

DeviceLayout layout_for(const std::vector<int64_t>& numels, const at::Tensor& like) {
  constexpr size_t kKept = 8;
  static std::mutex mutex;
  static auto& kept = *new std::list<DeviceLayout>();  // never freed: CUDA may be gone when statics are
  const std::lock_guard<std::mutex> lock(mutex);
  for (auto it = kept.begin(); it != kept.end(); ++it) {
    if (it->device != like.device() || it->numels != numels) continue;
    kept.splice(kept.begin(), kept, it);
    return kept.front();
  }
  Layout layout = cut_into_chunks(numels);
  const int64_t bytes = layout.chunks.size() * sizeof(Chunk);
  const at::Tensor host = at::from_blob(layout.chunks.data(), {bytes}, at::kByte);
  kept.push_front({numels, like.device(), static_cast<int32_t>(layout.chunks.size()), layout.chunk_length,
                   host.to(like.device())});
  if (kept.size() > kKept) kept.pop_back();
  return kept.front();
}

at::Tensor score_op(const at::Tensor& param, const at::Tensor& grad, double eps, double exp) {
  const c10::cuda::CUDAGuard guard(param.device());
  check_row_major(param, param);
  check_row_major(grad, param);
  const at::Tensor scores = at::empty(param.sizes(), param.options().dtype(at::kFloat));
  const TensorRow row{param.data_ptr(), grad.const_data_ptr(), dtype_of(param), dtype_of(grad)};
  d3_score(row, param.numel(), static_cast<float>(eps), exp, data<float>(scores),
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scores;
}

using Selection = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Selection select(at::TensorList params, const OptionalTensors& grads, const std::vector<int64_t>& numels,
                 const at::Tensor& offsets, const at::Tensor& indices, int64_t k, double eps, double exp,
                 bool given) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor out_offsets = at::zeros_like(offsets), out_indices = at::empty({k}, indices.options()),
                   scores = at::empty({k}, indices.options().dtype(at::kFloat));
  const DeviceLayout layout = layout_for(numels, offsets);
  if (k == 0 || layout.n_chunks == 0) return {out_offsets, out_indices.zero_(), scores.zero_()};
  const at::Tensor rows = rows_of(params, grads, offsets);
  const int64_t slots = static_cast<int64_t>(layout.n_chunks) * layout.chunk_length, tiles = slots / kTile;
  const bool few = few_winners(k, tiles);
  const at::Tensor wanted = at::full({1}, k, offsets.options()), counts = at::empty({2}, offsets.options());
  const at::Tensor chunk_active = at::empty({layout.n_chunks + 1}, offsets.options());
  const at::Tensor state = empty<TopkState>(1, offsets).zero_(),
                   histogram = empty<unsigned>(kBins, offsets).zero_(),
                   blocks = empty<BlockCount>(topk_blocks(few ? std::max(tiles, k * kTile) : slots), offsets),
                   winners = empty<int64_t>(k, offsets), maxima = empty<int32_t>(few ? tiles : 0, offsets),
                   listed = empty<int32_t>(few ? k : 0, offsets),
                   keys = empty<int32_t>(few ? k * kTile : 0, offsets);
  const Candidates candidates{data<TensorRow>(rows),
                              data<Chunk>(layout.chunks),
                              layout.n_chunks,
                              layout.chunk_length,
                              view(offsets, indices),
                              data<int64_t>(chunk_active),
                              static_cast<float>(eps),
                              exp,
                              given};
  const SelectionWorkspace workspace{
      {data<TopkState>(state), data<unsigned>(histogram), data<BlockCount>(blocks)},
      data<int32_t>(maxima),
      data<int32_t>(listed),
      data<int32_t>(keys),
      data<int64_t>(winners),
      data<int64_t>(counts),
      data<int64_t>(counts) + 1};
  select_topk(candidates, data<int64_t>(wanted), workspace,
              {data<int64_t>(out_offsets), data<int32_t>(out_indices), data<float>(scores), k}, stream);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out_offsets, out_indices, scores};
}

Selection select_op(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
                    const at::Tensor& indices, int64_t k, double eps, double exp) {
  std::vector<int64_t> numels;
  for (const at::Tensor& param : params) numels.push_back(param.numel());
  return select(params, grads, numels, offsets, indices, k, eps, exp, false);
}

Selection select_by_score_op(const OptionalTensors& scores, const at::Tensor& offsets,
                             const at::Tensor& indices, int64_t k) {
  std::vector<int64_t> numels;
  for (size_t j = 0; j < scores.size(); ++j) {
    const OptionalTensor score = scores.get(j);
    numels.push_back(score ? score->numel() : 0);
  }
  return select({}, scores, numels, offsets, indices, k, 0, 0, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("d3_score", &score_op);
  m.impl("select_topk", &select_op);
  m.impl("select_topk_by_score", &select_by_score_op);
}

}  // namespace id3::cuda
