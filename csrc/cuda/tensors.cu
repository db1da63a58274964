#include "cuda/tensors.h"

namespace id3::cuda {
namespace {

constexpr int kRowsPerLaunch = 112;  // 3.5 KiB of the 4 KiB of parameters that every GPU allows

struct RowBatch {
  TensorRow rows[kRowsPerLaunch];
};

__global__ void store_rows_kernel(RowBatch batch, int count, TensorRow* out) {
  if (static_cast<int>(threadIdx.x) < count) out[threadIdx.x] = batch.rows[threadIdx.x];
}

}  // namespace

void store_rows(const TensorRow* rows, int32_t count, TensorRow* device_rows, cudaStream_t stream) {
  for (int32_t first = 0; first < count; first += kRowsPerLaunch) {
    const int n = std::min(count - first, kRowsPerLaunch);
    RowBatch batch{};
    std::copy_n(rows + first, n, batch.rows);
    launch(store_rows_kernel, 1, kRowsPerLaunch, stream, batch, n, device_rows + first);
  }
}

}  // namespace id3::cuda
