// The activations of the convolutions' results, by their place in ops/_conv_arguments.py: none, relu, relu6, silu.
#pragma once

#include <cuda_runtime.h>

namespace adakernels {

// NaN stays NaN.
__device__ __forceinline__ float activated(float value, int activation) {
  if (activation == 1) return value < 0.f ? 0.f : value;
  if (activation == 2) return value < 0.f ? 0.f : value > 6.f ? 6.f : value;
  if (activation == 3) return value / (1.f + expf(-value));
  return value;
}

}  // namespace adakernels
