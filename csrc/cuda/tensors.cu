#include "cuda/tensors.h"

namespace id3::cuda {
namespace {

// 3.5 KiB of the 4 KiB of parameters that every GPU allows, and what CUDA 12.1 allows from Volta on.
constexpr int kFewRows = 112;
#if defined(ID3_EMULATED_CUDA) || CUDART_VERSION >= 12010
constexpr int kManyRows = 1000;
#else
constexpr int kManyRows = kFewRows;
#endif

template <int kRows>
struct RowBatch {
  TensorRow rows[kRows];
};

template <int kRows>
__global__ void store_rows_kernel(const __grid_constant__ RowBatch<kRows> batch, int count, TensorRow* out) {
  for (int i = threadIdx.x; i < count; i += kThreads) out[i] = batch.rows[i];
}

template <int kRows>
void store_batch(const TensorRow* rows, int count, TensorRow* device_rows, cudaStream_t stream) {
  RowBatch<kRows> batch;
  std::copy_n(rows, count, batch.rows);
  launch(store_rows_kernel<kRows>, 1u, stream, batch, count, device_rows);
}

}  // namespace

void store_rows(const TensorRow* rows, int32_t count, TensorRow* device_rows, cudaStream_t stream) {
  for (int32_t first = 0; first < count; first += kManyRows) {
    const int n = std::min(count - first, kManyRows);
    if (n <= kFewRows)
      store_batch<kFewRows>(rows + first, n, device_rows + first, stream);
    else
      store_batch<kManyRows>(rows + first, n, device_rows + first, stream);
  }
}

}  // namespace id3::cuda
