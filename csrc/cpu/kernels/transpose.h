// Transposition of a square of vectors.
#pragma once

#include "simd.h"

namespace adakernels {
namespace {

// Swaps the off-diagonal blocks of `step` elements of every pair of vectors that are `step` apart.
template <int step>
inline void swap_blocks(Vector<kLanes>* a) {
  constexpr auto low = indices<kLanes>([](int i) { return i & step ? i - step + kLanes : i; });
  constexpr auto high = indices<kLanes>([](int i) { return i & step ? i + kLanes : i + step; });
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & step) continue;
    const Vector<kLanes> x = a[i], y = a[i + step];
    a[i] = shuffle<kLanes>(x, y, low);
    a[i + step] = shuffle<kLanes>(x, y, high);
  }
}

// to[p * stride + i] = rows[i][p] for i, p < kLanes.
inline void transpose(const float* const* rows, float* to, int64_t stride) {
  using V = Vector<kLanes>;
  V a[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = load<kLanes>(rows[i]);
  swap_blocks<1>(a);
  if constexpr (kLanes > 2) swap_blocks<2>(a);
  if constexpr (kLanes > 4) swap_blocks<4>(a);
  if constexpr (kLanes > 8) swap_blocks<8>(a);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store<kLanes>(to + i * stride, a[i]);
}

}  // namespace
}  // namespace adakernels
