// gated_conv2d for the CPU: turns the policies into lists of channels and hands them to the convolution core.
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "convolve.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::stable::Tensor;

constexpr char kName[] = "gated_conv2d";

// What the policies say about one call.
struct Domain {
  Problem problem;
  PolicyValues out_values, in_values;
  int64_t frame_count;
  FrameRoutes computed, live;

  Domain(const char* op, const Tensor& input,     // [N, C_in, H, W]
         const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
         const std::optional<Tensor>& policy,     // [N, C_out]
         const std::optional<Tensor>& in_policy,  // [N, C_in]
         int64_t frames, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
         const std::vector<int64_t>& dilation, int64_t groups)
      : problem(checked_problem(op, input, weight, frames, stride, padding, dilation, groups)),
        out_values(policy_values(policy, input.size(0), problem.out_channels, op, "policy")),
        in_values(policy_values(in_policy, input.size(0), problem.in_channels, op, "in_policy")),
        frame_count(input.size(0)),
        computed(computed_routes(out_values, frame_count, problem.out_channels, frames)),
        live(live_routes(in_values, frame_count, problem.in_channels)) {}

  MakeUnits units() const {
    return [this](const WeightStrides& strides, bool whole_frames) {
      return frame_units(problem, strides, frame_count, computed, problem.group_out(), live, problem.group_in(),
                         whole_frames);
    };
  }
  // The lists change roles: live input channels are computed from the computed output channels.
  MakeUnits gradient_units() const {
    return [this](const WeightStrides& strides, bool whole_frames) {
      return frame_units(problem, strides, frame_count, live, problem.group_in(), computed, problem.group_out(),
                         whole_frames);
    };
  }

 private:
  static Problem checked_problem(const char* op, const Tensor& input, const Tensor& weight, int64_t frames,
                                 const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                 const std::vector<int64_t>& dilation, int64_t groups) {
    STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, op, ": expected tensors of 4 dimensions");
    STD_TORCH_CHECK(frames > 0 && input.size(0) % frames == 0, op, ": expected frames to divide N");
    return problem_of(op, input, weight, stride, padding, dilation, groups);
  }
};

Tensor gated_conv2d(const Tensor& input,                     // [N, C_in, H, W]
                    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
                    const std::optional<Tensor>& bias,       // [C_out]
                    const std::optional<Tensor>& policy,     // [N, C_out]
                    const std::optional<Tensor>& in_policy,  // [N, C_in]
                    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, int64_t activation) {
  const Domain domain(kName, input, weight, policy, in_policy, frames, stride, padding, dilation, groups);
  Tensor output = empty_like_format(input, output_sizes(domain.problem, input));
  convolve(domain.problem, input, weight, bias, activation, output, domain.units(),
           zero_channels(domain.out_values, domain.problem.out_channels, frames));
  return output;
}

void conv2d_add(const Tensor& target,                    // [N, C_out, H', W']
                const Tensor& input,                     // [N, C_in, H, W]
                const Tensor& weight,                    // [C_out, C_in, kh, kw]
                const std::optional<Tensor>& bias,       // [C_out]
                const std::optional<Tensor>& in_policy,  // [N, C_in]
                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                int64_t activation) {
  const Domain domain("conv2d_add_", input, weight, std::nullopt, in_policy, 1, stride, padding, dilation, 1);
  check_features(target, "conv2d_add_: target");
  STD_TORCH_CHECK(target.scalar_type() == input.scalar_type() &&
                      sizes_of(target) == output_sizes(domain.problem, input),
                  "conv2d_add_: expected a target of the output's shape and dtype");
  convolve(domain.problem, input, weight, bias, activation, target, domain.units(), no_channels(),
           OutputUse::added_to);
}

std::tuple<Tensor, Tensor, Tensor> gated_conv2d_backward(
    const Tensor& grad_output,               // [N, C_out, H', W']
    const Tensor& input,                     // [N, C_in, H, W]
    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
    const std::optional<Tensor>& policy,     // [N, C_out]
    const std::optional<Tensor>& in_policy,  // [N, C_in]
    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool want_input, bool want_weight, bool want_bias) {
  const Domain domain(kName, input, weight, policy, in_policy, frames, stride, padding, dilation, groups);
  check_gradient(domain.problem, grad_output, input);
  return convolution_gradients(domain.problem, grad_output, input, weight, domain.units(), domain.gradient_units(),
                               dead_channels(domain.in_values, domain.problem.in_channels), want_input, want_weight,
                               want_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("conv2d_add_", TORCH_BOX(&conv2d_add));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace adakernels
