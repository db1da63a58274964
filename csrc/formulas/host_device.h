#pragma once

// Inlining is forced because a formula is compiled for AVX-512 or AVX2 only as part of the function that has
// the target attribute.
#if defined(__CUDACC__)
#define ID3_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ID3_HOST_DEVICE inline __attribute__((always_inline))
#endif
