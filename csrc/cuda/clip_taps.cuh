// Which frames the temporal taps of a 3D convolution read, and how many channels are computed of them.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/levels.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// A convolution along time. As `transposed` it is the gradient of a convolution's input, as in Side.
struct TemporalSide {
  int64_t kernel, stride, padding, dilation;
  bool transposed;
};

// What the frames that are written take of those that are read.
struct ClipTaps {
  Tensor sources;               // [N', kt] int32: by tap the row of the frame, or -1
  std::optional<Tensor> count;  // [N'] int32: the channels that gates compute
};

// No source is a frame outside of the clip, what is not the centre tap where a clip has that one alone, and, as
// `transposed`, a frame that no level computes. Channels are counted with gates only: of a frame that is written, or,
// as `transposed`, of those that it goes into.
ClipTaps clip_taps(const char* op, const Tensor& written,               // [B, C', T', H', W'] | [sum T, C', H', W']
                   const Tensor& read,                                  // [B, C, T, H, W] | [sum T, C, H, W]
                   const std::optional<Tensor>& temporal,               // [B] bool
                   const std::optional<Tensor>& frame_offsets,          // [B + 1] int32
                   const Gates& gates, const TemporalSide& side);

}  // namespace adakernels
