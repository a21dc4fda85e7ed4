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

void check_depthwise(int64_t groups, const Tensor& input) {
  STD_TORCH_CHECK(groups == input.size(1), "gated_conv2d: expected groups 1 or C_in = ", input.size(1), ", got ",
                  groups);
}

DepthwiseDomain domain_of(const std::optional<Tensor>& policy, const std::optional<Tensor>& in_policy, int64_t frames) {
  return {data_or_null<int64_t>(policy), data_or_null<int64_t>(in_policy), frames};
}

Tensor gated_conv2d(Tensor input,                     // [N, C_in, H, W]
                    Tensor weight,                    // [C_out, C_in/groups, kh, kw]
                    std::optional<Tensor> bias,       // [C_out]
                    std::optional<Tensor> policy,     // [N, C_out]
                    std::optional<Tensor> in_policy,  // [N, C_in]
                    int64_t frames, Pair stride, Pair padding, Pair dilation, int64_t groups, int64_t activation) {
  const Window w = window_of(weight, stride, padding, dilation);
  Tensor output = empty_in_format(
      input, {input.size(0), weight.size(0), w.out_height(input.size(2)), w.out_width(input.size(3))},
      input.scalar_type(), is_channels_last(input, "gated_conv2d"));
  if (groups == 1) {
    gated_convolution(output, input, weight, bias, policy, in_policy, frames, w, activation);
    return output;
  }
  check_depthwise(groups, input);
  weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  depthwise_convolution(output, input, weight, bias, domain_of(policy, in_policy, frames), w, activation);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> gated_conv2d_backward(
    Tensor grad_output,               // [N, C_out, H', W']
    Tensor input,                     // [N, C_in, H, W]
    Tensor weight,                    // [C_out, C_in/groups, kh, kw]
    std::optional<Tensor> policy,     // [N, C_out]
    std::optional<Tensor> in_policy,  // [N, C_in]
    int64_t frames, Pair stride, Pair padding, Pair dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  const Window w = window_of(weight, stride, padding, dilation);
  if (groups != 1) check_depthwise(groups, input);
  weight = torch::stable::contiguous(weight);
  const Tensor grad = computed_gradient(grad_output, policy, frames);
  Tensor grad_input = want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  Tensor grad_weight = want_weight ? torch::stable::empty_like(weight) : torch::stable::new_empty(weight, {0});
  Tensor grad_bias = torch::stable::new_empty(weight, {want_bias ? weight.size(0) : 0});
  const DepthwiseDomain domain = domain_of(policy, in_policy, frames);
  if (want_input && groups == 1)
    gated_input_gradient(grad_input, grad, weight, policy, in_policy, frames, w);
  else if (want_input)
    depthwise_input_gradient(grad_input, grad, weight, domain, w);
  if (want_weight && groups == 1)
    gated_weight_gradient(grad_weight, grad, input, policy, in_policy, frames, w);
  else if (want_weight)
    depthwise_weight_gradient(grad_weight, grad, input, domain, w);
  if (want_bias) bias_gradient(grad_bias, grad, domain);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace adakernels
