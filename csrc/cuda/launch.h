#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

// Kernels and launchers do not depend on torch: they take raw pointers, sizes and a stream.
namespace id3::cuda {

constexpr int kWarp = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kThreads = 256;  // eight warps: enough to hide latency at any register count up to 64

// How many blocks of kThreads of a kernel the current GPU holds at once, by its registers and shared memory.
inline int64_t blocks_at_once(const void* kernel) {
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<const void*, int>, int64_t>();  // by kernel and device
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  int64_t& blocks = known[{kernel, device}];
  if (blocks == 0) {
    int multiprocessors = 0, of_each = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_each, kernel, kThreads, 0);
    blocks = std::max<int64_t>(int64_t{multiprocessors} * of_each, 1);
  }
  return blocks;
}

// Blocks for `items` pieces of work at `per_block` each, at most blocks_at_once: the kernel strides.
template <class... Params>
unsigned blocks_for(void (*kernel)(Params...), int64_t items, int per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  const int64_t most = blocks_at_once(reinterpret_cast<const void*>(kernel));
  return static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, most));
}

// The runtime keeps the error of a launch until the caller calls cudaGetLastError.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), unsigned blocks, cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

// Of a kernel that strides over `items` pieces of work, by default one for each thread of a stride.
struct Items {
  int64_t count;
  int per_block = kThreads;
};

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), Items items, cudaStream_t stream, Args... args) {
  launch(kernel, blocks_for(kernel, items.count, items.per_block), stream, args...);
}

#if defined(__CUDACC__) || defined(ID3_EMULATED_CUDA)

__device__ inline int64_t thread_in_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t threads_in_grid() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The first place in the ascending values[begin, end) whose value is not below `wanted`.
template <class Value, class Wanted>
__device__ inline int64_t lower_bound(const Value* values, int64_t begin, int64_t end, Wanted wanted) {
  while (begin < end) {
    const int64_t middle = (begin + end) / 2;
    if (values[middle] < wanted)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The sum of `value` over the lower threads of the block; `total` is the sum over all threads. Every thread
// of a block of kThreads must call it.
__device__ inline int64_t sum_before(int64_t value, int64_t& total) {
  __shared__ int64_t sums[kThreads];
  const int me = threadIdx.x;
  sums[me] = value;
  __syncthreads();
  for (int distance = 1; distance < kThreads; distance *= 2) {
    const int64_t below = me >= distance ? sums[me - distance] : 0;
    __syncthreads();
    sums[me] += below;
    __syncthreads();
  }
  total = sums[kThreads - 1];
  const int64_t before = sums[me] - value;
  __syncthreads();
  return before;
}

// True in every thread of the block of a launch that calls this last; it sees what the other blocks wrote.
// `arrived` is 0 before the launch and after it.
__device__ inline bool is_last_block(unsigned* arrived) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(arrived, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

#endif

}  // namespace id3::cuda
