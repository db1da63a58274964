// The launchers of csrc/cuda as C functions, for ctypes. All pointers are host memory.

#include <vector>

#include "cuda/collect.h"
#include "cuda/entries.h"
#include "cuda/norm.h"
#include "cuda/sampled.h"
#include "cuda/selection.h"
#include "cuda/update.h"

using namespace id3::cuda;

static TokenMatrix token_matrix(const void* data, const int64_t* sizes, int32_t dtype) {
  return {data, static_cast<DType>(dtype), sizes[0], sizes[1], sizes[2], sizes[3]};
}

extern "C" {

void set_reverse(int reverse) { emulated::reverse = reverse; }

void set_dry(int dry) { emulated::dry = dry; }

void set_reciprocal_ulps(int ulps) { emulated::reciprocal_ulps = ulps; }

int64_t chunks_of_emulated(int64_t numel) { return chunks_of(numel); }

void d3_score_emulated(const TensorRow* row, int64_t numel, float eps, double exp, float* scores) {
  d3_score(*row, numel, eps, exp, scores, nullptr);
}

// Kernels launched so far.
int64_t launches_emulated() { return emulated::launches; }

// Returns the form of the selection.
int select_topk_emulated(const TensorRow* rows, int32_t tensors, int32_t runs, int64_t stride,
                         const int64_t* offsets, const int32_t* indices, const int64_t* k, int64_t capacity,
                         float eps, double exp, int given, int64_t* out_offsets, int32_t* out_indices,
                         float* out_scores) {
  std::vector<TensorRow> cut(rows, rows + tensors), stored(tensors);
  const ChunkLayout layout = cut_into_chunks(cut);
  store_rows(cut.data(), tensors, stored.data(), nullptr);
  const Form form = form_of(capacity, layout.tiles());
  const int64_t n = most_ranked(form, capacity, layout);
  std::vector<Chunk> chunks(layout.n_chunks,
                            Chunk{0, 0, kShortChunk, nullptr, nullptr});  // read before it is made: seen
  std::vector<Span> spans(layout.n_chunks * runs + 1);
  std::vector<int64_t> slots(capacity + 1);
  std::vector<int32_t> maxima(layout.tiles() + 1), tiles(capacity + 1),
      keys(form == Form::stored ? capacity * kTile : 0);
  std::vector<unsigned> histogram(kBins);
  std::vector<BlockCount> counts(topk_blocks(n) + 1);
  TopkState state{};
  int64_t n_tiles = -1, n_slots = -1;
  const Candidates candidates{stored.data(),         chunks.data(),
                              spans.data(),          layout.n_chunks,
                              layout.chunk_length,   {offsets, indices, stride, tensors, runs},
                              {eps, exp, given != 0}};
  const SelectionWorkspace workspace{{&state, histogram.data(), counts.data()},
                                     maxima.data(),
                                     tiles.data(),
                                     keys.data(),
                                     slots.data(),
                                     &n_tiles,
                                     &n_slots};
  select_topk(candidates, k, workspace, {out_offsets, out_indices, out_scores, capacity}, nullptr);
  for (const unsigned bin : histogram)
    if (bin) return -1;  // the next call relies on it
  if (state.arrived || state.threshold || state.all) return -2;
  return static_cast<int>(form);
}

// Returns the slots and writes the length of the state.
int64_t candidate_room_emulated(int64_t k, int64_t* state) {
  const CandidateRoom room = candidate_room(k);
  *state = room.state;
  return room.slots;
}

int64_t cut_state_length() { return sizeof(CutState) / sizeof(int64_t); }

int64_t least_slots_of_grid() { return kLeastSlotsOfGrid; }

int64_t most_wanted_emulated(int64_t slots) { return most_wanted(slots); }

int64_t tile_emulated() { return kTile; }

int64_t row_bytes_emulated() { return sizeof(TensorRow); }

int64_t collect_state_length() { return sizeof(CollectState) / sizeof(int64_t); }

// score: null, or the row of a tensor of scores. state null: nothing but the values is taken.
void collect_emulated(const TensorRow* row, const TensorRow* score, int32_t runs, int64_t stride,
                      const int64_t* offsets, const int32_t* indices, int64_t most_active, float* values,
                      int add, int64_t place, float* best_score, int64_t* best_place, float* best_grad,
                      int64_t room, void* state, const int64_t* k, float eps, double exp, int by_grid) {
  std::vector<int64_t> kept(by_grid ? 2 * (room / 2) : 0);
  const int64_t chunks = chunks_of(row->numel);
  std::vector<Span> spans(chunks * runs + 1, Span{-1, -1});
  std::vector<int32_t> maxima(chunks * (kShortChunk / kTile) + 1, 0x7fffffff);
  collect({score ? *score : *row,
           row->grad,
           row->grad_dtype,
           {eps, exp, score != nullptr},
           {offsets, indices, stride, 1, runs},
           values,
           add != 0,
           most_active,
           place,
           {best_score, best_place, best_grad},
           by_grid && room > 1 ? slots_at(kept.data(), room / 2) : Slots{},
           {k, most_wanted(room)},
           room,
           static_cast<CollectState*>(state),
           spans.data(),
           maxima.data()},
          nullptr);
}

// Writes {offset, tensor, length} of each chunk and returns how many there are; chunks may be null to count.
int64_t chunks_emulated(TensorRow* rows, int32_t tensors, const int64_t* offsets, const int32_t* indices,
                        int64_t* chunks, int32_t* chunk_length) {
  std::vector<TensorRow> cut(rows, rows + tensors);
  const ChunkLayout layout = cut_into_chunks(cut);
  *chunk_length = layout.chunk_length;
  for (int64_t i = 0; chunks && i < layout.n_chunks; ++i) {
    const Chunk chunk = chunk_at(cut.data(), tensors, layout.chunk_length, i);
    const Span span = span_at({offsets, indices, tensors}, chunk.tensor, chunk.offset, chunk.length);
    for (const int64_t x : {chunk.offset, int64_t{chunk.tensor}, int64_t{chunk.length}, span.begin, span.end})
      *chunks++ = x;
  }
  return layout.n_chunks;
}

// Of a kernel of which each multiprocessor holds so many blocks.
void idle_kernel() {}
int64_t blocks_for_emulated(int64_t items, int per_block) { return blocks_for(idle_kernel, items, per_block); }

// The GPU at hand; each has its own number of multiprocessors.
void set_device(int device, int multiprocessors) {
  emulated::device = device;
  emulated::multiprocessors = multiprocessors;
}

void gather_emulated(const TensorRow* rows, int32_t tensors, const int64_t* offsets, const int32_t* indices,
                     int64_t n, int item_bytes, void* values) {
  gather(rows, {offsets, indices, tensors}, n, item_bytes, values, nullptr);
}

void scatter_emulated(const TensorRow* rows, int32_t tensors, const int64_t* offsets, const int32_t* indices,
                      int64_t n, int item_bytes, const void* values) {
  scatter(rows, {offsets, indices, tensors}, n, item_bytes, values, nullptr);
}

double squared_norm_emulated(const TensorRow* rows, int32_t tensors, int32_t runs, int64_t stride,
                             const int64_t* offsets, const int32_t* indices, int64_t n) {
  std::vector<float> values(n + 1, std::nanf(""));  // one that was never written shows
  NormState state{};
  double sum = -1;
  squared_norm(rows, {offsets, indices, stride, tensors, runs}, n, values.data(), &state, &sum, nullptr);
  return sum;
}

// sizes of each matrix: token_stride, column_stride, tokens, columns.
void sampled_weight_grad_emulated(const void* left, const int64_t* left_sizes, const void* right,
                                  const int64_t* right_sizes, int32_t dtype, int32_t runs, int64_t stride,
                                  const int64_t* offsets, const int32_t* indices, int64_t n, float* values,
                                  int add) {
  const TokenMatrix a = token_matrix(left, left_sizes, dtype), b = token_matrix(right, right_sizes, dtype);
  std::vector<float> turned_left(a.columns * a.padded_tokens() + 1, std::nanf("")),
      turned_right(b.columns * b.padded_tokens() + 1, std::nanf(""));
  sampled_weight_grad(a, b, turned_left.data(), turned_right.data(), {offsets, indices, stride, 1, runs}, n,
                      values, add != 0, nullptr);
}

void sampled_embedding_grad_emulated(const void* grad, const int64_t* sizes, int32_t dtype,
                                     const int64_t* ids, const int64_t* tokens, int32_t runs, int64_t stride,
                                     const int64_t* offsets, const int32_t* indices, int64_t n, float* values,
                                     int add) {
  sampled_embedding_grad(token_matrix(grad, sizes, dtype), ids, tokens, {offsets, indices, stride, 1, runs},
                         n, values, add != 0, nullptr);
}

// arrays, added: n_arrays pointers to room and room_added items of item_bytes each; added may be null.
void join_emulated(void** arrays, const void** added, const int32_t* item_bytes, int32_t n_arrays,
                   int64_t room, int64_t* offsets, int32_t tensors, const int64_t* b_offsets,
                   const int32_t* b_indices, int64_t room_added) {
  Join args{};
  std::vector<std::vector<char>> scratch;
  unsigned arrived = 7;
  for (int32_t a = 0; a < n_arrays; ++a) {
    scratch.emplace_back(room * item_bytes[a]);
    args.arrays[a] = {arrays[a], scratch.back().data(), added[a], item_bytes[a]};
  }
  args.n_arrays = n_arrays;
  args.offsets = offsets;
  args.added = {b_offsets, b_indices, tensors};
  args.arrived = &arrived;
  args.room = room;
  args.room_added = room_added;
  join(args, nullptr);
}

void adamw_emulated(const TensorRow* rows, int32_t tensors, int32_t runs, int64_t stride,
                    const int64_t* offsets, const int32_t* indices, int64_t n, const void* values,
                    int32_t values_dtype, float* exp_avg, float* exp_avg_sq, float* master, int32_t* age,
                    const int64_t* step, double lr, double beta1, double beta2, double eps,
                    double weight_decay, int maximize, const float* grad_scale, const float* found_inf,
                    const float* clip, const void* tensor_lr, int lr_is_double) {
  constexpr int64_t kLongest = 5000;
  std::vector<double> unbiased(kLongest + 1, 1.0);
  std::vector<float> root(kLongest + 1, 1.0f);
  for (int64_t s = 1; s <= kLongest; ++s) {
    unbiased[s] = 1.0 - std::pow(beta1, static_cast<double>(s));
    root[s] = static_cast<float>(std::sqrt(1.0 - std::pow(beta2, static_cast<double>(s))));
  }
  Update u{rows,
           {offsets, indices, stride, tensors, runs},
           values,
           static_cast<DType>(values_dtype),
           exp_avg,
           exp_avg_sq,
           master,
           age,
           step,
           {{unbiased.data(), kLongest}, {root.data(), kLongest}},
           lr,
           weight_decay,
           id3::adamw_scalars(lr, beta1, beta2, eps, weight_decay, maximize != 0),
           {grad_scale, false},
           {found_inf, false},
           {clip, false},
           {tensor_lr, lr_is_double != 0}};
  adamw(u, n, nullptr);
}

}  // extern "C"
