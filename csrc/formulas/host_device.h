#pragma once

// Forced inlining is part of the meaning on the CPU: a formula is compiled for AVX-512 or AVX2 only when it
// becomes part of the function that carries the target attribute.
#if defined(__CUDACC__)
#define ID3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ID3_HOST_DEVICE inline __attribute__((always_inline))
#endif
