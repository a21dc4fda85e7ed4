// Activations on a run of values. All of them map 0 to 0, so skipped channels need none.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../domain.h"
#include "store.h"

namespace adakernels {
namespace {

// GCC makes one instruction of none of these by itself. Masked, because it warns of the undefined operand of the plain
// forms. NaN stays NaN.
template <int lanes>
inline Vector<lanes> at_least(Vector<lanes> x, float bound) {
  const auto all = broadcast<lanes>(bound);
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return Vector<lanes>(_mm512_maskz_max_ps(0xffff, __m512(all), __m512(x)));
#endif
  return x < all ? all : x;
}

template <int lanes>
inline Vector<lanes> at_most(Vector<lanes> x, float bound) {
  const auto all = broadcast<lanes>(bound);
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return Vector<lanes>(_mm512_maskz_min_ps(0xffff, __m512(all), __m512(x)));
#endif
  return x > all ? all : x;
}

template <int lanes>
inline Vector<lanes> nearest_integer(Vector<lanes> x) {
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return Vector<lanes>(_mm512_maskz_roundscale_ps(0xffff, __m512(x), 8));
#endif
  constexpr float round = 12582912.f;  // 1.5 * 2^23
  return (x + round) - round;
}

// x * 2^n for an integer n >= -126 and a normal product.
template <int lanes>
inline Vector<lanes> scale(Vector<lanes> x, Vector<lanes> n) {
#if defined(__AVX512F__)
  if constexpr (lanes == 16) return Vector<lanes>(_mm512_maskz_scalef_ps(0xffff, __m512(x), __m512(n)));
#endif
  using I = typename VectorOf<lanes>::integer;
  I bits;
  std::memcpy(&bits, &x, sizeof(bits));
  bits += __builtin_convertvector(n, I) << 23;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

// exp(-x) for x >= -88 to a relative error of about (2 + |x|) 2^-24, but no less than exp(-87): 2^n times a polynomial
// in the rest of -x / ln 2.
template <int lanes>
inline Vector<lanes> exp_of_negative(Vector<lanes> x) {
  const auto power = at_most<lanes>(x, 87.f) * -1.44269504f, n = nearest_integer<lanes>(power), rest = power - n;
  auto p = rest * 1.32647e-3f + 9.67153408e-3f;
  p = p * rest + 5.550734e-2f;
  p = p * rest + 2.40222418e-1f;
  p = p * rest + 6.93146977e-1f;
  p = p * rest + 1.f;
  return scale<lanes>(p, n);
}

template <int lanes>
inline Vector<lanes> activate(Activation kind, Vector<lanes> x) {
  switch (kind) {
    case Activation::none:
      return x;
    case Activation::relu:
      return at_least<lanes>(x, 0.f);
    case Activation::relu6:
      return at_most<lanes>(at_least<lanes>(x, 0.f), 6.f);
    case Activation::silu:
      // exp(88) is finite, and silu(-88) is zero next to any other value.
      x = at_least<lanes>(x, -88.f);
      return x / (1.f + exp_of_negative<lanes>(x));
  }
  return x;
}

inline void activate(Activation kind, float* values, int64_t count) {
  if (kind == Activation::none) return;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store<kLanes>(values + i, activate<kLanes>(kind, load<kLanes>(values + i)));
  if (i == count) return;
  float rest[kLanes] = {};
  std::memcpy(rest, values + i, size_t(count - i) * 4);
  store<kLanes>(rest, activate<kLanes>(kind, load<kLanes>(rest)));
  std::memcpy(values + i, rest, size_t(count - i) * 4);
}

}  // namespace
}  // namespace adakernels
