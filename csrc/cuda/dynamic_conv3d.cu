// dynamic_conv3d for CUDA: gates become the frames and channels that are computed; the others are made.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/clip_convolution.cuh"
#include "cuda/launch.cuh"
#include "cuda/reconstruction.cuh"

namespace adakernels {

namespace {

using Triple = std::vector<int64_t>;
using Optional = std::optional<Tensor>;

ClipConvolution convolution_of(const Tensor& weight, const Optional& temporal_gate, const Optional& channel_gate,
                               const Triple& stride, const Triple& padding, const Triple& dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 5, "dynamic_conv3d: expected a weight [C_out, C_in/groups, kt, kh, kw]");
  ClipConvolution convolution{"dynamic_conv3d", weight, stride, padding, dilation, groups != 1};
  convolution.temporal_gate = temporal_gate, convolution.channel_gate = channel_gate;
  return convolution;
}

// The frames and first channels that some live level takes; the rest is left.
Tensor computed_features(const ClipConvolution& convolution, const Tensor& input, const Optional& bias) {
  Tensor computed = convolution.empty_output(input);
  convolution.convolve(computed, input, bias, 0);
  return computed;
}

Tensor dynamic_conv3d(Tensor input,              // [B, C_in, T, H, W]
                      Tensor weight,             // [C_out, C_in/groups, kt, kh, kw]
                      Optional bias,             // [C_out]
                      Optional temporal_gate,    // [B, S_t]
                      Optional channel_gate,     // [B, S_c]
                      Optional temporal_weight,  // [2^(S_t-1) - 1, C_out, k, k]
                      Optional channel_weight,   // [C_out, k, k]
                      Triple stride, Triple padding, Triple dilation, int64_t groups, int64_t activation) {
  const ClipConvolution convolution =
      convolution_of(weight, temporal_gate, channel_gate, stride, padding, dilation, groups);
  const Tensor computed = computed_features(convolution, input, bias);
  return Reconstruction(computed, temporal_gate, channel_gate, temporal_weight, channel_weight)
      .output(computed, activation);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dynamic_conv3d_backward(
    Tensor grad_output,        // [B, C_out, T', H', W']
    Tensor input,              // [B, C_in, T, H, W]
    Tensor weight,             // [C_out, C_in/groups, kt, kh, kw]
    Optional bias,             // [C_out]
    Optional temporal_gate,    // [B, S_t]
    Optional channel_gate,     // [B, S_c]
    Optional temporal_weight,  // [2^(S_t-1) - 1, C_out, k, k]
    Optional channel_weight,   // [C_out, k, k]
    Triple stride, Triple padding, Triple dilation, int64_t groups, bool want_input, bool want_weight, bool want_bias,
    bool want_temporal_gate, bool want_channel_gate, bool want_temporal_weight, bool want_channel_weight) {
  const ClipConvolution convolution =
      convolution_of(weight, temporal_gate, channel_gate, stride, padding, dilation, groups);
  const Reconstruction made(grad_output, temporal_gate, channel_gate, temporal_weight, channel_weight);
  const auto none = [&] { return torch::stable::new_empty(weight, {0}); };
  Tensor to_temporal_gate = none(), to_channel_gate = none(), to_temporal_weight = none(), to_channel_weight = none();
  const Tensor of_features = made.feature_gradient(grad_output);
  const bool of_frames = want_temporal_gate || want_temporal_weight;
  const bool of_channels = want_channel_gate || want_channel_weight;
  if (of_frames || of_channels) {
    const Tensor computed = computed_features(convolution, input, bias);
    if (of_frames) std::tie(to_temporal_gate, to_temporal_weight) = made.temporal_gradients(grad_output, computed);
    if (of_channels) std::tie(to_channel_gate, to_channel_weight) = made.channel_gradients(of_features, computed);
  }
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(input, weight, want_input, want_weight, want_bias);
  if (want_input || want_weight || want_bias) {
    const Tensor grad = made.computed_gradient(of_features);
    if (want_input) convolution.input_gradient(grad_input, grad);
    if (want_weight) convolution.weight_gradient(grad_weight, grad, input);
    if (want_bias) convolution.bias_gradient(grad_bias, grad);
  }
  return {grad_input,
          grad_weight,
          grad_bias,
          want_temporal_gate ? to_temporal_gate : none(),
          want_channel_gate ? to_channel_gate : none(),
          want_temporal_weight ? to_temporal_weight : none(),
          want_channel_weight ? to_channel_weight : none()};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("dynamic_conv3d", TORCH_BOX(&dynamic_conv3d));
  m.impl("dynamic_conv3d_backward", TORCH_BOX(&dynamic_conv3d_backward));
}

}  // namespace adakernels
