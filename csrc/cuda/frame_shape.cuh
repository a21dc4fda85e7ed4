// How the kernels address frames and the window of a convolution.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/tensors.cuh"

namespace adakernels {

// A contiguous or channels-last tensor [N, C, H, W]. Offsets within a frame fit 32 bits.
struct FrameShape {
  uint32_t channels, height, width;
  uint32_t channel_step, pixel_step;

  __host__ __device__ uint32_t pixels() const { return height * width; }
  __host__ __device__ int64_t size() const { return int64_t(channels) * height * width; }
  __host__ __device__ bool channels_last() const { return channel_step == 1; }
};

inline FrameShape frame_shape(const Tensor& tensor, const char* name) {
  const bool last = is_channels_last(tensor, name);
  const int64_t pixels = tensor.size(2) * tensor.size(3), channels = tensor.size(1);
  STD_TORCH_CHECK(channels * pixels <= INT32_MAX, name, ": expected at most 2^31 - 1 values per frame");
  return {uint32_t(channels), uint32_t(tensor.size(2)), uint32_t(tensor.size(3)), last ? 1u : uint32_t(pixels),
          last ? uint32_t(channels) : 1u};
}

// Size of a convolution's kernel and how it moves.
struct Window {
  int kernel_y, kernel_x, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;

  __host__ __device__ int taps() const { return kernel_y * kernel_x; }
};

}  // namespace adakernels
