#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <list>
#include <map>
#include <mutex>
#include <vector>

#include "checks.h"
#include "cuda/delta.h"
#include "cuda/score.h"
#include "cuda/selection.h"
#include "cuda/update.h"

// The op table over the launchers: torch's tensors in and out, memory from torch's allocator, torch's stream.
// The Python module id3_kernels/cuda.py makes tensors row-major before they come here and leaves float64 to
// the reference.

namespace id3::cuda {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

DType dtype_of(const at::Tensor& t) {
  if (t.scalar_type() == at::kFloat) return DType::float32;
  if (t.scalar_type() == at::kBFloat16) return DType::bfloat16;
  TORCH_CHECK_VALUE(t.scalar_type() == at::kHalf, "cuda backend: expected float32, bfloat16 or float16, got ",
                    t.scalar_type());
  return DType::float16;
}

void check_row_major(const at::Tensor& t, const at::Tensor& like) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == like.device() && t.is_contiguous(),
                    "cuda backend: expected a row-major tensor on ", like.device(), ", got one on ",
                    t.device());
}

// Device memory for `n` numbers.
template <class T>
at::Tensor empty(int64_t n, const at::Tensor& like) {
  return at::empty({std::max<int64_t>(n, 1) * static_cast<int64_t>(sizeof(T))},
                   like.options().dtype(at::kByte));
}
template <class T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

EntriesView view(const at::Tensor& offsets, const at::Tensor& indices) {
  TORCH_CHECK_VALUE(offsets.scalar_type() == at::kLong && indices.scalar_type() == at::kInt,
                    "entries: expected int64 offsets and int32 indices");
  return {offsets.const_data_ptr<int64_t>(), indices.const_data_ptr<int32_t>(),
          static_cast<int32_t>(offsets.numel() - 1)};
}

at::Tensor stored(const std::vector<TensorRow>& rows, const at::Tensor& like) {
  const at::Tensor out = empty<TensorRow>(rows.size(), like);
  store_rows(rows.data(), static_cast<int32_t>(rows.size()), data<TensorRow>(out),
             c10::cuda::getCurrentCUDAStream());
  return out;
}

// grads empty: there are none.
at::Tensor rows_of(at::TensorList params, const OptionalTensors& grads, const at::Tensor& like) {
  const size_t n = std::max<size_t>(params.size(), grads.size());
  std::vector<TensorRow> rows(n);
  for (size_t j = 0; j < n; ++j) {
    TensorRow row{};
    if (j < params.size()) {
      check_row_major(params[j], like);
      row.param = params[j].data_ptr();
      if (params[j].element_size() < 8) row.param_dtype = dtype_of(params[j]);
    }
    const OptionalTensor grad = j < grads.size() ? grads.get(j) : OptionalTensor();
    if (grad) {
      check_row_major(*grad, like);
      row.grad = grad->const_data_ptr();
      row.grad_dtype = dtype_of(*grad);
    }
    rows[j] = row;
  }
  return stored(rows, like);
}

// --- layouts in device memory, kept for the lists of tensors seen last
// --------------------------------------

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

// --- ops
// -----------------------------------------------------------------------------------------------------

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

at::Tensor gather_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const auto dtype = tensors.empty() ? at::kFloat : tensors[0].scalar_type();
  const at::Tensor values = at::empty({indices.numel()}, offsets.options().dtype(dtype));
  const at::Tensor rows = rows_of(tensors, OptionalTensors(), offsets);
  gather(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
         values.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return values;
}

