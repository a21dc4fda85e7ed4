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

  Domain(const char* op, const Problem& checked,
         const Tensor& input,                     // [N, C_in, H, W]
         const std::optional<Tensor>& policy,     // [N, C_out]
         const std::optional<Tensor>& in_policy,  // [N, C_in]
         int64_t frames)
      : problem(checked),
        out_values(policy_values(policy, input.size(0), problem.out_channels, op, "policy")),
        in_values(policy_values(in_policy, input.size(0), problem.in_channels, op, "in_policy")),
        frame_count(whole_clips(op, input.size(0), frames)),
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
  static int64_t whole_clips(const char* op, int64_t frame_count, int64_t frames) {
    STD_TORCH_CHECK(frames > 0 && frame_count % frames == 0, op, ": expected frames to divide N");
    return frame_count;
  }
};

Problem image_problem(const char* op,
                      const Tensor& input,   // [N, C_in, H, W]
                      const Tensor& weight,  // [C_out, C_in / groups, kh, kw]
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, op, ": expected tensors of 4 dimensions");
  return problem_of(op, input, weight, stride, padding, dilation, groups);
}

Tensor run_gated(const char* op, const Problem& problem,
                 const Tensor& input,                     // [N, C_in, H, W]
                 const Tensor& weight,                    // as of the problem
                 const std::optional<Tensor>& bias,       // [C_out]
                 const std::optional<Tensor>& policy,     // [N, C_out]
                 const std::optional<Tensor>& in_policy,  // [N, C_in]
                 int64_t frames, int64_t activation) {
  const Domain domain(op, problem, input, policy, in_policy, frames);
  Tensor output = empty_like_format(input, output_sizes(problem, input));
  convolve(problem, input, weight, bias, activation, output, domain.units(),
           zero_channels(domain.out_values, problem.out_channels, frames));
  return output;
}

void run_add(const char* op, const Problem& problem,
             const Tensor& target,                    // [N, C_out, H', W']
             const Tensor& input,                     // [N, C_in, H, W]
             const Tensor& weight,                    // as of the problem
             const std::optional<Tensor>& bias,       // [C_out]
             const std::optional<Tensor>& in_policy,  // [N, C_in]
             int64_t activation) {
  const Domain domain(op, problem, input, std::nullopt, in_policy, 1);
  check_features(target, op);
  STD_TORCH_CHECK(target.scalar_type() == input.scalar_type() && sizes_of(target) == output_sizes(problem, input), op,
                  ": expected a target of the output's shape and dtype");
  convolve(problem, input, weight, bias, activation, target, domain.units(), no_channels(), OutputUse::added_to);
}

Tensor gated_conv2d(const Tensor& input,                     // [N, C_in, H, W]
                    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
                    const std::optional<Tensor>& bias,       // [C_out]
                    const std::optional<Tensor>& policy,     // [N, C_out]
                    const std::optional<Tensor>& in_policy,  // [N, C_in]
                    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, int64_t activation) {
  const Problem problem = image_problem(kName, input, weight, stride, padding, dilation, groups);
  return run_gated(kName, problem, input, weight, bias, policy, in_policy, frames, activation);
}

Tensor winograd_conv2d(const Tensor& input,                     // [N, C_in, H, W]
                       const Tensor& kernels,                   // [C_out, points, C_in]
                       const std::optional<Tensor>& bias,       // [C_out]
                       const std::optional<Tensor>& policy,     // [N, C_out]
                       const std::optional<Tensor>& in_policy,  // [N, C_in]
                       int64_t frames, int64_t stride, std::vector<int64_t> padding, int64_t activation) {
  constexpr char op[] = "winograd_conv2d";
  const Problem problem = winograd_problem(op, input, kernels, stride, padding);
  return run_gated(op, problem, input, kernels, bias, policy, in_policy, frames, activation);
}

void conv2d_add(const Tensor& target,                    // [N, C_out, H', W']
                const Tensor& input,                     // [N, C_in, H, W]
                const Tensor& weight,                    // [C_out, C_in, kh, kw]
                const std::optional<Tensor>& bias,       // [C_out]
                const std::optional<Tensor>& in_policy,  // [N, C_in]
                std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                int64_t activation) {
  constexpr char op[] = "conv2d_add_";
  const Problem problem = image_problem(op, input, weight, stride, padding, dilation, 1);
  run_add(op, problem, target, input, weight, bias, in_policy, activation);
}

void winograd_conv2d_add(const Tensor& target,                    // [N, C_out, H', W']
                         const Tensor& input,                     // [N, C_in, H, W]
                         const Tensor& kernels,                   // [C_out, points, C_in]
                         const std::optional<Tensor>& bias,       // [C_out]
                         const std::optional<Tensor>& in_policy,  // [N, C_in]
                         int64_t stride, std::vector<int64_t> padding, int64_t activation) {
  constexpr char op[] = "winograd_conv2d_add_";
  const Problem problem = winograd_problem(op, input, kernels, stride, padding);
  run_add(op, problem, target, input, kernels, bias, in_policy, activation);
}

int64_t winograd_block(std::vector<int64_t> size, int64_t in_channels, int64_t out_channels, int64_t stride,
                       std::vector<int64_t> padding) {
  STD_TORCH_CHECK(size.size() == 2 && size[0] >= 0 && size[1] >= 0 && padding.size() == 2 && padding[0] >= 0 &&
                      padding[1] >= 0 && in_channels >= 0 && out_channels >= 0 && stride > 0,
                  "winograd_block: expected two sizes, numbers of channels, a stride and two paddings");
  const KernelAxis y = {3, stride, padding[0], 1}, x = {3, stride, padding[1], 1};
  return kept_winograd_block({in_channels, out_channels, 1, {1, 1, 0, 1}, y, x}, size[0], size[1]);
}

std::tuple<Tensor, Tensor, Tensor> gated_conv2d_backward(
    const Tensor& grad_output,               // [N, C_out, H', W']
    const Tensor& input,                     // [N, C_in, H, W]
    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
    const std::optional<Tensor>& policy,     // [N, C_out]
    const std::optional<Tensor>& in_policy,  // [N, C_in]
    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool want_input, bool want_weight, bool want_bias) {
  const Problem problem = image_problem(kName, input, weight, stride, padding, dilation, groups);
  const Domain domain(kName, problem, input, policy, in_policy, frames);
  check_gradient(problem, grad_output, input);
  return convolution_gradients(problem, grad_output, input, weight, domain.units(), domain.gradient_units(),
                               dead_channels(domain.in_values, problem.in_channels), want_input, want_weight,
                               want_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("conv2d_add_", TORCH_BOX(&conv2d_add));
  m.impl("winograd_kernels", TORCH_BOX(&winograd_kernels));
  m.impl("winograd_conv2d", TORCH_BOX(&winograd_conv2d));
  m.impl("winograd_conv2d_add_", TORCH_BOX(&winograd_conv2d_add));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

STABLE_TORCH_LIBRARY_IMPL(adakernels, CompositeExplicitAutograd, m) {
  m.impl("winograd_block", TORCH_BOX(&winograd_block));
}

}  // namespace adakernels
