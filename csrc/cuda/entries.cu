#include "cuda/entries.h"

namespace id3::cuda {
namespace {

template <class Bits>
__global__ void gather_kernel(const TensorRow* rows, EntriesView entries, int64_t n, Bits* values) {
  const int64_t held = entries.end();
  for (int64_t at = thread_in_grid(); at < n; at += threads_in_grid())
    values[at] = at < held ? static_cast<const Bits*>(rows[entries.owner(at)].param)[entries.indices[at]] : 0;
}

template <class Bits>
__global__ void scatter_kernel(const TensorRow* rows, EntriesView entries, const Bits* values) {
  for (int64_t at = thread_in_grid(); at < entries.end(); at += threads_in_grid())
    static_cast<Bits*>(rows[entries.owner(at)].param)[entries.indices[at]] = values[at];
}

// visit(Bits()) for the unsigned integer as wide as an item.
template <class Visit>
void with_bits(int item_bytes, const Visit& visit) {
  if (item_bytes == 2) return visit(uint16_t());
  if (item_bytes == 4) return visit(uint32_t());
  visit(uint64_t());
}

// --- join --------------------------------------------------------------------------------------------------

__device__ __forceinline__ int64_t held_count(const Join& j) { return j.offsets[j.added.tensors]; }

// How many entries there will be; 0 where nothing is to be done.
__device__ __forceinline__ int64_t joined_count(const Join& j) {
  const int64_t added = j.added.count(), joined = held_count(j) + added;
  return added > 0 && added <= j.room_added && joined <= j.room ? joined : 0;
}

// How many new entries lie before place `at` of the set.
__device__ __forceinline__ int64_t added_before(const Join& j, int64_t at) {
  const EntriesView held{j.offsets, static_cast<const int32_t*>(j.arrays[0].array), j.added.tensors};
  const int32_t tensor = held.owner(at);
  const int64_t* own = j.added.offsets + tensor;
  return lower_bound(j.added.indices, own[0], own[1], held.indices[at]);
}

// How many entries of the set lie before new entry `i`.
__device__ __forceinline__ int64_t held_before(const Join& j, int64_t i) {
  const int64_t* own = j.offsets + j.added.owner(i);
  return lower_bound(static_cast<const int32_t*>(j.arrays[0].array), own[0], own[1], j.added.indices[i]);
}

template <class Bits>
__device__ __forceinline__ void copy_item(void* to, int64_t to_place, const void* from, int64_t place) {
  static_cast<Bits*>(to)[to_place] = from ? static_cast<const Bits*>(from)[place] : Bits(0);
}

// from null: zeros.
__device__ __forceinline__ void copy(int item_bytes, void* to, int64_t to_place, const void* from,
                                     int64_t place) {
  if (item_bytes == 1) copy_item<uint8_t>(to, to_place, from, place);
  if (item_bytes == 2) copy_item<uint16_t>(to, to_place, from, place);
  if (item_bytes == 4) copy_item<uint32_t>(to, to_place, from, place);
  if (item_bytes == 8) copy_item<uint64_t>(to, to_place, from, place);
}

// Every entry to its new place in the scratch arrays.
__global__ void spread_kernel(Join j) {
  const int64_t held = held_count(j), joined = joined_count(j);
  if (thread_in_grid() == 0) *j.arrived = 0;
  for (int64_t i = thread_in_grid(); i < joined; i += threads_in_grid()) {
    const bool is_new = i >= held;
    const int64_t from = is_new ? i - held : i,
                  to = from + (is_new ? held_before(j, from) : added_before(j, i));
    for (int a = 0; a < j.n_arrays; ++a) {
      const JoinArray array = j.arrays[a];
      copy(array.item_bytes, array.scratch, to, is_new ? array.added : array.array, from);
    }
  }
}

// The block that is done last changes the offsets, which all blocks have read by then.
__global__ void copy_back_kernel(Join j) {
  const int64_t joined = joined_count(j);
  for (int64_t i = thread_in_grid(); i < joined; i += threads_in_grid())
    for (int a = 0; a < j.n_arrays; ++a)
      copy(j.arrays[a].item_bytes, j.arrays[a].array, i, j.arrays[a].scratch, i);
  if (!is_last_block(j.arrived) || joined == 0) return;
  for (int i = threadIdx.x; i <= j.added.tensors; i += kThreads) j.offsets[i] += j.added.offsets[i];
}

}  // namespace

void gather(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, void* values,
            cudaStream_t stream) {
  with_bits(item_bytes, [&](auto bits) {
    using Bits = decltype(bits);
    launch(gather_kernel<Bits>, Items{n}, stream, rows, entries, n, static_cast<Bits*>(values));
  });
}

void scatter(const TensorRow* rows, EntriesView entries, int64_t n, int item_bytes, const void* values,
             cudaStream_t stream) {
  with_bits(item_bytes, [&](auto bits) {
    using Bits = decltype(bits);
    launch(scatter_kernel<Bits>, Items{n}, stream, rows, entries, static_cast<const Bits*>(values));
  });
}

void join(const Join& join, cudaStream_t stream) {
  launch(spread_kernel, Items{join.room}, stream, join);
  launch(copy_back_kernel, Items{join.room}, stream, join);
}

}  // namespace id3::cuda
