// How tensors lie in memory, for every device.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace adakernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a tensor [N, C, H, W] lies in memory without gaps, in the order of one of the two formats.
inline bool has_format(const torch::stable::Tensor& tensor, bool channels_last) {
  if (!channels_last) return tensor.is_contiguous();
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (tensor.size(d) != 1 && tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

}  // namespace adakernels
