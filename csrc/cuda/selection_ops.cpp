#include <torch/library.h>

#include "cuda/selection.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

at::Tensor score_op(const at::Tensor& param, const at::Tensor& grad, double eps, double exp) {
  const c10::cuda::CUDAGuard guard(param.device());
  const TensorRow row = row_of(param, grad, param);
  const at::Tensor scores = at::empty(param.sizes(), param.options().dtype(at::kFloat));
  d3_score(row, param.numel(), static_cast<float>(eps), exp, data<float>(scores),
           c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return scores;
}

using Selection = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

Selection select(std::vector<TensorRow> rows, const at::Tensor& offsets, const at::Tensor& indices,
                 const at::Tensor& k, int64_t capacity, const ScoreRule& rule) {
  const int64_t* wanted = count_at(k, offsets);
  const RunsView active = view_runs(offsets, indices);
  const at::Tensor out_offsets = at::empty({offsets.size(-1)}, offsets.options()),
                   out_indices = at::empty({capacity}, indices.options()),
                   scores = at::empty({capacity}, indices.options().dtype(at::kFloat));
  const ChunkLayout layout = cut_into_chunks(rows);
  if (capacity == 0 || layout.n_chunks == 0)
    return {out_offsets.zero_(), out_indices.zero_(), scores.zero_()};
  const at::Tensor device_rows = stored(rows, offsets), chunks = empty<Chunk>(layout.n_chunks, offsets),
                   spans = empty<Span>(static_cast<int64_t>(layout.n_chunks) * active.runs, offsets);
  const int64_t tiles = layout.tiles();
  const Form form = form_of(capacity, tiles);
  const bool few = form != Form::all;
  const int64_t keys_ranked = most_ranked(form, capacity, layout);
  const at::Tensor counts = empty<int64_t>(2, offsets), zeros = empty<ZeroedTopk>(1, offsets).zero_(),
                   blocks = empty<BlockCount>(topk_blocks(keys_ranked), offsets),
                   winners = empty<int64_t>(capacity, offsets),
                   maxima = empty<int32_t>(few ? tiles : 0, offsets),
                   listed = empty<int32_t>(few ? capacity : 0, offsets),
                   keys = empty<int32_t>(form == Form::stored ? capacity * kTile : 0, offsets);
  const Candidates candidates{data<TensorRow>(device_rows),
                              data<Chunk>(chunks),
                              data<Span>(spans),
                              layout.n_chunks,
                              layout.chunk_length,
                              active,
                              rule};
  const SelectionWorkspace workspace{
      {&data<ZeroedTopk>(zeros)->state, data<ZeroedTopk>(zeros)->histogram, data<BlockCount>(blocks)},
      data<int32_t>(maxima),
      data<int32_t>(listed),
      data<int32_t>(keys),
      data<int64_t>(winners),
      data<int64_t>(counts),
      data<int64_t>(counts) + 1};
  select_topk(candidates, wanted, workspace,
              {data<int64_t>(out_offsets), data<int32_t>(out_indices), data<float>(scores), capacity},
              c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out_offsets, out_indices, scores};
}

Selection select_op(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
                    const at::Tensor& indices, const at::Tensor& k, int64_t capacity, double eps,
                    double exp) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  return select(rows_of(params, grads, offsets), offsets, indices, k, capacity,
                {static_cast<float>(eps), exp, false});
}

Selection select_by_score_op(const OptionalTensors& scores, const at::Tensor& offsets,
                             const at::Tensor& indices, const at::Tensor& k, int64_t capacity) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  return select(rows_of({}, scores, offsets), offsets, indices, k, capacity, {0, 0, true});
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("d3_score", &score_op);
  m.impl("select_topk", &select_op);
  m.impl("select_topk_by_score", &select_by_score_op);
}

}  // namespace id3::cuda
