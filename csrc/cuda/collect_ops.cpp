#include <torch/library.h>

#include <tuple>

#include "cuda/collect.h"
#include "cuda/torch_tensors.h"

namespace id3::cuda {
namespace {

// The candidates' part of the arguments, and where the room for a tensor's tile maxima is.
void set_candidates(Collect& c, const at::Tensor& best_score, const at::Tensor& best_place,
                    const at::Tensor& best_grad, const at::Tensor& state, const at::Tensor& like) {
  for (const at::Tensor* best : {&best_score, &best_place, &best_grad, &state}) check_row_major(*best, like);
  c.room = best_score.numel();
  TORCH_CHECK_VALUE(best_place.numel() == c.room && best_grad.numel() == c.room, "best: expected room for ",
                    c.room, ", got ", best_place.numel(), " and ", best_grad.numel());
  TORCH_CHECK_VALUE(state.nbytes() >= sizeof(CollectState), "state: expected ", sizeof(CollectState),
                    " bytes, got ", state.nbytes());
  c.wanted.capacity = most_wanted(c.room);
  c.best = {best_score.mutable_data_ptr<float>(), best_place.mutable_data_ptr<int64_t>(),
            best_grad.mutable_data_ptr<float>()};
  c.state = data<CollectState>(state);
}

// With `again`, or where there is no state, the values at active entries alone: cuda.py has the rest.
void collect_op(const at::Tensor& param, const at::Tensor& grad, const OptionalTensor& score,
                const at::Tensor& offsets, const at::Tensor& indices, const at::Tensor& values, bool add,
                int64_t place, const at::Tensor& best_score, const at::Tensor& best_place,
                const at::Tensor& best_grad, const at::Tensor& state, const at::Tensor& k, bool again,
                double eps, double exp) {
  const c10::cuda::CUDAGuard guard(grad.device());
  check_row_major(values, grad);
  TORCH_CHECK_VALUE(offsets.size(-1) == 2 && values.numel() >= indices.numel(),
                    "collect_: expected 2 offsets and ", indices.numel(), " values, got ", offsets.size(-1),
                    " and ", values.numel());
  TORCH_CHECK_VALUE((score ? *score : param).numel() == grad.numel(), "grad: expected ",
                    (score ? *score : param).numel(), " entries, got ", grad.numel());
  Collect c{};
  c.row = score ? row_of(std::nullopt, *score, grad) : row_of(param, grad, grad);
  const TensorRow own = row_of(std::nullopt, grad, grad);
  c.grad = own.grad;
  c.grad_dtype = own.grad_dtype;
  c.rule = {static_cast<float>(eps), exp, score.has_value()};
  c.active = view_runs(offsets, indices);
  c.most_active = indices.numel();
  c.values = values.mutable_data_ptr<float>();
  c.add = add;
  c.place = place;
  c.wanted = {count_at(k, grad), 0};
  at::Tensor workspace;
  if (!again && state.numel() > 0 && best_score.numel() > 0) {
    set_candidates(c, best_score, best_place, best_grad, state, grad);
    const int64_t chunks = chunks_of(c.row.numel), tiles = chunks * (kShortChunk / kTile);
    const int64_t spans = chunks * c.active.runs;
    const int64_t kept = c.room >= kLeastSlotsOfGrid ? c.wanted.capacity : 0;
    workspace = empty<int64_t>(2 * spans + 2 * kept + (tiles + 1) / 2, grad);
    c.spans = data<Span>(workspace);
    if (kept > 0) c.kept = slots_at(c.spans + spans, kept);
    c.maxima = reinterpret_cast<int32_t*>(data<int64_t>(workspace) + 2 * spans + 2 * kept);
  }
  collect(c, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<int64_t, int64_t> candidate_room_op(int64_t k) {
  const CandidateRoom room = candidate_room(k);
  return {room.slots, room.state};
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) { m.impl("collect_", &collect_op); }

// Facts that Python needs: they take no tensor and run nothing on a GPU.
TORCH_LIBRARY_FRAGMENT(id3_cuda, m) {
  m.def("candidate_room(int k) -> (int, int)", &candidate_room_op);
  m.def("most_wanted(int slots) -> int", &most_wanted);
}

}  // namespace id3::cuda
