// Which frames the temporal taps of a 3D convolution read.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/tensors.cuh"

namespace adakernels {

// A convolution along time. As `transposed` it is the gradient of a convolution's input, as in Side.
struct TemporalSide {
  int64_t kernel, stride, padding, dilation;
  bool transposed;
};

// Of every frame that is written and every tap the row of the frame that it reads; -1 where that is outside of the
// clip, or where the clip has only its centre tap. [N', kt] int32
Tensor tap_sources(const Tensor& written,                        // [B, C', T', H', W'] | [sum T, C', H', W']
                   const Tensor& read,                           // [B, C, T, H, W] | [sum T, C, H, W]
                   const std::optional<Tensor>& temporal,        // [B] bool
                   const std::optional<Tensor>& frame_offsets,   // [B + 1] int32
                   const TemporalSide& side);

}  // namespace adakernels
