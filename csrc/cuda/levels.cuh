// The levels at which VA-RED² computes and makes clips.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "cuda/tensors.cuh"

namespace adakernels {

// Weights of a clip's levels, of which those above 0 are live. Without gate there is level 0 alone, of weight 1.
struct Gate {
  const float* weights;  // [B, levels] | null
  int32_t levels;

  __device__ float weight(int64_t clip, int32_t level) const {
    return weights != nullptr ? weights[clip * levels + level] : 1.f;
  }
  // The lowest live one, or `levels`.
  __device__ int32_t lowest(int64_t clip) const {
    int32_t level = 0;
    while (level < levels && !(weight(clip, level) > 0.f)) ++level;
    return level;
  }
};

// What every clip computes is what its lowest live levels take.
struct Gates {
  Gate temporal, channel;

  bool given() const { return temporal.weights != nullptr || channel.weights != nullptr; }
  __device__ bool is_live(int64_t clip) const {
    return temporal.lowest(clip) < temporal.levels && channel.lowest(clip) < channel.levels;
  }
};

// How many of the first channels a level computes.
__host__ __device__ inline uint32_t computed_channels(uint32_t channels, int32_t level) {
  return (channels + (1u << level) - 1) >> level;
}

inline Gate gate_of(const std::optional<Tensor>& weights,  // [B, levels]
                    int64_t clips, const char* op) {
  if (!weights) return {nullptr, 1};
  STD_TORCH_CHECK(weights->dim() == 2 && weights->size(0) == clips && weights->is_contiguous() &&
                      weights->scalar_type() == ScalarType::Float,
                  op, ": expected a contiguous float32 gate [B, levels]");
  return {data<float>(*weights), int32_t(weights->size(1))};
}

}  // namespace adakernels
