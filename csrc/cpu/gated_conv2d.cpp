// gated_conv2d for the CPU: turns the policies into a domain and hands it to the convolution core.
#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "routes.h"
#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::stable::Tensor;

// A kernel's extent along one dimension.
struct KernelAxis {
  int64_t size, stride, padding, dilation;
  int64_t output(int64_t input) const { return (input + 2 * padding - dilation * (size - 1) - 1) / stride + 1; }
};

// Sizes of one call.
struct Problem {
  int64_t frame_count, in_channels, out_channels, group_count, frames;
  KernelAxis y, x;

  int64_t taps() const { return y.size * x.size; }
  int64_t group_in() const { return in_channels / group_count; }
  int64_t group_out() const { return out_channels / group_count; }
};

// Checks what a caller past the public function may get wrong, so that nothing is read out of bounds.
Problem problem_of(const Tensor& input,   // [N, C_in, H, W]
                   const Tensor& weight,  // [C_out, C_in / groups, kh, kw]
                   int64_t frames, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  check_features(input, "gated_conv2d: input");
  check_features(weight, "gated_conv2d: weight");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(), "gated_conv2d: expected one dtype of input and weight");
  STD_TORCH_CHECK(frames > 0 && input.size(0) % frames == 0, "gated_conv2d: expected frames to divide N");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0 && weight.size(1) * groups == input.size(1),
                  "gated_conv2d: expected weight of shape [C_out, C_in/groups, kh, kw]");
  STD_TORCH_CHECK(weight.numel() <= INT32_MAX, "gated_conv2d: the weight has too many elements");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                  "gated_conv2d: expected two numbers each as stride, padding and dilation");
  for (size_t d = 0; d < 2; ++d)
    STD_TORCH_CHECK(stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0 &&
                        input.size(2 + int64_t(d)) + 2 * padding[d] > dilation[d] * (weight.size(2 + int64_t(d)) - 1),
                    "gated_conv2d: expected a kernel within the padded input");
  return {input.size(0),
          input.size(1),
          weight.size(0),
          groups,
          frames,
          {weight.size(2), stride[0], padding[0], dilation[0]},
          {weight.size(3), stride[1], padding[1], dilation[1]}};
}

// Distances between the elements of a weight. [C_out, C_in / groups, kh, kw]
struct WeightStrides {
  int64_t out, in, tap;

  WeightStrides(const Problem& problem, bool channels_last)
      : out(problem.group_in() * problem.taps()),
        in(channels_last ? 1 : problem.taps()),
        tap(channels_last ? problem.group_in() : 1) {}
};

// One unit per frame and group, from lists that are sorted by channel; `whole_frames`: one per frame for all groups.
std::vector<Unit> units_of(const Problem& problem, const WeightStrides& strides, const FrameRoutes& rows,
                           int64_t group_rows, const FrameRoutes& live, int64_t group_live,
                           bool whole_frames = false) {
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
    if (problem.group_count == 1 || whole_frames) {
      add(t, row_list, live_list, 0);
      continue;
    }
    for (int64_t g = 0; g < problem.group_count; ++g) {
      const auto r = take(row_list, (g + 1) * group_rows), l = take(live_list, (g + 1) * group_live);
      // The weight holds a group's own input channels only, so their numbers count from the group's first.
      add(t, r, l, -g * problem.group_in() * strides.in);
    }
  }
  return units;
}

constexpr int64_t kZeroedPerTask = 64 * 1024;  // elements

// Zeroes neighbouring channels of a frame, in runs as long as the format allows.
void zero_planes(const Planes& planes, int64_t frame, int64_t channel, int64_t count) {
  const int64_t size = planes.scalar == Scalar::f32 ? 4 : 2;
  char* const data = static_cast<char*>(planes.data) +
                     (frame * planes.frame_stride + channel * planes.channel_stride) * size;
  const auto zero = [&](int64_t offset, int64_t run) { std::memset(data + offset * size, 0, size_t(run * size)); };
  const bool rows = planes.column_stride == 1, whole = rows && planes.row_stride == planes.width;
  if (whole && planes.channel_stride == planes.height * planes.width) {
    zero(0, count * planes.channel_stride);
  } else if (planes.channel_stride == 1) {
    for (int64_t y = 0; y < planes.height; ++y)
      for (int64_t x = 0; x < planes.width; ++x) zero(y * planes.row_stride + x * planes.column_stride, count);
  } else {
    for (int64_t c = 0; c < count; ++c)
      for (int64_t y = 0; y < planes.height; ++y)
        for (int64_t x = 0, run = rows ? planes.width : 1; x < planes.width; x += run)
          zero(c * planes.channel_stride + y * planes.row_stride + x * planes.column_stride, run);
  }
}

