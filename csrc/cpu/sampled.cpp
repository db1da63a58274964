#include "formulas/sampled.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "cpu/entries.h"
#include "cpu/transpose.h"

// Weight gradients at active entries alone: for each entry a sum over tokens of the product of two columns.
//
// A block of tokens is transposed, so that an entry is a dot product of two stretches of neighbours: all
// needed columns of `right` at once (2048 columns of bfloat16 are 512 KiB, which the second-level cache
// holds), those of `left` some at a time. Threads share blocks of tokens, and entries where there are fewer
// blocks than threads; neither changes a bit, as the order of the sums is fixed.
namespace id3::cpu {
namespace {

constexpr int64_t kPanelRows = 256;  // columns of `left`, rows of the weight, that are transposed at a time
constexpr int64_t kGrain = 8192;     // entries per thread below which starting a thread costs more

// The lanes of a sum, or as many neighbouring items. Of float32 and float64 `first` has the lower lanes; of
// bfloat16 the even ones, which one shift widens, `second` the odd ones.
template <class Value>
struct Lanes {
  typedef Value Half __attribute__((vector_size(kLanes / 2 * sizeof(Value))));
  Half first, second;
};

// Half by half: as one copy it would pass through memory where a half is wider than a register.
template <class Value>
ID3_INLINE void load(const Value* items, Lanes<Value>& out) {
  std::memcpy(&out.first, items, sizeof(out.first));
  std::memcpy(&out.second, items + kLanes / 2, sizeof(out.second));
}

ID3_INLINE void load(const uint16_t* bfloat16, Lanes<float>& out) {
  typedef uint32_t Pairs __attribute__((vector_size(2 * kLanes)));
  Pairs pairs;
  std::memcpy(&pairs, bfloat16, sizeof(pairs));
  out.first = reinterpret_cast<typename Lanes<float>::Half>(pairs << 16);
  out.second = reinterpret_cast<typename Lanes<float>::Half>(pairs & 0xffff0000u);
}

// Steps 3 and 4 of formulas/sampled.h.
template <class Item, class Value>
ID3_INLINE Value folded(const Lanes<Value>& lanes) {
  Value sums[kLanes];
  if constexpr (sizeof(Item) == 2) {
    const typename Lanes<Value>::Half pairs = lanes.first + lanes.second;
    std::memcpy(sums, &pairs, sizeof(pairs));
  } else {
    std::memcpy(sums, &lanes, sizeof(sums));
    for (int j = 0; j < kLanes / 2; ++j) sums[j] = sums[2 * j] + sums[2 * j + 1];
  }
#pragma GCC unroll 4
  for (int half = kLanes / 4; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  return sums[0];
}

// Neighbouring entries of one run: they lie in one row of the weight.
struct Stretch {
  int64_t first;
  int32_t row, count;
};

// sums = the block's sum of each entry of the stretches [begin, end). panel: the tokens of the columns of
// `left` from `first_row` on; right: the tokens of all columns, of which there are `columns`.
struct StretchSums {
  template <class Item, class Value>
  ID3_INLINE static void run(const Stretch* begin, const Stretch* end, const int32_t* indices,
                             const Item* panel, int64_t first_row, const Item* right, int64_t columns,
                             Value* sums) {
    for (; begin < end; sums += begin++->count)
      row(panel + (begin->row - first_row) * kBlockTokens, right, indices + begin->first, begin->count,
          begin->row * columns, sums);
  }

 private:
  template <class Item, class Value>
  ID3_INLINE static void row(const Item* left, const Item* right, const int32_t* indices, int64_t count,
                             int64_t first_index, Value* sums) {
    constexpr int kSteps = kBlockTokens / kLanes;
    Lanes<Value> mine[kSteps];
    for (int i = 0; i < kSteps; ++i) load(left + i * kLanes, mine[i]);
    for (int64_t e = 0; e < count; ++e) {
      const Item* column = right + (indices[e] - first_index) * kBlockTokens;
      Lanes<Value> other, sum;
      load(column, other);
      sum.first = mine[0].first * other.first, sum.second = mine[0].second * other.second;
#pragma GCC unroll 4
      for (int i = 1; i < kSteps; ++i) {
        load(column + i * kLanes, other);
        sum.first += mine[i].first * other.first, sum.second += mine[i].second * other.second;
      }
      sums[e] = folded<Item>(sum);
    }
  }
};

// A part of the entries, and the groups of columns of `right` that these need.
struct Share {
  std::vector<Stretch> stretches;
  std::vector<uint8_t> wanted;

  void take(const int32_t* indices, int64_t first, int64_t last, int64_t columns) {
    for (int64_t end; first < last; first = end) {
      const int64_t row = indices[first] / columns, begin = row * columns;
      for (end = first; end < last && static_cast<uint32_t>(indices[end] - begin) < columns; ++end)
        wanted[(indices[end] - begin) / kTileColumns] = 1;
      stretches.push_back({first, static_cast<int32_t>(row), static_cast<int32_t>(end - first)});
    }
  }
};

// [tokens, columns], the columns of a token side by side.
template <class From>
struct Matrix {
  TokenRows<From> rows;

  explicit Matrix(const at::Tensor& t)
      : rows{static_cast<const From*>(t.const_data_ptr()), t.stride(0), t.size(0), t.size(1)} {}

  TokenRows<From> block(int64_t number, int64_t column, int64_t columns) const {
    const int64_t token = number * kBlockTokens;
    return {rows.data + token * rows.stride + column, rows.stride, rows.tokens - token,
            std::min(columns, rows.columns - column)};
  }
};

int64_t groups(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// From: the items of the matrices; Item: the same transposed; Value: of the arithmetic.
template <class From, class Item, class Value>
class SampledProduct {
 public:
  SampledProduct(const at::Tensor& left, const at::Tensor& right, const RunsView& entries)
      : left_(left),
        right_(right),
        entries_(entries),
        blocks_(token_blocks(left.size(0))),
        sums_(at::empty({blocks_, entries.count()}, at::CppTypeToScalarType<Value>::value)) {}

  void run(Value* values, bool add) const {
    const int64_t shares = std::max<int64_t>(at::get_num_threads() / blocks_, 1), length = entries_.length();
    std::vector<Piece> pieces;
    std::vector<size_t> first_piece{0};
    for (int64_t share = 0; share < shares; ++share) {
      cut(length * share / shares, length * (share + 1) / shares, pieces);
      first_piece.push_back(pieces.size());
    }
    at::parallel_for(0, shares * blocks_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t next; begin < end; begin = next) {
        const int64_t share = begin / blocks_;
        next = std::min(end, (share + 1) * blocks_);
        sum({pieces.begin() + first_piece[share], pieces.begin() + first_piece[share + 1]},
            begin - share * blocks_, next - share * blocks_);
      }
    });
    at::parallel_for(0, pieces.size(), kGrain / kPiece, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) add_up(pieces[i], values, add);
    });
  }

