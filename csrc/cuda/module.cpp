#include <torch/extension.h>

#include <string>

#include "built_for.h"

// Importing the module registers the kernels; id3_kernels/table.py has their schemas.
PYBIND11_MODULE(_cuda, m) {
  m.attr("__doc__") = "The CUDA kernels of id3_kernels, as torch.ops.id3_cuda.";
  m.attr("built_for") = std::string(id3::built_for);
}
