#include "cpu/simd.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>

namespace id3::cpu {
namespace {

const std::vector<std::string> kNames = {"default", "avx2", "avx512"};  // in the order of SimdLevel

SimdLevel best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return SimdLevel::avx512;
  if (__builtin_cpu_supports("avx2")) return SimdLevel::avx2;
#endif
  return SimdLevel::portable;
}

SimdLevel level_in_use = best_level();

}  // namespace

SimdLevel simd_level() { return level_in_use; }

std::string simd_level_name() { return kNames[static_cast<size_t>(level_in_use)]; }

std::vector<std::string> simd_levels_here() {
  return {kNames.begin(), kNames.begin() + static_cast<int>(best_level()) + 1};
}

std::string set_simd_level(const std::string& name) {
  const auto here = simd_levels_here();
  const auto found = std::find(here.begin(), here.end(), name);
  TORCH_CHECK_VALUE(found != here.end(), "simd level: expected one of ", c10::Join(", ", here),
                    " on this machine, got ", name);
  std::string previous = simd_level_name();
  level_in_use = static_cast<SimdLevel>(found - here.begin());
  return previous;
}

}  // namespace id3::cpu
