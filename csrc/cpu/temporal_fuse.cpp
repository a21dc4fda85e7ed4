// temporal_fuse for the CPU: every plane is a weighted sum of its frame's and the previous frame's plane.
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "routes.h"
#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weights of the frame itself and of its history, from a policy of either form.
class MixingWeights {
 public:
  MixingWeights(const Tensor& policy, int64_t frame_count, int64_t channels) : channels_(channels) {
    if (policy.dim() != 3) {
      values_ = policy_values(policy, frame_count, channels, "temporal_fuse", "policy");
    } else {
      STD_TORCH_CHECK(policy.size(0) == frame_count && policy.size(1) == channels && policy.size(2) == 3,
                      "temporal_fuse: expected a policy of shape [N, C, 3]");
      soft_ = floats(policy);
    }
  }

  float keep(int64_t frame, int64_t channel) const { return weight(frame, channel, 0); }
  float reuse(int64_t frame, int64_t channel) const { return weight(frame, channel, 1); }

 private:
  float weight(int64_t frame, int64_t channel, int64_t which) const {
    const int64_t at = frame * channels_ + channel;
    return values_ != nullptr ? float(values_[at] == which) : soft_.data()[3 * at + which];
  }

  int64_t channels_;
  PolicyValues values_ = nullptr;
  FloatArray soft_;
};

constexpr int64_t kPlanesPerTask = 32;

// Calls run(frame, channel) for every plane.
template <typename Run>
void for_planes(const Tensor& tensor, const Run& run) {
  const int64_t channels = tensor.size(1), count = tensor.size(0) * channels;
  run_tasks((count + kPlanesPerTask - 1) / kPlanesPerTask, double(tensor.numel()), [&](int64_t task, Scratch&) {
    for (int64_t i = task * kPlanesPerTask; i < std::min((task + 1) * kPlanesPerTask, count); ++i)
      run(i / channels, i % channels);
  });
}

Tensor empty_in_format(const Tensor& tensor) {
  return empty_like_format(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)});
}

void check_clip(const Tensor& input,  // [N, C, H, W]
                int64_t frames) {
  check_features(input, "temporal_fuse: input");
  STD_TORCH_CHECK(frames > 0 && input.size(0) % frames == 0, "temporal_fuse: expected frames to divide N");
}

Tensor temporal_fuse(const Tensor& input,   // [N, C, H, W]
                     const Tensor& policy,  // [N, C] | [N, C, 3]
                     int64_t frames) {
  check_clip(input, frames);
  Tensor output = empty_in_format(input);
  const MixingWeights weights(policy, input.size(0), input.size(1));
  if (output.numel() == 0) return output;
  const Kernels& kernels = best_kernels();
  const Planes source = planes_of(input), target = planes_of(output);
  for_planes(input, [&](int64_t t, int64_t c) {
    const float reuse = t % frames == 0 ? 0.f : weights.reuse(t, c);
    kernels.mix_planes(target, t, c, source, weights.keep(t, c), reuse, t - 1);
  });
  return output;
}

std::tuple<Tensor, Tensor> temporal_fuse_backward(const Tensor& grad_output,  // [N, C, H, W]
                                                  const Tensor& input,        // [N, C, H, W]
                                                  const Tensor& policy,       // [N, C] | [N, C, 3]
                                                  int64_t frames, bool want_input, bool want_policy) {
  check_clip(input, frames);
  check_features(grad_output, "temporal_fuse: gradient");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_output.size(d) == input.size(d) && grad_output.scalar_type() == input.scalar_type(),
                    "temporal_fuse: expected a gradient of the input's shape and dtype");
  const Kernels& kernels = best_kernels();
  const MixingWeights weights(policy, input.size(0), input.size(1));
  Tensor grad_input = want_input ? empty_in_format(input) : torch::stable::new_empty(input, {0});
  Tensor grad_policy = torch::stable::new_zeros(
      policy, want_policy ? std::vector<int64_t>{policy.size(0), policy.size(1), 3} : std::vector<int64_t>{0},
      ScalarType::Float);
  if (input.numel() > 0) {
    const Planes gradient = planes_of(grad_output), features = planes_of(input);
    if (want_input) {
      const Planes target = planes_of(grad_input);
      for_planes(input, [&](int64_t t, int64_t c) {
        const float reused = (t + 1) % frames == 0 ? 0.f : weights.reuse(t + 1, c);
        kernels.mix_planes(target, t, c, gradient, weights.keep(t, c), reused, t + 1);
      });
    }
    if (want_policy) {
      float* to = static_cast<float*>(grad_policy.mutable_data_ptr());
      for_planes(input, [&](int64_t t, int64_t c) {
        float* row = to + 3 * (t * input.size(1) + c);
        row[0] = float(kernels.dot_planes(gradient, t, features, t, c));
        if (t % frames != 0) row[1] = float(kernels.dot_planes(gradient, t, features, t - 1, c));
      });
    }
  }
  // The gradient has the policy's dtype also where it is empty.
  return {grad_input, policy.scalar_type() == ScalarType::Float ? grad_policy
                                                                : torch::stable::to(grad_policy, policy.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("temporal_fuse", TORCH_BOX(&temporal_fuse));
  m.impl("temporal_fuse_backward", TORCH_BOX(&temporal_fuse_backward));
}

}  // namespace adakernels
