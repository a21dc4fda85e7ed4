// The one inner kernel: rows of weights given by pointers times vectors of pixels given by offsets.
#pragma once

#include "simd.h"

namespace adakernels {
namespace {

// One step of the reduction: where its weight lies in a row and where its pixels lie in the source.
struct Step {
  int32_t weight, source;
};

// out[r][p] = start[r] + sum_k rows[r][steps[k].weight] * source[steps[k].source + p]
// for r < row_count and p < vectors * lanes. Rows are pointers, so an arbitrary list of channels costs nothing.
template <int row_count, int vectors, int lanes>
void gemm_tile(const float* const* rows, const Step* steps, int64_t step_count, const float* source,
               const float* start, float* out, int64_t out_stride) {
  using V = Vector<lanes>;
  V sum[row_count][vectors];
  const float* row[row_count];
#pragma GCC unroll 16
  for (int r = 0; r < row_count; ++r) {
    row[r] = rows[r];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[r][v] = V{} + start[r];
  }
  for (int64_t k = 0; k < step_count; ++k) {
    const int64_t at = steps[k].weight;
    const float* pixels = source + steps[k].source;
    V b[vectors];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) b[v] = load<lanes>(pixels + v * lanes);
#pragma GCC unroll 16
    for (int r = 0; r < row_count; ++r) {
      const V a = V{} + row[r][at];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) sum[r][v] += a * b[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < row_count; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) store<lanes>(out + r * out_stride + v * lanes, sum[r][v]);
}

}  // namespace
}  // namespace adakernels
