// Transposition of a square of vectors.
#pragma once

#include "simd.h"

namespace adakernels {
namespace {

// to[p * stride + i] = rows[i][p] for i, p < kLanes.
inline void transpose(const float* const* rows, float* to, int64_t stride) {
  using V = Vector<kLanes>;
  using I = typename VectorOf<kLanes>::integer;
  V a[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) a[i] = load<kLanes>(rows[i]);
  // Swaps the off-diagonal blocks of every pair of vectors that are `step` apart, for blocks of `step` elements.
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    I low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? i - step + kLanes : i;
      high[i] = i & step ? i + kLanes : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const V x = a[i], y = a[i + step];
      a[i] = __builtin_shuffle(x, y, low);
      a[i + step] = __builtin_shuffle(x, y, high);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store<kLanes>(to + i * stride, a[i]);
}

}  // namespace
}  // namespace adakernels
