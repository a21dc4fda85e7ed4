// Sums over pixels of a gradient times what the taps of a channel read: gradients of depthwise filters.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/frame_shape.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

// The part of a block that a thread has: in channels-last a warp has neighbouring channels and the warps share the
// pixels, else the lanes of a warp share the pixels of one channel.
template <bool kChannelsLast>
struct SumLanes {
  static constexpr int kThreads = 256;
  static constexpr uint32_t kWarp = 32, kChannelLanes = kChannelsLast ? kWarp : kThreads / kWarp;
  static constexpr uint32_t kGroups = kThreads / kChannelLanes;

  __device__ static uint32_t channel() { return kChannelsLast ? threadIdx.x % kWarp : threadIdx.x / kWarp; }
  __device__ static uint32_t group() { return kChannelsLast ? threadIdx.x / kWarp : threadIdx.x % kWarp; }
  static int shared_bytes(int taps) { return kChannelsLast ? int(kGroups * kWarp) * taps * int(sizeof(float)) : 0; }
};

// Taps that one thread sums over. Of a kernel of a size that the compiler does not know, 0, they are a few of all.
template <int kKernel>
constexpr int kTapsOf = kKernel == 0 ? 8 : kKernel * kKernel;

// Adds the thread's pixels of some lines of one frame. What is not `wanted` of its channels stays as it is. With
// kKernel = 1 and no input it is the sum of the gradient.
template <typename T, int kChannels, int kKernel, bool kChannelsLast>
__device__ __forceinline__ void add_frame(float (&sums)[kTapsOf<kKernel>][kChannels],
                                          const T* grad_frame,  // of the thread's channels
                                          const T* in_frame,    // of those that they read | null
                                          const FrameShape& out, const FrameShape& in, const Window& window,
                                          const bool (&wanted)[kChannels], uint32_t first_y, uint32_t lines,
                                          uint32_t first_tap) {
  for (uint32_t pixel = SumLanes<kChannelsLast>::group(); pixel < lines * out.width;
       pixel += SumLanes<kChannelsLast>::kGroups) {
    const uint32_t out_y = first_y + pixel / out.width, out_x = pixel % out.width;
    const Vector<T, kChannels> values =
        load_vector<kChannels>(grad_frame + (out_y * out.width + out_x) * out.step_pixel);
    float g[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) g[i] = wanted[i] ? static_cast<float>(values.values[i]) : 0.f;
    if constexpr (kKernel == 1) {
      if (in_frame == nullptr) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) sums[0][i] += g[i];
        continue;
      }
    }
    const int in_y = int(out_y) * window.stride_y - window.padding_y;
    const int in_x = int(out_x) * window.stride_x - window.padding_x;
#pragma unroll
    for (int i = 0; i < kTapsOf<kKernel>; ++i) {
      const int tap = int(first_tap) + i;
      const int y = in_y + (kKernel == 0 ? tap / window.kernel_x : i / kKernel) * window.dilation_y;
      const int x = in_x + (kKernel == 0 ? tap % window.kernel_x : i % kKernel) * window.dilation_x;
      const bool inside = y >= 0 && y < int(in.height) && x >= 0 && x < int(in.width);
      if (!inside || (kKernel == 0 && tap >= window.taps())) continue;
      const Vector<T, kChannels> from =
          load_vector<kChannels>(in_frame + (uint32_t(y) * in.width + uint32_t(x)) * in.step_pixel);
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (wanted[c]) sums[i][c] += g[c] * static_cast<float>(from.values[c]);
    }
  }
}

// Adds up the sums of the threads that share a channel and stores those of its taps, of which there are `taps`, one
// after the other. All threads of the block come here.
template <int kTaps, int kChannels, bool kChannelsLast>
__device__ __forceinline__ void store_sums(float* to, int64_t channel_step, const float (&sums)[kTaps][kChannels],
                                           bool inside, int taps) {
  using Own = SumLanes<kChannelsLast>;
  const uint32_t lane = Own::channel(), group = Own::group();
  if constexpr (kChannelsLast) {
    float* shared = reinterpret_cast<float*>(shared_memory());  // [kGroups, kTaps, kWarp]
    for (int i = 0; i < kChannels; ++i) {
      __syncthreads();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) shared[(group * kTaps + tap) * Own::kWarp + lane] = sums[tap][i];
      __syncthreads();
      for (uint32_t tap = group; tap < kTaps; tap += Own::kGroups) {
        float sum = 0.f;
        for (uint32_t g = 0; g < Own::kGroups; ++g) sum += shared[(g * kTaps + tap) * Own::kWarp + lane];
        if (inside && int(tap) < taps) to[i * channel_step + tap] = sum;
      }
    }
  } else {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float sum = sums[tap][0];
#pragma unroll
      for (int distance = Own::kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (group == 0 && inside && tap < taps) to[tap] = sum;
    }
  }
}

}  // namespace adakernels
