#pragma once

#include <cstdint>
#include <cstring>

#include "formulas/host_device.h"

namespace id3 {

// The bit pattern of a positive float, read as a signed integer, has the order of the float.
template <class Value>
struct FloatBits;

template <>
struct FloatBits<float> {
  using Int = int32_t;
  static constexpr Int kMagnitude = 0x7fffffff, kSmallestNormal = 0x00800000, kInfinity = 0x7f800000;
};

template <>
struct FloatBits<double> {
  using Int = int64_t;
  static constexpr Int kMagnitude = 0x7fffffffffffffff, kSmallestNormal = 0x0010000000000000,
                       kInfinity = 0x7ff0000000000000;
};

template <class Value>
using Key = typename FloatBits<Value>::Int;

template <class To, class From>
ID3_HOST_DEVICE To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Value>
ID3_HOST_DEVICE Value flush_subnormal(Value x) {
  using Bits = FloatBits<Value>;
  return (reinterpret_bits<typename Bits::Int>(x) & Bits::kMagnitude) < Bits::kSmallestNormal ? Value(0) : x;
}

// Keys have the order of scores. A score that is never selected (NaN, infinite, subnormal, zero, negative)
// has key 0; a selectable score has a positive key.
template <class Value>
ID3_HOST_DEVICE Key<Value> key_of(Value score) {
  using Bits = FloatBits<Value>;
  const auto bits = reinterpret_bits<typename Bits::Int>(score);
  return (bits >= Bits::kSmallestNormal) & (bits < Bits::kInfinity) ? bits : 0;
}

template <class Value>
ID3_HOST_DEVICE Value score_of(Key<Value> key) {
  return reinterpret_bits<Value>(key);
}

}  // namespace id3
