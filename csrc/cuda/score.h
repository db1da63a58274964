#pragma once

#include <type_traits>

#include "cuda/tensors.h"
#include "formulas/score.h"

namespace id3::cuda {

// Calls visit(std::integral_constant<Exponent, E>()) for the formula of the exponent.
template <class Visit>
void with_exponent(Exponent e, const Visit& visit) {
  switch (e) {
#define ID3_CASE(E) \
  case Exponent::E: \
    return visit(std::integral_constant<Exponent, Exponent::E>());
    ID3_CASE(zero)
    ID3_CASE(half)
    ID3_CASE(one)
    ID3_CASE(two)
    ID3_CASE(minus_half)
    ID3_CASE(minus_one)
    ID3_CASE(minus_two)
    ID3_CASE(general)
#undef ID3_CASE
  }
}

// The D3 scores of one tensor [numel]: `d3` of formulas/score.h.
void d3_score(const TensorRow& row, int64_t numel, float eps, double exp, float* scores, cudaStream_t stream);

}  // namespace id3::cuda
