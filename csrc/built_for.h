#pragma once

#include <torch/version.h>

namespace id3 {

// id3_kernels/extension.py searches an extension's file for this text, because an extension that was compiled
// for another torch must not be loaded.
[[gnu::used]] inline constexpr char built_for[] = "id3_kernels built for torch " TORCH_VERSION;

}  // namespace id3
