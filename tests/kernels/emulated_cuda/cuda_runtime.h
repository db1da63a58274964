#pragma once

// What csrc/cuda uses of CUDA, run by the host compiler: the real kernels, on a machine without a GPU.
//
// The threads of a block are coroutines on one host thread. They run one after another, warp by warp as far
// as each gets alone, and change at __syncthreads and at warp functions, so that every exchange between
// threads is the one CUDA promises; a kernel that needs a barrier which it lacks sees stale values here, in
// the order of the threads or, with `emulated::reverse`, in the opposite one. Not modelled: memory that lags
// between blocks, alignment faults, time.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#define ID3_EMULATED_CUDA 1
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __noinline__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};
struct uint4 {
  uint32_t x, y, z, w;
};
using cudaStream_t = void*;
using cudaError_t = int;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulated {

inline bool reverse = false;
inline int64_t launches = 0;
inline bool dry = false;  // launches are counted and not run
inline int device = 0, multiprocessors = 1;
constexpr int kBlocksAtOnce = 3;  // of a multiprocessor: small inputs take more than one stride
inline int reciprocal_ulps = 0;

// As the hardware's approximations: without subnormals, and so many ulp off.
inline float approximately(float r, float d) {
  constexpr float kInfinity = __builtin_inff(), kSmallest = 0x1p-126f;
  if (std::fabs(d) < kSmallest) return std::copysign(kInfinity, d);
  for (int i = 0; i < std::abs(reciprocal_ulps); ++i)
    r = std::nextafterf(r, reciprocal_ulps > 0 ? kInfinity : 0.0f);
  return std::fabs(r) < kSmallest ? std::copysign(0.0f, r) : r;
}
inline float reciprocal(float d) { return approximately(1 / d, d); }
inline float reciprocal_root(float d) {
  return approximately(static_cast<float>(1 / std::sqrt(double{d})), d);
}

class Block {
 public:
  Block(unsigned threads, std::function<void()> body) : body_(std::move(body)), fibers_(threads) {
    current_ = this;
    for (unsigned t = 0; t < threads; ++t) {
      getcontext(&fibers_[t].context);
      fibers_[t].context.uc_stack.ss_sp = stack(t);
      fibers_[t].context.uc_stack.ss_size = kStackBytes;
      fibers_[t].context.uc_link = &scheduler_;
      makecontext(&fibers_[t].context, &Block::enter, 0);
    }
  }

  void run() {
    const size_t warps = (fibers_.size() + 31) / 32;
    while (std::any_of(fibers_.begin(), fibers_.end(), [](const Fiber& f) { return !f.done; }))
      for (size_t i = 0; i < warps; ++i) run_warp(reverse ? warps - 1 - i : i);
  }

  // Both return when all threads of the block, or of the running one's warp, that have not ended are here.
  void meet_block() {
    fibers_[running_].at_barrier = true;
    meet(&Fiber::met_block, 0, fibers_.size());
    fibers_[running_].at_barrier = false;
  }
  void meet_warp() { meet(&Fiber::met_warp, running_ / 32 * 32, 32); }

  unsigned running() const { return running_; }
  unsigned threads() const { return fibers_.size(); }
  static Block& current() { return *current_; }
  uint64_t exchange[32][32];  // by warp and lane

 private:
  static constexpr size_t kStackBytes = 64 << 10;
  struct Fiber {
    ucontext_t context;
    uint64_t met_block = 0, met_warp = 0;
    bool done = false, at_barrier = false;
  };

  // As far as the warp gets without the others: what it must not do before them shows.
  void run_warp(size_t warp) {
    const size_t first = warp * 32, count = std::min<size_t>(32, fibers_.size() - first);
    for (bool goes_on = true; goes_on;) {
      goes_on = false;
      for (size_t i = 0; i < count; ++i) {
        const unsigned t = first + (reverse ? count - 1 - i : i);
        if (fibers_[t].done) continue;
        threadIdx.x = running_ = t;
        swapcontext(&scheduler_, &fibers_[t].context);
        goes_on |= !fibers_[t].done && !fibers_[t].at_barrier;
      }
    }
  }

  void meet(uint64_t Fiber::* met, size_t first, size_t count) {
    const uint64_t round = ++(fibers_[running_].*met);
    const auto all_here = [&] {
      for (size_t t = first; t < std::min(first + count, fibers_.size()); ++t)
        if (!fibers_[t].done && fibers_[t].*met < round) return false;
      return true;
    };
    while (!all_here()) yield();
  }

  // Kept from block to block: making them anew would take most of the time.
  static char* stack(size_t thread) {
    static std::vector<std::unique_ptr<char[]>> stacks;
    while (stacks.size() <= thread) stacks.emplace_back(new char[kStackBytes]);
    return stacks[thread].get();
  }

  void yield() {
    const unsigned t = running_;
    swapcontext(&fibers_[t].context, &scheduler_);
    threadIdx.x = running_ = t;
  }

  static void enter() {
    Block& block = *current_;
    block.body_();
    block.fibers_[block.running_].done = true;
  }

  inline static Block* current_ = nullptr;
  std::function<void()> body_;
  std::vector<Fiber> fibers_;
  ucontext_t scheduler_;
  unsigned running_ = 0;
};

// Every lane's value, once all lanes of the warp have given theirs.
template <class Value, class Use>
auto with_warp(Value mine, const Use& use) {
  Block& block = Block::current();
  const unsigned warp = block.running() / 32, lane = block.running() % 32;
  block.exchange[warp][lane] = static_cast<uint64_t>(mine);
  block.meet_warp();
  const auto result = use(block.exchange[warp], std::min(32u, block.threads() - warp * 32));
  block.meet_warp();
  return result;
}

}  // namespace emulated

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  ++emulated::launches;
  if (emulated::dry) return 0;
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  for (unsigned i = 0; i < gridDim.x; ++i) {
    blockIdx.x = emulated::reverse ? gridDim.x - 1 - i : i;
    emulated::Block(blockDim.x, [&] { kernel(args...); }).run();
  }
  return 0;
}

enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaGetDevice(int* device) {
  *device = emulated::device;
  return 0;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulated::multiprocessors;
  return 0;
}
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = emulated::kBlocksAtOnce;
  return 0;
}

inline void __syncthreads() { emulated::Block::current().meet_block(); }
inline void __threadfence() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline int __reduce_max_sync(unsigned, int value) {
  return emulated::with_warp(value, [](const uint64_t* lanes, unsigned n) {
    return *std::max_element(reinterpret_cast<const int64_t*>(lanes),
                             reinterpret_cast<const int64_t*>(lanes) + n);
  });
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulated::with_warp(vote, [](const uint64_t* lanes, unsigned n) {
    unsigned votes = 0;
    for (unsigned lane = 0; lane < n; ++lane) votes |= static_cast<unsigned>(lanes[lane] != 0) << lane;
    return votes;
  });
}

inline unsigned long long __shfl_sync(unsigned, unsigned long long value, int from) {
  return emulated::with_warp(value, [from](const uint64_t* lanes, unsigned) { return lanes[from]; });
}

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  const unsigned from = threadIdx.x % 32 ^ distance;
  bits = emulated::with_warp(
      bits, [from](const uint64_t* lanes, unsigned) { return static_cast<uint32_t>(lanes[from]); });
  __builtin_memcpy(&value, &bits, sizeof(bits));
  return value;
}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
inline int atomicMax(int* address, int value) {
  const int old = *address;
  *address = old < value ? value : old;
  return old;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

// A load of 16 bytes from an address that is no multiple of 16 is a fault on a GPU.
inline uint4 __ldcs(const uint4* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16) {
    std::fprintf(stderr, "misaligned 16-byte load\n");
    std::abort();
  }
  uint4 value;
  __builtin_memcpy(&value, address, 16);
  return value;
}

using std::fabs;
inline float fabsf(float x) { return std::fabs(x); }
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
