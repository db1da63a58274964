#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/convert.h"
#include "cpu/simd.h"
#include "formulas/sampled.h"

// One block of tokens of a matrix [tokens, columns], turned so that a column's tokens are neighbours.
namespace id3::cpu {

template <class Item>
struct Vector16 {
  typedef Item type __attribute__((vector_size(16)));
};

// 16 bytes: what a shuffle of every instruction set takes.
template <class Item>
using Vector = typename Vector16<Item>::type;

ID3_INLINE Vector<double> zip_low(Vector<double> a, Vector<double> b) {
  return __builtin_shufflevector(a, b, 0, 2);
}
ID3_INLINE Vector<double> zip_high(Vector<double> a, Vector<double> b) {
  return __builtin_shufflevector(a, b, 1, 3);
}
ID3_INLINE Vector<float> zip_low(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
}
ID3_INLINE Vector<float> zip_high(Vector<float> a, Vector<float> b) {
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
}
ID3_INLINE Vector<uint16_t> zip_low(Vector<uint16_t> a, Vector<uint16_t> b) {
  return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}
ID3_INLINE Vector<uint16_t> zip_high(Vector<uint16_t> a, Vector<uint16_t> b) {
  return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// Turns a square whose rows are vectors. Row i zipped with row i + N/2, log N times, is the transpose.
template <class Item>
ID3_INLINE void transpose_square(const Item* from, int64_t from_stride, Item* to, int64_t to_stride) {
  constexpr int kSide = 16 / sizeof(Item);
  Vector<Item> rows[kSide], zipped[kSide];
  for (int i = 0; i < kSide; ++i) std::memcpy(&rows[i], from + i * from_stride, 16);
  for (int round = 1; round < kSide; round *= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      zipped[2 * i] = zip_low(rows[i], rows[i + kSide / 2]);
      zipped[2 * i + 1] = zip_high(rows[i], rows[i + kSide / 2]);
    }
    for (int i = 0; i < kSide; ++i) rows[i] = zipped[i];
  }
  for (int i = 0; i < kSide; ++i) std::memcpy(to + i * to_stride, &rows[i], 16);
}

// A tile has whole squares, and writes a whole cache line of each of its columns.
constexpr int64_t kTileColumns = 8;
template <class Item>
constexpr int64_t kTileTokens = 64 / sizeof(Item);

// The tokens of a block, each `stride` items behind the one before.
template <class Item>
struct TokenRows {
  const Item* data;
  int64_t stride, tokens, columns;
};

// to[column · kBlockTokens + token], with zeros for what lies outside the matrix. wanted: one byte per
// kTileColumns columns; 0 where none of them is read. `to` has room for the columns of all these groups.
// bfloat16 is moved by its bits (From = To = uint16_t); where From is not To, items are widened.
struct TransposeBlock {
  template <class From, class To>
  ID3_INLINE static void run(const TokenRows<From>& rows, const uint8_t* wanted, To* to) {
    for (int64_t t = 0; t < kBlockTokens; t += kTileTokens<To>)
      for (int64_t c = 0; c < rows.columns; c += kTileColumns)
        if (wanted[c / kTileColumns]) {
          if (c % kLine<From> == 0) prefetch<kTileTokens<To>>(rows, t, c + kAhead * kLine<From>);
          tile(rows, t, c, to + c * kBlockTokens + t);
        }
  }

 private:
  template <class From>
  static constexpr int64_t kLine = 64 / sizeof(From);  // items of a cache line
  static constexpr int64_t kAhead = 4;                 // lines

  // Of all rows of a tile, as a processor follows fewer of them by itself. A place outside does no harm.
  template <int64_t kTokens, class From>
  ID3_INLINE static void prefetch(const TokenRows<From>& rows, int64_t t, int64_t c) {
    const auto base = reinterpret_cast<uintptr_t>(rows.data);
    for (int64_t i = 0; i < kTokens; ++i)
      __builtin_prefetch(reinterpret_cast<const void*>(base + ((t + i) * rows.stride + c) * sizeof(From)));
  }

  template <class From, class To>
  ID3_INLINE static void tile(const TokenRows<From>& rows, int64_t t, int64_t c, To* to) {
    const From* from = rows.data + t * rows.stride + c;
    const int64_t tokens = rows.tokens - t, columns = rows.columns - c;
    if constexpr (std::is_same_v<From, To>)
      if (tokens >= kTileTokens<To> && columns >= kTileColumns) return squares(from, rows.stride, to);
    To copy[kTileTokens<To> * kTileColumns] = {};
    for (int64_t i = 0; i < kTileTokens<To> && i < tokens; ++i)
      for (int64_t j = 0; j < kTileColumns && j < columns; ++j)
        copy[i * kTileColumns + j] = item<To>(from[i * rows.stride + j]);
    squares(copy, kTileColumns, to);
  }

  template <class To, class From>
  ID3_INLINE static To item(From x) {
    if constexpr (std::is_same_v<From, To>)
      return x;
    else
      return widen(x);
  }

  template <class Item>
  ID3_INLINE static void squares(const Item* from, int64_t stride, Item* to) {
    constexpr int64_t kSide = 16 / sizeof(Item);
    for (int64_t i = 0; i < kTileTokens<Item>; i += kSide)
      for (int64_t j = 0; j < kTileColumns; j += kSide)
        transpose_square(from + i * stride + j, stride, to + j * kBlockTokens + i, kBlockTokens);
  }
};

}  // namespace id3::cpu
