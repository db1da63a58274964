#pragma once

#include <string>
#include <utility>
#include <vector>

// One build runs on every machine. A kernel's body is an always_inline template; the wrappers below compile
// it once per instruction set, and the choice is made at run time. Contraction is off, so all give the same
// bits.
#define ID3_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define ID3_AVX2 __attribute__((target("avx2")))
#if defined(__clang__)
#define ID3_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"), min_vector_width(512)))
#else
#define ID3_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif
#endif

namespace id3::cpu {

enum class SimdLevel { portable, avx2, avx512 };

SimdLevel simd_level();
std::string simd_level_name();
std::vector<std::string> simd_levels_here();  // the levels that this machine can run
// Returns the previous level. ValueError if this machine cannot run `name`. For tests: not thread-safe.
std::string set_simd_level(const std::string& name);

#if defined(__x86_64__)
template <class Body, class... Args>
ID3_AVX512 void run_avx512(Args&&... args) {
  Body::run(std::forward<Args>(args)...);
}

template <class Body, class... Args>
ID3_AVX2 void run_avx2(Args&&... args) {
  Body::run(std::forward<Args>(args)...);
}
#endif

// Body::run(args...), compiled for the best instruction set that this machine has. Body::run and all that its
// inner loops call must be ID3_INLINE.
template <class Body, class... Args>
void run_simd(Args&&... args) {
#if defined(__x86_64__)
  const SimdLevel level = simd_level();
  if (level == SimdLevel::avx512) return run_avx512<Body>(std::forward<Args>(args)...);
  if (level == SimdLevel::avx2) return run_avx2<Body>(std::forward<Args>(args)...);
#endif
  Body::run(std::forward<Args>(args)...);
}

}  // namespace id3::cpu
