// Activations on a run of values. All of them map 0 to 0, so skipped channels need none.
#pragma once

#include "../domain.h"
#include "store.h"

namespace adakernels {
namespace {

// exp(x) for x <= 88 to about 2 ulp: 2^n times a polynomial in the remainder of x / ln 2.
template <int lanes>
inline Vector<lanes> exp_at_most_88(Vector<lanes> x) {
  using V = Vector<lanes>;
  using I = typename VectorOf<lanes>::integer;
  x = x < -87.f ? V{} - 87.f : x;
  // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
  constexpr float round = 12582912.f;
  const V rounded = x * 1.44269504f + round;
  const V whole = rounded - round;
  const V r = (x - whole * 0.693145752f) - whole * 1.42860677e-6f;
  V p = V{} + 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665795e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  p = p * (r * r) + (r + 1.f);
  I bits, exponent;
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &rounded, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(p));
  return p;
}

template <int lanes>
inline Vector<lanes> activate(Activation kind, Vector<lanes> x) {
  using V = Vector<lanes>;
  const V zero = V{};
  // Comparisons are written so that NaN stays NaN.
  switch (kind) {
    case Activation::none:
      return x;
    case Activation::relu:
      return x < zero ? zero : x;
    case Activation::relu6:
      return x < zero ? zero : (x > zero + 6.f ? zero + 6.f : x);
    case Activation::silu: {
      // exp(88) is finite, and silu(-88) is zero next to any other value.
      x = x < zero - 88.f ? zero - 88.f : x;
      return x / (1.f + exp_at_most_88<lanes>(-x));
    }
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
