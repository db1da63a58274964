#include "cuda/norm.h"

namespace id3::cuda {
namespace {

// The gradients to where they are read in order, and the largest of them.
__global__ void take_values_kernel(const TensorRow* rows, RunsView entries, float* values, NormState* state) {
  int32_t largest = 0;
  for (int32_t run = 0; run < entries.runs; ++run) {
    const EntriesView own = entries.run(run);
    const int64_t end = own.end();
    for (int64_t at = own.first() + thread_in_grid(); at < end; at += threads_in_grid()) {
      const TensorRow row = rows[own.owner(at)];
      const float value = row.grad ? load_as_float(row.grad, row.grad_dtype, own.indices[at]) : 0.0f;
      values[at] = value;
      largest = max(largest, magnitude_bits(value));
    }
  }
  largest = __reduce_max_sync(kWholeWarp, largest);
  if (threadIdx.x % kWarp == 0 && largest > 0) atomicMax(&state->largest, largest);
}

__device__ __forceinline__ bool is_finite(const NormState& state) {
  return state.largest < FloatBits<float>::kInfinity;
}

// The sums of the squares, which need a finite largest value.
__device__ __forceinline__ void add_squares(const RunsView& entries, const float* values, NormState* state) {
  const double inverse = 1 / norm_scale(reinterpret_bits<float>(state->largest));
  int64_t high = 0, low = 0, total_high = 0, total_low = 0;
  for (int32_t run = 0; run < entries.runs; ++run) {
    const EntriesView own = entries.run(run);
    const int64_t end = own.end();
    for (int64_t at = own.first() + thread_in_grid(); at < end; at += threads_in_grid())
      add_square(values[at], inverse, high, low);
  }
  sum_before(high, total_high);
  sum_before(low, total_low);
  if (threadIdx.x != 0) return;
  atomicAdd(&state->high, static_cast<unsigned long long>(total_high));
  atomicAdd(&state->low, static_cast<unsigned long long>(total_low));
}

__device__ __forceinline__ double total_of(const NormState& state) {
  constexpr int64_t kInfinity = FloatBits<double>::kInfinity, kNaN = kInfinity | (kInfinity >> 1);
  if (!is_finite(state))
    return reinterpret_bits<double>(state.largest == FloatBits<float>::kInfinity ? kInfinity : kNaN);
  return norm_total(static_cast<int64_t>(state.high), static_cast<int64_t>(state.low),
                    norm_scale(reinterpret_bits<float>(state.largest)));
}

__global__ void squares_kernel(RunsView entries, const float* values, NormState* state, double* total) {
  if (is_finite(*state)) add_squares(entries, values, state);
  if (is_last_block(&state->arrived) && threadIdx.x == 0) *total = total_of(*state);
}

}  // namespace

void squared_norm(const TensorRow* rows, const RunsView& entries, int64_t n, float* values, NormState* state,
                  double* sum, cudaStream_t stream) {
  launch(take_values_kernel, Items{n}, stream, rows, entries, values, state);
  launch(squares_kernel, Items{n}, stream, entries, values, state, sum);
}

}  // namespace id3::cuda