void scatter_op(at::TensorList tensors, const at::Tensor& offsets, const at::Tensor& indices,
                const at::Tensor& values) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  check_row_major(values, offsets);
  const at::Tensor rows = rows_of(tensors, OptionalTensors(), offsets);
  scatter(data<TensorRow>(rows), view(offsets, indices), indices.numel(), values.element_size(),
          values.const_data_ptr(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor squared_norm_op(const OptionalTensors& tensors, const at::Tensor& offsets,
                           const at::Tensor& indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor rows = rows_of({}, tensors, offsets),
                   sum = at::zeros({}, offsets.options().dtype(at::kDouble));
  const int64_t n = indices.numel();
  const at::Tensor sums = empty<double>((n + kSumBlock - 1) / kSumBlock, offsets);
  squared_norm(data<TensorRow>(rows), view(offsets, indices), n, data<double>(sums), data<double>(sum),
               c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return sum;
}

at::Tensor join_op(at::TensorList arrays, const at::Tensor& offsets, const at::Tensor& b_offsets,
                   const at::Tensor& b_indices) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  TORCH_CHECK_VALUE(!arrays.empty() && arrays.size() <= kMostArrays, "arrays: expected 1 to ", kMostArrays,
                    ", got ", arrays.size());
  const at::Tensor positions = at::empty({b_indices.numel()}, offsets.options());
  Join args{};
  std::vector<at::Tensor> scratch;
  for (const at::Tensor& array : arrays) {
    check_row_major(array, offsets);
    scratch.push_back(at::empty_like(array));
    args.arrays[args.n_arrays++] = {array.mutable_data_ptr(), scratch.back().mutable_data_ptr(),
                                    static_cast<int32_t>(array.element_size())};
  }
  args.offsets = data<int64_t>(offsets);
  args.added = view(b_offsets, b_indices);
  args.positions = data<int64_t>(positions);
  args.n_held = arrays[0].numel();
  args.n_added = b_indices.numel();
  join(args, c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return positions;
}

// The tables of bias correction come from the host's pow, as on every other backend.
struct DeviceBias {
  at::Tensor unbiased, root;
  int64_t longest;
};

// The step from which 1 - beta^s is 1 in float64.
int64_t last_biased_step(double beta) {
  constexpr int64_t kMost = int64_t{1} << 22;  // 48 MiB of tables; beta up to 0.99999
  return beta == 0 ? 1
                   : std::min(kMost, static_cast<int64_t>(std::ceil(-54 * std::log(2.0) / std::log(beta))));
}

DeviceBias bias_for(double beta1, double beta2, const at::Tensor& like) {
  static std::mutex mutex;
  static auto& kept = *new std::map<std::tuple<double, double, c10::DeviceIndex>, DeviceBias>();
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [it, is_new] = kept.try_emplace({beta1, beta2, like.device().index()});
  if (is_new) {
    const int64_t longest = std::max(last_biased_step(beta1), last_biased_step(beta2));
    const at::Tensor unbiased = at::ones({longest + 1}, at::kDouble),
                     root = at::ones({longest + 1}, at::kFloat);
    for (int64_t s = 1; s <= longest; ++s) {
      unbiased.mutable_data_ptr<double>()[s] = 1.0 - std::pow(beta1, static_cast<double>(s));
      root.mutable_data_ptr<float>()[s] =
          static_cast<float>(std::sqrt(1.0 - std::pow(beta2, static_cast<double>(s))));
    }
    it->second = {unbiased.to(like.device()), root.to(like.device()), longest};
  }
  return it->second;
}

void adamw_with(at::TensorList params, const OptionalTensors& grads, const OptionalTensor& values,
                const at::Tensor& offsets, const at::Tensor& indices, const at::Tensor& exp_avg,
                const at::Tensor& exp_avg_sq, const OptionalTensor& master, const OptionalTensor& age,
                const at::Tensor& step, double lr, double beta1, double beta2, double eps,
                double weight_decay, bool maximize, const OptionalTensor& grad_scale,
                const OptionalTensor& found_inf, const OptionalTensor& clip) {
  const c10::cuda::CUDAGuard guard(offsets.device());
  const at::Tensor rows = rows_of(params, grads, offsets);
  const DeviceBias bias = bias_for(beta1, beta2, offsets);
  std::vector<at::Tensor> alive;
  const auto number = [&](const OptionalTensor& t) -> const float* {
    if (!t) return nullptr;
    alive.push_back(t->to(offsets.device(), at::kFloat));
    return alive.back().const_data_ptr<float>();
  };
  const at::Tensor steps = step.to(offsets.device());
  Update update{};
  update.rows = data<TensorRow>(rows);
  update.entries = view(offsets, indices);
  if (values) {
    check_row_major(*values, offsets);
    update.values = values->const_data_ptr();
    update.values_dtype = dtype_of(*values);
  }
  update.exp_avg = exp_avg.mutable_data_ptr<float>();
  update.exp_avg_sq = exp_avg_sq.mutable_data_ptr<float>();
  update.master = master ? master->mutable_data_ptr<float>() : nullptr;
  update.age = age ? age->mutable_data_ptr<int32_t>() : nullptr;
  update.step = steps.const_data_ptr<int64_t>();
  update.bias = {bias.unbiased.const_data_ptr<double>(), bias.root.const_data_ptr<float>(), bias.longest};
  update.lr = lr;
  update.scalars = adamw_scalars(lr, beta1, beta2, eps, weight_decay, maximize);
  update.grad_scale = number(grad_scale);
  update.found_inf = number(found_inf);
  update.clip = number(clip);
  adamw(update, indices.numel(), c10::cuda::getCurrentCUDAStream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void adamw_op(at::TensorList params, const OptionalTensors& grads, const at::Tensor& offsets,
              const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
              const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step, double lr,
              double beta1, double beta2, double eps, double weight_decay, bool maximize,
              const OptionalTensor& grad_scale, const OptionalTensor& found_inf, const OptionalTensor& clip) {
  adamw_with(params, grads, std::nullopt, offsets, indices, exp_avg, exp_avg_sq, master, age, step, lr, beta1,
             beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip);
}

void adamw_compact_op(at::TensorList params, const at::Tensor& values, const at::Tensor& offsets,
                      const at::Tensor& indices, const at::Tensor& exp_avg, const at::Tensor& exp_avg_sq,
                      const OptionalTensor& master, const OptionalTensor& age, const at::Tensor& step,
                      double lr, double beta1, double beta2, double eps, double weight_decay, bool maximize,
                      const OptionalTensor& grad_scale, const OptionalTensor& found_inf,
                      const OptionalTensor& clip) {
  adamw_with(params, OptionalTensors(), values, offsets, indices, exp_avg, exp_avg_sq, master, age, step, lr,
             beta1, beta2, eps, weight_decay, maximize, grad_scale, found_inf, clip);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3_cuda, CUDA, m) {
  m.impl("d3_score", &score_op);
  m.impl("select_topk", &select_op);
  m.impl("select_topk_by_score", &select_by_score_op);
  m.impl("gather", &gather_op);
  m.impl("scatter_", &scatter_op);
  m.impl("squared_norm", &squared_norm_op);
  m.impl("join_", &join_op);
  m.impl("adamw_", &adamw_op);
  m.impl("adamw_compact_", &adamw_compact_op);
}

}  // namespace id3::cuda
