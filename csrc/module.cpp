#include <ATen/Parallel.h>
#include <torch/extension.h>

#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "built_for.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace {

// The number of threads that at::parallel_for uses in this extension: without OpenMP it silently uses one.
size_t threads_in_parallel_for() {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["built_for"] = std::string(id3::built_for);
  info["compiler"] = std::string(__VERSION__);
  info["simd_levels"] = id3::cpu::simd_levels_here();
  info["simd_level"] = id3::cpu::simd_level_name();
  info["tile"] = id3::cpu::kTile;
  info["threads"] = threads_in_parallel_for();
  return info;
}

}  // namespace

// Importing the module registers the kernels; the functions are for tests and for `id3-optim env`.
PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "built_for (a torch), compiler, simd_levels (of this machine), simd_level, threads, tile (entries)");
  m.def("set_simd_level", &id3::cpu::set_simd_level, pybind11::arg("name"),
        "Forces an instruction set of build_info()['simd_levels'] and returns the previous one. For tests.");
}
