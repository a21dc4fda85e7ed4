// The cheap reconstruction of dynamic_conv3d: channels made from channels, frames made from frames.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "cuda/levels.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// The levels of every clip and the filters. What they are given has the values of the frames and first channels that
// the lowest live levels compute, and anything elsewhere.
struct Reconstruction {
  std::optional<Tensor> temporal_gate, channel_gate;  // [B, S_t], [B, S_c]
  std::optional<Tensor> temporal_weight;              // [2^(S_t-1) - 1, C, k, k]
  std::optional<Tensor> channel_weight;               // [C, k, k]

  // Contiguous filters; throws where a shape or dtype is not as above.
  Reconstruction(const Tensor& features,  // [B, C, T, H, W], of their dtype
                 const std::optional<Tensor>& temporal_gate, const std::optional<Tensor>& channel_gate,
                 const std::optional<Tensor>& temporal_weight, const std::optional<Tensor>& channel_weight);

  // Everything, with the activation. computed: [B, C, T, H, W]
  Tensor output(const Tensor& computed, int64_t activation) const;

  // Of the gradient of the output that of all channels of the computed frames, and of that the gradient of what is
  // computed, which is zero in channels behind it.
  Tensor feature_gradient(const Tensor& grad) const;
  Tensor computed_gradient(const Tensor& grad) const;

  // Of the temporal gate and its filters, given the output's gradient, and of those of channels, given that of the
  // features.
  std::tuple<Tensor, Tensor> temporal_gradients(const Tensor& grad, const Tensor& computed) const;
  std::tuple<Tensor, Tensor> channel_gradients(const Tensor& grad, const Tensor& computed) const;

  // All channels of the computed frames.
  Tensor features(const Tensor& computed) const;

  Gates gates(const Tensor& features) const;
  // k, 1 without filters.
  int size() const;
};

}  // namespace adakernels
