// gated_conv2d for the CPU: turns the policies into a domain and hands it to the convolution core.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "routes.h"
#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::stable::Tensor;

struct Window {
  int64_t size, stride, padding, dilation;
  int64_t output(int64_t input) const { return (input + 2 * padding - dilation * (size - 1) - 1) / stride + 1; }
};

// Sizes of one call.
struct Problem {
  int64_t frame_count, in_channels, out_channels, group_count, frames;
  Window y, x;

  int64_t taps() const { return y.size * x.size; }
  int64_t group_in() const { return in_channels / group_count; }
  int64_t group_out() const { return out_channels / group_count; }
};

Problem problem_of(const Tensor& input,   // [N, C_in, H, W]
                   const Tensor& weight,  // [C_out, C_in / groups, kh, kw]
                   int64_t frames, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  return {input.size(0),
          input.size(1),
          weight.size(0),
          groups,
          frames,
          {weight.size(2), stride[0], padding[0], dilation[0]},
          {weight.size(3), stride[1], padding[1], dilation[1]}};
}

// One unit per frame and group, from lists that are sorted by channel.
std::vector<Unit> units_of(const Problem& problem, const FrameRoutes& rows, int64_t group_rows, const FrameRoutes& live,
                           int64_t group_live) {
  std::vector<Unit> units;
  units.reserve(size_t(problem.frame_count * problem.group_count));
  const auto add = [&](int64_t frame, std::span<const Route> r, std::span<const Route> l, int64_t weight_offset) {
    if (!r.empty()) units.push_back({frame, r.data(), int64_t(r.size()), l.data(), int64_t(l.size()), weight_offset});
  };
  const auto take = [](std::span<const Route>& list, int64_t end) {
    size_t count = 0;
    while (count < list.size() && list[count].channel < end) ++count;
    const auto taken = list.first(count);
    list = list.subspan(count);
    return taken;
  };
  for (int64_t t = 0; t < problem.frame_count; ++t) {
    std::span<const Route> row_list = rows[t], live_list = live[t];
    if (problem.group_count == 1) {
      add(t, row_list, live_list, 0);
      continue;
    }
    for (int64_t g = 0; g < problem.group_count; ++g) {
      const auto r = take(row_list, (g + 1) * group_rows), l = take(live_list, (g + 1) * group_live);
      // The weight holds a group's own input channels only, so their numbers count from the group's first.
      add(t, r, l, -g * problem.group_in() * problem.taps());
    }
  }
  return units;
}

constexpr int64_t kZeroedPerTask = 64 * 1024;  // elements

void zero_plane(const Planes& planes, int64_t frame, int64_t channel) {
  const int64_t size = planes.scalar == Scalar::f32 ? 4 : 2;
  char* plane = static_cast<char*>(planes.data) +
                (frame * planes.frame_stride + channel * planes.channel_stride) * size;
  for (int64_t y = 0; y < planes.height; ++y) {
    char* row = plane + y * planes.row_stride * size;
    if (planes.column_stride == 1 && planes.row_stride == planes.width) {
      std::memset(row, 0, size_t(planes.height * planes.width * size));
      return;
    }
    if (planes.column_stride == 1)
      std::memset(row, 0, size_t(planes.width * size));
    else
      for (int64_t x = 0; x < planes.width; ++x) std::memset(row + x * planes.column_stride * size, 0, size_t(size));
  }
}

// What a call needs besides its output, kept for the next one: fresh pages cost more than the work done on them.
Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Runs the convolutions over the units they were planned for, and zeroes the channels that no unit writes.
void run(const std::vector<Task>& tasks, const Planes& target, const FrameChannels& zeros, const Kernels& kernels) {
  const int64_t count = int64_t(tasks.size()), zero_count = int64_t(zeros.size());
  const int64_t plane = target.height * target.width;
  const int64_t chunk = std::max<int64_t>(1, kZeroedPerTask / std::max<int64_t>(1, plane));
  const double zero_work = double(zero_count * plane) / 16;
  run_tasks(count + (zero_count + chunk - 1) / chunk, work(tasks) + zero_work, [&](int64_t i, Scratch& scratch) {
    if (i < count) {
      run_task(tasks[size_t(i)], kernels, scratch);
    } else {
      const int64_t first = (i - count) * chunk;
      for (int64_t z = first; z < std::min(first + chunk, zero_count); ++z)
        zero_plane(target, zeros[size_t(z)].frame, zeros[size_t(z)].channel);
    }
  });
}

Tensor gated_conv2d(const Tensor& input,                     // [N, C_in, H, W]
                    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
                    const std::optional<Tensor>& bias,       // [C_out]
                    const std::optional<Tensor>& policy,     // [N, C_out]
                    const std::optional<Tensor>& in_policy,  // [N, C_in]
                    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding,
                    std::vector<int64_t> dilation, int64_t groups, int64_t activation) {
  const Problem problem = problem_of(input, weight, frames, stride, padding, dilation, groups);
  const int64_t N = problem.frame_count;
  const auto out_policy = policy_values(policy, N, problem.out_channels);
  const auto live_policy = policy_values(in_policy, N, problem.in_channels);

  Tensor output = empty_like_format(input, {N, problem.out_channels, problem.y.output(input.size(2)),
                                            problem.x.output(input.size(3))});
  if (output.numel() == 0) return output;
  const FloatArray weights = floats(weight), biases = floats(bias);

  Convolution conv = {};
  conv.source = planes_of(input);
  conv.target = planes_of(output);
  conv.weight = weights.data();
  conv.weight_row = problem.group_in() * problem.taps();
  conv.weight_channel = problem.taps();
  conv.bias = biases.data();
  conv.activation = Activation(activation);
  conv.grid_height = output.size(2);
  conv.grid_width = output.size(3);
  conv.step_y = problem.y.stride;
  conv.step_x = problem.x.stride;
  conv.target_step_y = conv.target_step_x = 1;
  conv.all_live_here = true;
  for (int64_t ky = 0; ky < problem.y.size; ++ky)
    for (int64_t kx = 0; kx < problem.x.size; ++kx)
      conv.taps.push_back({.dy = int32_t(ky * problem.y.dilation - problem.y.padding),
                           .dx = int32_t(kx * problem.x.dilation - problem.x.padding),
                           .weight = int32_t(ky * problem.x.size + kx)});
  lay_out_taps(conv);

  const FrameRoutes rows = computed_routes(out_policy, N, problem.out_channels, frames);
  const FrameRoutes live = live_routes(live_policy, N, problem.in_channels);
  const FrameChannels zeros = zero_channels(out_policy, N, problem.out_channels, frames);
  const std::vector<Unit> units = units_of(problem, rows, problem.group_out(), live, problem.group_in());
  const Kernels& kernels = best_kernels();
  const Planes target = conv.target;
  flatten_grid(conv);
  if (problem.group_count == 1 && can_use_winograd(conv, units))
    transform_weights(conv, units, problem.out_channels, problem.in_channels, kernels, call_scratch());
  std::vector<Task> tasks;
  add_tasks(tasks, conv, units, kernels);
  run(tasks, target, zeros, kernels);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
}

}  // namespace adakernels