 private:
  // Entries [first, last) of `indices`, whose sums stand at `at` of every block.
  struct Piece {
    int64_t first, last, at;
  };
  static constexpr int64_t kPiece = 2048;

  void cut(int64_t begin, int64_t end, std::vector<Piece>& pieces) const {
    int64_t at = entries_.before(begin);
    entries_.for_each_segment(begin, end, [&](int64_t, int64_t first, int64_t last) {
      check_index_range(entries_.indices + first, last - first, left_.rows.columns * right_.rows.columns, 0);
      for (; first < last; first += kPiece) {
        const int64_t count = std::min(kPiece, last - first);
        pieces.push_back({first, first + count, at});
        at += count;
      }
    });
  }

  void sum(const std::vector<Piece>& pieces, int64_t block, int64_t end) const {
    if (pieces.empty()) return;
    Share share{{}, std::vector<uint8_t>(groups(right_.rows.columns))};
    for (const Piece& piece : pieces)
      share.take(entries_.indices, piece.first, piece.last, right_.rows.columns);
    const at::Tensor panel = scratch(kPanelRows), right = scratch(right_.rows.columns);
    for (; block < end; ++block) {
      run_simd<TransposeBlock>(right_.block(block, 0, right_.rows.columns), share.wanted.data(),
                               items(right));
      Value* out = sums_.template mutable_data_ptr<Value>() + block * sums_.size(1) + pieces.front().at;
      for (size_t i = 0; i < share.stretches.size();)
        i = sum_panel(share.stretches, i, block, items(panel), items(right), out);
    }
  }

