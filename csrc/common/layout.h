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

// Where the numbers of features are: frames [N, C, H, W], or those of clips [B, C, T, H, W] one after the other.
struct Layout {
  int64_t rows, channels, pixels;
  int64_t frames;  // of what the first dimension counts, one after the other in each
  int64_t step_clip, step_frame, step_channel, step_pixel;

  // Whether frames are evenly spaced across clips.
  bool is_even() const { return rows <= frames || step_clip == frames * step_frame; }
};

// Of a tensor that has one of the two formats.
inline Layout layout_of(const torch::stable::Tensor& tensor) {
  const int64_t rank = tensor.dim(), channels = tensor.size(1);
  const int64_t depth = rank == 5 ? tensor.size(2) : 1, pixels = tensor.size(rank - 2) * tensor.size(rank - 1);
  const int64_t clip = channels * depth * pixels;
  const int64_t rows = tensor.size(0) * depth, frames = rank == 5 ? depth : rows;
  if (!tensor.is_contiguous()) return {rows, channels, pixels, frames, clip, channels * pixels, 1, channels};
  return {rows, channels, pixels, frames, clip, rank == 5 ? pixels : clip, depth * pixels, 1};
}

}  // namespace adakernels
