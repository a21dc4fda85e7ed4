// How tensors lie in memory, for every device.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>

namespace adakernels {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether a tensor [N, C, H, W] or [B, C, T, H, W] lies in memory without gaps, in the order of one of the two formats.
inline bool has_format(const torch::stable::Tensor& tensor, bool channels_last) {
  if (!channels_last) return tensor.is_contiguous();
  int64_t expected = 1;
  const auto follows = [&](int64_t d) {
    const bool at_expected = tensor.size(d) == 1 || tensor.stride(d) == expected;
    expected *= tensor.size(d);
    return at_expected;
  };
  if (!follows(1)) return false;
  for (int64_t d = tensor.dim() - 1; d > 1; --d)
    if (!follows(d)) return false;
  return follows(0);
}

}  // namespace adakernels
