#include <torch/extension.h>

#include <string>

#include "built_for.h"

// ID3_IMAGES comes from setup.py: sm_80,compute_80
#define ID3_TEXT(list) ID3_TEXT_OF(list)
#define ID3_TEXT_OF(...) #__VA_ARGS__

// Importing the module registers the kernels; id3_kernels/table.py has their schemas.
PYBIND11_MODULE(_cuda, m) {
  m.attr("__doc__") = "The CUDA kernels of id3_kernels, as torch.ops.id3_cuda.";
  m.attr("built_for") = std::string(id3::built_for);
  m.attr("images") = ID3_TEXT(ID3_IMAGES);
}