// Zeroes those of a frame's channels [begin, end) that are in `zeros`.
void zero_channel_range(const Planes& planes, const FrameChannels& zeros, int64_t frame, int64_t begin, int64_t end) {
  while (begin < end) {
    int64_t c = begin;
    while (c < end && zeros.contains(frame, c)) ++c;
    if (c > begin) zero_planes(planes, frame, begin, c - begin);
    begin = c + 1;
  }
}

// What a call needs besides its output, kept for the next one: fresh pages cost more than the work done on them.
Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Runs convolutions to one target over the same units, and zeroes the target's channels that no unit writes.
void run(std::vector<Convolution>& convs, const Problem& problem, const std::vector<Unit>& units, int64_t row_count,
         int64_t channel_count, const FrameChannels& zeros) {
  const Kernels& kernels = best_kernels();
  const Planes target = convs.front().target;
  std::vector<Task> tasks;
  for (Convolution& conv : convs) {
    if (conv.rows_per_live == 0) flatten_grid(conv);
    if (problem.group_count == 1 && can_use_winograd(conv))
      transform_weights(conv, units, row_count, channel_count, kernels, call_scratch());
    add_tasks(tasks, conv, units, kernels);
  }
  const int64_t count = int64_t(tasks.size());
  const int64_t plane = target.height * target.width;
  const int64_t chunk = std::max<int64_t>(1, kZeroedPerTask / std::max<int64_t>(1, plane));
  const int64_t chunks = zeros.empty() ? 0 : (row_count + chunk - 1) / chunk;  // of a frame
  const double zero_work = zeros.empty() ? 0. : double(problem.frame_count * row_count * plane) / 16;
  run_tasks(count + problem.frame_count * chunks, work(tasks) + zero_work, [&](int64_t i, Scratch& scratch) {
    if (i < count) {
      run_task(tasks[size_t(i)], kernels, scratch);
    } else {
      const int64_t first = (i - count) % chunks * chunk;
      zero_channel_range(target, zeros, (i - count) / chunks, first, std::min(first + chunk, row_count));
    }
  });
}

// The convolution from `input` to `output`, without its operands' values.
Convolution forward_convolution(const Problem& problem,
                                const Tensor& input,   // [N, C_in, H, W]
                                const Tensor& output,  // [N, C_out, H', W']
                                const WeightStrides& strides) {
  Convolution conv = {};
  conv.source = planes_of(input);
  conv.target = planes_of(output);
  conv.weight_row = strides.out;
  conv.weight_channel = strides.in;
  conv.grid_height = output.size(2);
  conv.grid_width = output.size(3);
  conv.step_y = problem.y.stride;
  conv.step_x = problem.x.stride;
  conv.target_step_y = conv.target_step_x = 1;
  conv.all_live_here = true;
  for (int64_t ky = 0; ky < problem.y.size; ++ky)
    for (int64_t kx = 0; kx < problem.x.size; ++kx)
      conv.taps.push_back({.dy = ky * problem.y.dilation - problem.y.padding,
                           .dx = kx * problem.x.dilation - problem.x.padding,
                           .weight = int32_t((ky * problem.x.size + kx) * strides.tap)});
  lay_out_taps(conv);
  if (problem.group_count > 1 && problem.group_in() == 1 && can_use_depthwise(conv))
    conv.rows_per_live = problem.group_out();
  return conv;
}

