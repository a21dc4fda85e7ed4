// sliced_conv3d for CUDA.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/clip_convolution.cuh"
#include "cuda/launch.cuh"

namespace adakernels {

namespace {

using Triple = std::vector<int64_t>;

Tensor sliced_conv3d(Tensor input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
                     Tensor weight,                        // [C_out, C_in/groups, kt, kh, kw]
                     std::optional<Tensor> bias,           // [C_out]
                     std::optional<Tensor> temporal,       // [B]
                     std::optional<Tensor> frame_offsets,  // [B + 1]
                     Triple stride, Triple padding, Triple dilation, int64_t groups, int64_t activation) {
  const ClipConvolution convolution{"sliced_conv3d", weight,   stride,       padding, dilation,
                                    groups != 1,     temporal, frame_offsets};
  Tensor output = convolution.empty_output(input);
  convolution.convolve(output, input, bias, activation);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> sliced_conv3d_backward(
    Tensor grad_output,                   // [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    Tensor input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
    Tensor weight,                        // [C_out, C_in/groups, kt, kh, kw]
    std::optional<Tensor> temporal,       // [B]
    std::optional<Tensor> frame_offsets,  // [B + 1]
    Triple stride, Triple padding, Triple dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const ClipConvolution convolution{"sliced_conv3d", weight,   stride,       padding, dilation,
                                    groups != 1,     temporal, frame_offsets};
  auto [grad_input, grad_weight, grad_bias] = empty_gradients(input, weight, want_input, want_weight, want_bias);
  if (want_input) convolution.input_gradient(grad_input, grad_output);
  if (want_weight) convolution.weight_gradient(grad_weight, grad_output, input);
  if (want_bias) convolution.bias_gradient(grad_bias, grad_output);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("sliced_conv3d", TORCH_BOX(&sliced_conv3d));
  m.impl("sliced_conv3d_backward", TORCH_BOX(&sliced_conv3d_backward));
}

}  // namespace adakernels
