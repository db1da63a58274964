#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace id3::cpu {

// The memory of a tensor, addressed by row-major index. Borrows the tensor's sizes and strides.
struct Strided {
  const void* data = nullptr;
  c10::ScalarType dtype = c10::ScalarType::Undefined;
  int64_t numel = 0;
  bool contiguous = true;
  c10::IntArrayRef sizes, strides;

  Strided() = default;
  explicit Strided(const at::Tensor& t)
      : data(t.const_data_ptr()),
        dtype(t.scalar_type()),
        numel(t.numel()),
        contiguous(t.is_contiguous()),
        sizes(t.sizes()),
        strides(t.strides()) {}

  // The offset of the entry with this row-major index, in elements.
  int64_t place(int64_t index) const {
    if (contiguous) return index;
    int64_t place = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
      place += index % sizes[d] * strides[d];
      index /= sizes[d];
    }
    return place;
  }

  // out[i] = entry first + i: one division per row of the last dimension, none per entry.
  template <class T>
  void read(int64_t first, int64_t count, T* out) const {
    const T* from = static_cast<const T*>(data);
    if (contiguous) {
      std::copy_n(from + first, count, out);
      return;
    }
    const int64_t row = sizes.back(), stride = strides.back();
    while (count > 0) {
      const int64_t run = std::min(count, row - first % row);
      const T* start = from + place(first);
      for (int64_t i = 0; i < run; ++i) out[i] = start[i * stride];
      first += run, out += run, count -= run;
    }
  }
};

// The most entries of a block, so that its buffers stay in the first-level cache.
constexpr int64_t kBlock = 64;

// Calls use(offsets) with the offsets, in elements, of the `count` <= kBlock entries with these row-major
// indices: the int32 indices themselves for a contiguous tensor, else int64.
template <class Use>
void with_places(const Strided& t, const int32_t* indices, int64_t count, const Use& use) {
  if (t.contiguous) return use(indices);
  int64_t places[kBlock];
  for (int64_t i = 0; i < count; ++i) places[i] = t.place(indices[i]);
  use(static_cast<const int64_t*>(places));
}

// Prefetches single entries of a contiguous tensor. An index out of range does no harm.
class Prefetch {
 public:
  explicit Prefetch(const Strided& t)
      : base_(reinterpret_cast<uintptr_t>(t.data)), size_(static_cast<int64_t>(c10::elementSize(t.dtype))) {}

  void operator()(int64_t index) const {
    __builtin_prefetch(reinterpret_cast<const void*>(base_ + index * size_));
  }

 private:
  uintptr_t base_;
  int64_t size_;
};

}  // namespace id3::cpu