// The convolutions that make the input's gradient from the output's: one for each position of an input pixel
// between output pixels, that is for each remainder by the stride.
std::vector<Convolution> input_gradient_convolutions(const Problem& problem,
                                                     const Tensor& grad_output,   // [N, C_out, H', W']
                                                     const Tensor& grad_input,    // [N, C_in, H, W]
                                                     const WeightStrides& strides) {
  std::vector<Convolution> convs;
  for (int64_t ry = 0; ry < std::min(problem.y.stride, grad_input.size(2)); ++ry)
    for (int64_t rx = 0; rx < std::min(problem.x.stride, grad_input.size(3)); ++rx) {
      Convolution conv = {};
      conv.source = planes_of(grad_output);
      conv.target = planes_of(grad_input);
      conv.weight_row = strides.in;
      conv.weight_channel = strides.out;
      conv.grid_height = (grad_input.size(2) - ry + problem.y.stride - 1) / problem.y.stride;
      conv.grid_width = (grad_input.size(3) - rx + problem.x.stride - 1) / problem.x.stride;
      conv.step_y = conv.step_x = 1;
      conv.target_y = ry;
      conv.target_x = rx;
      conv.target_step_y = problem.y.stride;
      conv.target_step_x = problem.x.stride;
      for (int64_t ky = 0; ky < problem.y.size; ++ky)
        for (int64_t kx = 0; kx < problem.x.size; ++kx) {
          const int64_t dy = ry + problem.y.padding - ky * problem.y.dilation;
          const int64_t dx = rx + problem.x.padding - kx * problem.x.dilation;
          if (dy % problem.y.stride == 0 && dx % problem.x.stride == 0)
            conv.taps.push_back({.dy = dy / problem.y.stride,
                                 .dx = dx / problem.x.stride,
                                 .weight = int32_t((ky * problem.x.size + kx) * strides.tap)});
        }
      lay_out_taps(conv);
      convs.push_back(std::move(conv));
    }
  return convs;
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
  const auto out_policy = policy_values(policy, N, problem.out_channels, "gated_conv2d", "policy");
  const auto live_policy = policy_values(in_policy, N, problem.in_channels, "gated_conv2d", "in_policy");

  Tensor output = empty_like_format(input, {N, problem.out_channels, problem.y.output(input.size(2)),
                                            problem.x.output(input.size(3))});
  if (output.numel() == 0) return output;
  STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::silu), "gated_conv2d: unknown activation");
  STD_TORCH_CHECK(!bias.has_value() || bias->numel() == problem.out_channels, "gated_conv2d: expected bias [C_out]");
  const FloatArray weights = floats(weight), biases = floats(bias);

  Convolution conv = forward_convolution(problem, input, output, {problem, weights.channels_last()});
  conv.weight = weights.data();
  conv.weight_extent = weight.numel();
  conv.bias = biases.data();
  conv.activation = Activation(activation);

  const FrameRoutes rows = computed_routes(out_policy, N, problem.out_channels, frames);
  const FrameRoutes live = live_routes(live_policy, N, problem.in_channels);
  const FrameChannels zeros = zero_channels(out_policy, problem.out_channels, frames);
  const std::vector<Unit> units = units_of(problem, {problem, weights.channels_last()}, rows, problem.group_out(),
                                           live, problem.group_in(), conv.rows_per_live > 0);
  std::vector<Convolution> convs = {std::move(conv)};
  run(convs, problem, units, problem.out_channels, problem.in_channels, zeros);
  call_scratch().trim();
  return output;
}

Tensor input_gradient(const Problem& problem,
                      const Tensor& grad_output,  // [N, C_out, H', W']
                      const Tensor& input,        // [N, C_in, H, W]
                      const Tensor& weight,       // [C_out, C_in / groups, kh, kw]
                      const FrameRoutes& computed, const FrameRoutes& live, const FrameChannels& dead) {
  Tensor grad_input = empty_like_format(input, {input.size(0), input.size(1), input.size(2), input.size(3)});
  if (grad_input.numel() == 0) return grad_input;
  const FloatArray weights = floats(weight);
  const WeightStrides strides(problem, weights.channels_last());
  std::vector<Convolution> convs = input_gradient_convolutions(problem, grad_output, grad_input, strides);
  for (Convolution& conv : convs) {
    conv.weight = weights.data();
    conv.weight_extent = weight.numel();
  }
  // The lists change roles: live input channels are computed from the computed output channels.
  const std::vector<Unit> units =
      units_of(problem, strides, live, problem.group_in(), computed, problem.group_out());
  run(convs, problem, units, problem.in_channels, problem.out_channels, dead);
  return grad_input;
}