  // The sums of the stretches from i on that lie in the same panel as i; returns the first one behind.
  size_t sum_panel(const std::vector<Stretch>& stretches, size_t i, int64_t block, Item* panel,
                   const Item* right, Value*& out) const {
    const int64_t first_row = stretches[i].row / kPanelRows * kPanelRows;
    uint8_t wanted[kPanelRows / kTileColumns] = {};
    size_t end = i;
    for (; end < stretches.size() && stretches[end].row / kPanelRows * kPanelRows == first_row; ++end)
      wanted[(stretches[end].row - first_row) / kTileColumns] = 1;
    run_simd<TransposeBlock>(left_.block(block, first_row, kPanelRows), wanted, panel);
    const Stretch* all = stretches.data();
    run_simd<StretchSums>(all + i, all + end, entries_.indices, static_cast<const Item*>(panel), first_row,
                          right, right_.rows.columns, out);
    for (; i < end; ++i) out += all[i].count;
    return end;
  }

  // values = or += the sums of all blocks.
  void add_up(const Piece& piece, Value* values, bool add) const {
    const int64_t count = piece.last - piece.first;
    Value totals[kPiece], *out = values + piece.first;
    const Value* sums = sums_.template const_data_ptr<Value>() + piece.at;
    std::copy_n(sums, count, totals);
    for (int64_t block = 1; block < blocks_; ++block) {
      sums += sums_.size(1);
      for (int64_t e = 0; e < count; ++e) totals[e] += sums[e];
    }
    for (int64_t e = 0; e < count; ++e) out[e] = add ? out[e] + totals[e] : totals[e];
  }

  static at::Tensor scratch(int64_t columns) {
    const int64_t bytes = groups(columns) * kTileColumns * kBlockTokens * sizeof(Item);
    return at::empty({bytes}, at::kByte);
  }
  static Item* items(const at::Tensor& scratch) { return static_cast<Item*>(scratch.mutable_data_ptr()); }

  Matrix<From> left_, right_;
  const RunsView& entries_;
  int64_t blocks_;
  at::Tensor sums_;  // [blocks, entries]
};

// The columns of a token side by side: as they are, or a copy.
at::Tensor token_rows(const at::Tensor& t) { return t.size(1) < 2 || t.stride(1) == 1 ? t : t.contiguous(); }

template <class From, class Item, class Value>
void sampled(const at::Tensor& left, const at::Tensor& right, const RunsView& entries,
             const at::Tensor& values, bool add) {
  check_vector("values", values, at::CppTypeToScalarType<Value>::value, entries.end());
  const at::Tensor left_rows = token_rows(left), right_rows = token_rows(right);
  SampledProduct<From, Item, Value>(left_rows, right_rows, entries)
      .run(values.template mutable_data_ptr<Value>(), add);
}

void sampled_weight_grad_cpu(const at::Tensor& left, const at::Tensor& right, const at::Tensor& offsets,
                             const at::Tensor& indices, const at::Tensor& values, bool add) {
  check_float_tensor("left", left);
  check_float_tensor("right", right);
  TORCH_CHECK_VALUE(left.dim() == 2 && right.dim() == 2 && left.size(0) == right.size(0),
                    "right: expected as many tokens as left, got ", shape_text(left.sizes()), " and ",
                    shape_text(right.sizes()));
  const auto dtype = left.scalar_type();
  TORCH_CHECK_VALUE(right.scalar_type() == dtype, "right: expected ", dtype, " as left, got ",
                    right.scalar_type());
  TORCH_CHECK_VALUE(left.size(1) * right.size(1) <= std::numeric_limits<int32_t>::max(),
                    "right: expected a weight of fewer than 2^31 entries, got ",
                    left.size(1) * right.size(1));
  const RunsView entries = view_runs("", offsets, indices, 1);
  const auto product = dtype == at::kFloat      ? sampled<float, float, float>
                       : dtype == at::kBFloat16 ? sampled<uint16_t, uint16_t, float>
                       : dtype == at::kHalf     ? sampled<c10::Half, float, float>
                                                : sampled<double, double, double>;
  product(left, right, entries, values, add);
}

}  // namespace

TORCH_LIBRARY_IMPL(id3, CPU, m) { m.impl("sampled_weight_grad_", &sampled_weight_grad_cpu); }

}  // namespace id3::cpu
