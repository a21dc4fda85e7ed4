// gated_conv2d for CUDA: the front of the convolution core, for groups = 1, and of the depthwise kernels.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/depthwise.cuh"
#include "cuda/gated_convolution.cuh"
#include "cuda/launch.cuh"
#include "cuda/temporal_fuse.cuh"
#include "cuda/weight_gradient.cuh"

namespace adakernels {

namespace {

using Pair = std::vector<int64_t>;

Window window_of(const Tensor& weight, const Pair& stride, const Pair& padding, const Pair& dilation) {
  return {int(weight.size(2)), int(weight.size(3)), int(stride[0]),   int(stride[1]),
          int(padding[0]),     int(padding[1]),     int(dilation[0]), int(dilation[1])};
}

int64_t out_size(int64_t size, int kernel, int stride, int padding, int dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void check_depthwise(int64_t groups, const Tensor& input) {
  STD_TORCH_CHECK(groups == input.size(1), "gated_conv2d: expected groups 1 or C_in = ", input.size(1), ", got ", groups);
}

Tensor gated_conv2d(Tensor input,                     // [N, C_in, H, W]
                    Tensor weight,                    // [C_out, C_in/groups, kh, kw]
                    std::optional<Tensor> bias,       // [C_out]
                    std::optional<Tensor> policy,     // [N, C_out]
                    std::optional<Tensor> in_policy,  // [N, C_in]
                    int64_t frames, Pair stride, Pair padding, Pair dilation, int64_t groups, int64_t activation) {
  const Window w = window_of(weight, stride, padding, dilation);
  Tensor output = empty_in_format(
      input,
      {input.size(0), weight.size(0), out_size(input.size(2), w.kernel_y, w.stride_y, w.padding_y, w.dilation_y),
       out_size(input.size(3), w.kernel_x, w.stride_x, w.padding_x, w.dilation_x)},
      input.scalar_type(), is_channels_last(input, "gated_conv2d"));
  if (groups == 1) {
    gated_convolution(output, input, weight, bias, policy, in_policy, frames, w, activation);
    return output;
  }
  check_depthwise(groups, input);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  depthwise_convolution(output, input, weight, bias, policy, in_policy, frames, w, activation);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> gated_conv2d_backward(Tensor grad_output,               // [N, C_out, H', W']
                                                         Tensor input,                     // [N, C_in, H, W]
                                                         Tensor weight,                    // [C_out, C_in/groups, kh, kw]
                                                         std::optional<Tensor> policy,     // [N, C_out]
                                                         std::optional<Tensor> in_policy,  // [N, C_in]
                                                         int64_t frames, Pair stride, Pair padding, Pair dilation,
                                                         int64_t groups, bool want_input, bool want_weight,
                                                         bool want_bias) {
  const Window w = window_of(weight, stride, padding, dilation);
  if (groups != 1) check_depthwise(groups, input);
  weight = torch::stable::contiguous(weight);
  const Tensor grad = computed_gradient(grad_output, policy, frames);
  Tensor grad_input = want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  Tensor grad_weight = want_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor grad_bias = torch::stable::new_empty(weight, {want_bias ? weight.size(0) : 0});
  const auto to_input = groups == 1 ? gated_input_gradient : depthwise_input_gradient;
  const auto to_weight = groups == 1 ? gated_weight_gradient : depthwise_weight_gradient;
  if (want_input) to_input(grad_input, grad, weight, policy, in_policy, frames, w);
  if (want_weight) to_weight(grad_weight, grad, input, policy, in_policy, frames, w);
  if (want_bias) bias_gradient(grad_bias, grad, policy, frames);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace adakernels