// Sums over frames, one after the other, so that the result does not depend on the number of threads.
void add_parameter_gradients(const Problem& problem,
                             const Tensor& grad_output,  // [N, C_out, H', W']
                             const Tensor& input,        // [N, C_in, H, W]
                             const FrameRoutes& computed, const FrameRoutes& live,
                             float* grad_weight,  // [C_out, C_in / groups, kh, kw], or null
                             float* grad_bias) {  // [C_out], or null
  const Kernels& kernels = best_kernels();
  const Convolution conv = forward_convolution(problem, input, grad_output, {problem, false});
  const Planes gradient = conv.target;
  const std::vector<Unit> units =
      units_of(problem, {problem, false}, computed, problem.group_out(), live, problem.group_in());
  const int64_t points = kernels.gradient_points(conv), stride = points + kernels.lanes;
  const int64_t taps = problem.taps();
  const int64_t live_per_task = std::max<int64_t>(1, 2 * kernels.pixel_block / taps);
  struct Part {
    const Unit* unit;
    int64_t first_row, live_begin, live_end;
  };
  std::vector<double> bias_sums(size_t(problem.out_channels), 0.);
  for (size_t begin = 0; begin < units.size();) {
    size_t end = begin;
    std::vector<Part> parts;
    int64_t row_count = 0;
    for (; end < units.size() && units[end].frame == units[begin].frame; ++end) {
      const Unit& unit = units[end];
      for (int64_t i = 0; i < unit.live_count; i += live_per_task)
        parts.push_back({&unit, row_count, i, std::min(i + live_per_task, unit.live_count)});
      row_count += unit.row_count;
    }
    // Units of a frame hold the frame's routes one after the other.
    const std::span<const Route> rows = computed[units[begin].frame];
    float* gradients = static_cast<float*>(call_scratch().reserve(row_count * stride * 4));
    run_tasks(row_count, double(row_count * points) / 4, [&](int64_t r, Scratch&) {
      const Route& row = rows[size_t(r)];
      kernels.copy_gradient(conv, gradient, units[begin].frame, row, gradients + r * stride);
      if (grad_bias != nullptr)
        for (int64_t i = 0; i < points; ++i) bias_sums[size_t(row.channel)] += double(gradients[r * stride + i]);
    });
    if (grad_weight != nullptr)
      run_tasks(int64_t(parts.size()), double(row_count * points * taps) * double(live_per_task),
                [&](int64_t i, Scratch& scratch) {
                  const Part& part = parts[size_t(i)];
                  kernels.add_weight_gradient(conv, *part.unit, gradients + part.first_row * stride, part.live_begin,
                                              part.live_end, grad_weight, scratch);
                });
    begin = end;
  }
  call_scratch().trim();
  if (grad_bias != nullptr)
    for (size_t c = 0; c < bias_sums.size(); ++c) grad_bias[c] = float(bias_sums[c]);
}

std::tuple<Tensor, Tensor, Tensor> gated_conv2d_backward(
    const Tensor& grad_output,               // [N, C_out, H', W']
    const Tensor& input,                     // [N, C_in, H, W]
    const Tensor& weight,                    // [C_out, C_in / groups, kh, kw]
    const std::optional<Tensor>& policy,     // [N, C_out]
    const std::optional<Tensor>& in_policy,  // [N, C_in]
    int64_t frames, std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
    int64_t groups, bool want_input, bool want_weight, bool want_bias) {
  const Problem problem = problem_of(input, weight, frames, stride, padding, dilation, groups);
  const int64_t N = problem.frame_count;
  check_features(grad_output, "gated_conv2d: gradient");
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() && grad_output.size(0) == N &&
                      grad_output.size(1) == problem.out_channels &&
                      grad_output.size(2) == problem.y.output(input.size(2)) &&
                      grad_output.size(3) == problem.x.output(input.size(3)),
                  "gated_conv2d: expected a gradient of the output's shape and dtype");
  const auto out_policy = policy_values(policy, N, problem.out_channels, "gated_conv2d", "policy");
  const auto live_policy = policy_values(in_policy, N, problem.in_channels, "gated_conv2d", "in_policy");
  const FrameRoutes computed = computed_routes(out_policy, N, problem.out_channels, frames);
  const FrameRoutes live = live_routes(live_policy, N, problem.in_channels);

  Tensor grad_input = want_input ? input_gradient(problem, grad_output, input, weight, computed, live,
                                                  dead_channels(live_policy, problem.in_channels))
                                 : torch::stable::new_empty(input, {0});
  using torch::headeronly::ScalarType;
  const auto zeros = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(weight, sizes, ScalarType::Float);
  };
  Tensor grad_weight = zeros(want_weight ? std::vector<int64_t>{weight.size(0), weight.size(1), weight.size(2),
                                                                weight.size(3)}
                                         : std::vector<int64_t>{0});
  Tensor grad_bias = zeros({want_bias ? problem.out_channels : 0});
  if (grad_output.numel() > 0 && (want_weight || want_bias))
    add_parameter_gradients(problem, grad_output, input, computed, live,
                            want_weight ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr,
                            want_bias ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr);
  const auto in_dtype = [&](const Tensor& tensor) {
    return weight.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, weight.scalar_type());
  };
  return {grad_input, in_dtype(grad_weight), in_dtype(grad_bias)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("gated_conv2d", TORCH_BOX(&gated_conv2d));
  m.impl("gated_conv2d_backward", TORCH_BOX(&gated_conv2d_backward));
}

}  // namespace adakernels
