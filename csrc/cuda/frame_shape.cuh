// How the kernels address frames, and the window of a convolution.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/tensors.cuh"

namespace adakernels {

// Frames [N, C, H, W], or those of clips [B, C, T, H, W] one after the other, contiguous or channels-last. Offsets of
// pixels within a frame fit 32 bits.
struct FrameShape {
  uint32_t rows, frames;  // all of them, and those that the first dimension counts, one after the other in each
  uint32_t channels, height, width;
  uint32_t step_pixel;
  int64_t step_clip, step_frame, step_channel;

  __host__ __device__ uint32_t pixels() const { return height * width; }
  __host__ __device__ int64_t size() const { return int64_t(channels) * height * width; }
  __host__ __device__ bool channels_last() const { return step_channel == 1; }
  // Where a frame begins.
  __host__ __device__ int64_t at(uint32_t row) const {
    return row / frames * step_clip + row % frames * step_frame;
  }
  // Whether frames are evenly spaced across clips.
  __host__ __device__ bool is_even() const { return rows <= frames || step_clip == frames * step_frame; }
};

inline FrameShape frame_shape(const Tensor& tensor, const char* name) {
  const int64_t rank = tensor.dim();
  const bool last = is_channels_last(tensor, name, rank);
  const int64_t channels = tensor.size(1), height = tensor.size(rank - 2), width = tensor.size(rank - 1);
  const int64_t depth = rank == 5 ? tensor.size(2) : 1, pixels = height * width, size = channels * pixels;
  const int64_t rows = tensor.size(0) * depth, frames = rank == 5 ? depth : std::max<int64_t>(rows, 1);
  STD_TORCH_CHECK(size <= INT32_MAX, name, ": expected at most 2^31 - 1 values per frame");
  STD_TORCH_CHECK(rows <= INT32_MAX, name, ": expected at most 2^31 - 1 frames");
  return {uint32_t(rows),
          uint32_t(frames),
          uint32_t(channels),
          uint32_t(height),
          uint32_t(width),
          last ? uint32_t(channels) : 1u,
          size * depth,
          rank == 5 && !last ? pixels : size,
          last ? 1 : depth * pixels};
}

// Places of a convolution along one side.
inline int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// Size of a convolution's kernel and how it moves over a frame.
struct Window {
  int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  __host__ __device__ int taps() const { return kernel_y * kernel_x; }
  int64_t out_height(int64_t height) const { return out_size(height, kernel_y, stride_y, padding_y, dilation_y); }
  int64_t out_width(int64_t width) const { return out_size(width, kernel_x, stride_x, padding_x, dilation_x); }
};

// Of numbers whose last two are those of y and x.
inline Window window_of(const Tensor& weight, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation) {
  const auto y = [](const std::vector<int64_t>& numbers) { return int(numbers[numbers.size() - 2]); };
  const auto x = [](const std::vector<int64_t>& numbers) { return int(numbers.back()); };
  const int64_t rank = weight.dim();
  return {int(weight.size(rank - 2)), int(weight.size(rank - 1)), y(stride),   x(stride),
          y(padding),                 x(padding),                 y(dilation), x(dilation)};
}

}  // namespace adakernels
