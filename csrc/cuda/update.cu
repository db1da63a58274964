#include "cuda/update.h"

namespace id3::cuda {
namespace {

// The weight to update: the master, unless the parameter no longer is its rounding.
__device__ __forceinline__ float weight_at(const Update& u, const TensorRow& row, int64_t index, int64_t at) {
  const float stored = load_as_float(row.param, row.param_dtype, index);
  if (u.master == nullptr || row.param_dtype == DType::float32) return stored;
  const float master = u.master[at], back = rounded(master, row.param_dtype);
  const bool same = back == stored || (back != back && stored != stored);
  return same ? master : stored;
}

__device__ __forceinline__ void update_run(const Update& u, const EntriesView& entries,
                                           const AdamWScalars<float>& scalars, double lr) {
  const int64_t end = entries.end();
  for (int64_t at = entries.first() + thread_in_grid(); at < end; at += threads_in_grid()) {
    const int32_t tensor = entries.owner(at);
    const TensorRow row = u.rows[tensor];
    if (u.values == nullptr && row.grad == nullptr) continue;
    const int64_t index = entries.indices[at];
    const float grad = u.values ? load_as_float(u.values, u.values_dtype, at)
                                : load_as_float(row.grad, row.grad_dtype, index);
    float weight = weight_at(u, row, index, at);
    const int64_t s = u.age ? static_cast<int64_t>(++u.age[at]) : u.step[tensor];
    adamw_entry(grad, weight, u.exp_avg[at], u.exp_avg_sq[at],
                static_cast<float>(lr / u.bias.unbiased.of(s)), u.bias.root.of(s), scalars);
    store_float(row.param, row.param_dtype, index, weight);
    if (u.master && row.param_dtype != DType::float32) u.master[at] = weight;
  }
}

__global__ void adamw_kernel(Update u) {
  if (u.found_inf.at && u.found_inf.value() != 0) return;
  AdamWScalars<float> scalars = u.scalars;
  if (u.grad_scale.at) scalars.grad_scale = static_cast<float>(u.grad_scale.value());
  if (u.clip.at) scalars.clip = static_cast<float>(u.clip.value());
  const double lr = u.tensor_lr.at ? u.tensor_lr.value() : u.lr;
  scalars.decay = decay_of<float>(lr, u.weight_decay);
  for (int32_t run = 0; run < u.entries.runs; ++run) update_run(u, u.entries.run(run), scalars, lr);
}

}  // namespace

void adamw(const Update& update, int64_t n, cudaStream_t stream) {
  launch(adamw_kernel, Items{n}, stream, update);
}

}  // namespace id3::cuda
