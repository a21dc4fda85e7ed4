#include "convolve.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include "schedule.h"
#include "streams.h"
#include "tensors.h"

namespace adakernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

// Adds the units of one frame, one per group unless told otherwise, from lists that are sorted by channel.
// Of `unit`, its lists and what groups add to its weight offset are still to be set.
void add_units(std::vector<Unit>& units, const Problem& problem, const WeightStrides& strides, Unit unit,
               std::span<const Route> rows, int64_t group_rows, std::span<const Route> live, int64_t group_live,
               bool whole_frame) {
  const auto take = [](std::span<const Route>& list, int64_t end) {
    size_t count = 0;
    while (count < list.size() && list[count].channel < end) ++count;
    const auto taken = list.first(count);
    list = list.subspan(count);
    return taken;
  };
  const int64_t groups = whole_frame ? 1 : problem.group_count;
  for (int64_t g = 0; g < groups; ++g) {
    const auto r = groups == 1 ? rows : take(rows, (g + 1) * group_rows);
    const auto l = groups == 1 ? live : take(live, (g + 1) * group_live);
    if (r.empty() && !whole_frame) continue;  // whole ones have zeros to write
    units.push_back(unit);
    units.back().rows = r.data();
    units.back().row_count = int64_t(r.size());
    units.back().live = l.data();
    units.back().live_count = int64_t(l.size());
    // The weight holds a group's own input channels only, so their numbers count from the group's first.
    units.back().weight_offset -= g * problem.group_in() * strides.in;
  }
}

constexpr int64_t kZeroedPerTask = 64 * 1024;  // elements

// Zeroes neighbouring channels of a frame, in runs as long as the format allows.
void zero_planes(const Planes& planes, int64_t frame, int64_t channel, int64_t count) {
  const int64_t size = planes.scalar == Scalar::f32 ? 4 : 2;
  char* const data = static_cast<char*>(planes.data) +
                     (frame * planes.frame_stride + channel * planes.channel_stride) * size;
  const auto zero = [&](int64_t offset, int64_t run) {
    if (planes.streamed)
      stream_zeros(data + offset * size, run * size);
    else
      std::memset(data + offset * size, 0, size_t(run * size));
  };
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
  constexpr int64_t kListed = 256;
  int32_t list[kListed];
  for (; begin < end; begin += kListed) {
    const int64_t count = zeros.list(frame, begin, std::min(begin + kListed, end), list);
    // Planes by themselves, all of one size: a branch could not predict how long runs of them are.
    const bool single = planes.channel_stride != 1;
    for (int64_t i = 0, run = 1; i < count; i += run, run = 1) {
      while (!single && i + run < count && list[i + run] == list[i] + run) ++run;
      zero_planes(planes, frame, list[i], run);
    }
  }
}

// What a call needs besides its output, kept for the next one: fresh pages cost more than the work done on them.
Scratch& call_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Chooses a convolution's method for some units and lays out what that needs, but for transformed kernels.
void prepare(Convolution& conv, const Problem& problem, std::span<const Unit> units, int64_t row_count,
             int64_t live_count, const Kernels& kernels) {
  const bool whole_weights = problem.group_count == 1 && std::all_of(units.begin(), units.end(), [](const Unit& unit) {
    return unit.weight_offset == 0;
  });
  if (conv.rows_per_live == 0) flatten_grid(conv);
  if (whole_weights && problem.block == 0)
    conv.winograd.block = winograd_block(conv, units, row_count, live_count, kernels);
  if (conv.channels > 0) {
    const int64_t count = ceil_div(row_count, kernels.lanes) * kernels.lanes;
    float* columns = static_cast<float*>(call_scratch().reserve((conv.weight_row + 1) * count * 4));
    kernels.depthwise_columns(conv, columns, count);
    conv.columns = {columns, count};
  }
}

// Transforms the kernels of those of the rows [row_begin, row_end) that units write, where that is not done already.
void transform(Convolution& conv, const Problem& problem, std::span<const Unit> units, int64_t row_begin,
               int64_t row_end, int64_t live_count, const Kernels& kernels) {
  if (conv.winograd.block == 0 || problem.block > 0) return;
  const int64_t numbers = (row_end - row_begin) * transformed_row(conv, live_count, kernels);
  transform_weights(conv, used_rows(units, row_end), row_begin, live_count, kernels,
                    static_cast<float*>(call_scratch().reserve(numbers * 4)));
}

// What units write of the rows of channels [begin, end).
std::vector<Unit> units_of_rows(const std::vector<Unit>& units, int64_t begin, int64_t end) {
  std::vector<Unit> some;
  for (Unit unit : units) {
    const auto below = [&](int64_t channel) {
      return std::partition_point(unit.rows, unit.rows + unit.row_count,
                                  [&](const Route& row) { return row.channel < channel; });
    };
    const Route* const first = below(begin);
    unit.row_count = below(end) - first;
    unit.rows = first;
    if (unit.row_count > 0) some.push_back(unit);
  }
  return some;
}

// Runs convolutions to one target over the same units, in parts of the rows where these have many transformed kernels,
// and zeroes the target's channels that no unit writes.
// live_count: source channels times temporal taps.
void run(std::vector<Convolution>& convs, const Problem& problem, const std::vector<Unit>& units, int64_t row_count,
         int64_t live_count, const FrameChannels& zeros, int64_t frame_count) {
  const Kernels& kernels = best_kernels();
  const Planes target = convs.front().target;
  int64_t parts = 1;
  for (Convolution& conv : convs) {
    prepare(conv, problem, units, row_count, live_count, kernels);
    if (problem.block == 0) parts = std::max(parts, kernel_parts(conv, row_count, live_count, kernels));
  }
  const int64_t plane = target.height * target.width;
  const int64_t chunk = std::max<int64_t>(1, kZeroedPerTask / std::max<int64_t>(1, plane));
  const int64_t chunks = zeros.empty() ? 0 : (row_count + chunk - 1) / chunk;  // of a frame
  const double zero_work = zeros.empty() ? 0. : double(frame_count * row_count * plane) / 16;
  std::vector<Unit> of_part;
  for (int64_t p = 0; p < parts; ++p) {
    const int64_t begin = row_count * p / parts, end = row_count * (p + 1) / parts;
    if (parts > 1) of_part = units_of_rows(units, begin, end);
    const std::span<const Unit> some = parts > 1 ? of_part : units;
    std::vector<Task> tasks;
    for (Convolution& conv : convs) {
      transform(conv, problem, some, begin, end, live_count, kernels);
      add_tasks(tasks, conv, some, kernels, enough_tasks());
    }
    const bool zeroes = p == 0;
    const int64_t count = int64_t(tasks.size()), zeroing = zeroes ? frame_count * chunks : 0;
    const auto run_one = [&](int64_t i, Scratch& scratch) {
      if (i < count) {
        run_task(tasks[size_t(i)], kernels, scratch);
      } else {
        const int64_t first = (i - count) % chunks * chunk;
        zero_channel_range(target, zeros, (i - count) / chunks, first, std::min(first + chunk, row_count));
      }
    };
    run_tasks(count + zeroing, work(tasks) + (zeroes ? zero_work : 0), run_one, zeroing);
  }
}

// The convolution from `source` to `target`, without its weight's values.
Convolution forward_convolution(const Problem& problem, const Planes& source, const Planes& target,
                                const WeightStrides& strides) {
  Convolution conv = {};
  conv.source = source;
  conv.target = target;
  conv.source.tap_stride = problem.t.dilation * conv.source.frame_stride;
  conv.times = problem.t.size;
  conv.weight_row = strides.out;
  conv.weight_channel = strides.in;
  conv.weight_time = strides.time;
  conv.grid_height = conv.target.height;
  conv.grid_width = conv.target.width;
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
  if (problem.group_count > 1 && problem.group_in() == 1) {
    const bool channels_last = can_use_depthwise_channels(conv, problem.in_channels, problem.out_channels);
    if (channels_last) conv.channels = problem.in_channels;
    if (channels_last || can_use_depthwise_planes(conv)) conv.rows_per_live = problem.group_out();
  }
  return conv;
}

// The temporal taps that one input frame meets: every `step`-th one from some tap below `step` on, each in an output
// frame that comes so many frames before that of the last one. They are the temporal taps of the gradient's convolution.
struct MetTaps {
  int64_t step, frames, count;

  explicit MetTaps(const KernelAxis& t)
      : step(t.stride / std::gcd(t.stride, t.dilation)),
        frames(t.dilation / std::gcd(t.stride, t.dilation)),
        count(ceil_div(t.size, step)) {}
};

// The convolutions that make the input's gradient from the output's: one for each position of an input pixel
// between output pixels, that is for each remainder by the stride.
std::vector<Convolution> input_gradient_convolutions(const Problem& problem,
                                                     const Tensor& grad_output,  // [N, C_out, H', W'] | [B, ...]
                                                     const Tensor& grad_input,   // [N, C_in, H, W] | [B, ...]
                                                     const WeightStrides& strides) {
  std::vector<Convolution> convs;
  const Planes target = planes_of(grad_input);
  const MetTaps met(problem.t);
  for (int64_t ry = 0; ry < std::min(problem.y.stride, target.height); ++ry)
    for (int64_t rx = 0; rx < std::min(problem.x.stride, target.width); ++rx) {
      Convolution conv = {};
      conv.source = planes_of(grad_output);
      conv.source.tap_stride = -met.frames * conv.source.frame_stride;
      conv.target = target;
      conv.times = met.count;
      conv.weight_row = strides.in;
      conv.weight_channel = strides.out;
      conv.weight_time = met.step * strides.time;
      conv.grid_height = ceil_div(target.height - ry, problem.y.stride);
      conv.grid_width = ceil_div(target.width - rx, problem.x.stride);
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

Tensor input_gradient(const Problem& problem,
                      const Tensor& grad_output,  // [N, C_out, H', W'] | [B, C_out, T', H', W']
                      const Tensor& input,        // [N, C_in, H, W] | [B, C_in, T, H, W]
                      const Tensor& weight,       // [C_out, C_in / groups, kh, kw] | [..., kt, kh, kw]
                      const MakeUnits& make_units, const FrameChannels& dead) {
  Tensor grad_input = empty_like_format(input, sizes_of(input));
  if (grad_input.numel() == 0) return grad_input;
  const FloatArray weights = floats(weight);
  const WeightStrides strides(problem, weights.channels_last());
  std::vector<Convolution> convs = input_gradient_convolutions(problem, grad_output, grad_input, strides);
  for (Convolution& conv : convs) {
    conv.weight = weights.data();
    conv.weight_extent = weight.numel();
  }
  run(convs, problem, make_units(strides, false), problem.in_channels,
      problem.out_channels * MetTaps(problem.t).count, dead, input.size(0));
  return grad_input;
}

// Sums over frames, one after the other, so that the result does not depend on the number of threads.
void add_parameter_gradients(const Problem& problem,
                             const Tensor& grad_output,  // [N, C_out, H', W'] | [B, C_out, T', H', W']
                             const Tensor& input,        // [N, C_in, H, W] | [B, C_in, T, H, W]
                             const MakeUnits& make_units,
                             float* grad_weight,  // of the weight's shape, or null
                             float* grad_bias) {  // [C_out], or null
  const Kernels& kernels = best_kernels();
  const WeightStrides strides(problem, false);
  const Convolution conv = forward_convolution(problem, planes_of(input), planes_of(grad_output), strides);
  const Planes gradient = conv.target;
  const std::vector<Unit> units = make_units(strides, false);
  const int64_t points = kernels.gradient_points(conv), stride = points + kernels.lanes;
  const int64_t taps = problem.taps();
  const int64_t live_per_task = std::max<int64_t>(1, 2 * kernels.pixel_block / taps);
  struct Part {
    const Unit* unit;
    int64_t first_row, live_begin, live_end;
  };
  std::vector<double> bias_sums(size_t(problem.out_channels), 0.);
  for (size_t begin = 0; begin < units.size();) {
    const int64_t frame = units[begin].frame;
    std::vector<Part> parts;
    std::vector<Route> rows;
    size_t end = begin;
    for (; end < units.size() && units[end].frame == frame; ++end) {
      const Unit& unit = units[end];
      for (int64_t i = 0; i < unit.live_count; i += live_per_task)
        parts.push_back({&unit, int64_t(rows.size()), i, std::min(i + live_per_task, unit.live_count)});
      rows.insert(rows.end(), unit.rows, unit.rows + unit.row_count);
    }
    const int64_t row_count = int64_t(rows.size());
    float* gradients = static_cast<float*>(call_scratch().reserve(row_count * stride * 4));
    run_tasks(row_count, double(row_count * points) / 4, [&](int64_t r, Scratch&) {
      const Route& row = rows[size_t(r)];
      kernels.copy_gradient(conv, gradient, frame, row, gradients + r * stride);
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

}  // namespace

Problem problem_of(const char* op, const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t rank = weight.dim() - 2, first = input.dim() - rank;  // first: of the convolved dimensions
  check_features(input, op);
  check_features(weight, op);
  STD_TORCH_CHECK(input.dim() == weight.dim() || rank == 3, op, ": expected an input of the weight's rank");
  STD_TORCH_CHECK(input.scalar_type() == weight.scalar_type(), op, ": expected one dtype of input and weight");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0 && weight.size(1) * groups == input.size(1), op,
                  ": expected weight of shape [C_out, C_in/groups, ...]");
  STD_TORCH_CHECK(weight.numel() <= INT32_MAX, op, ": the weight has too many elements");
  STD_TORCH_CHECK(int64_t(stride.size()) == rank && int64_t(padding.size()) == rank && int64_t(dilation.size()) == rank,
                  op, ": expected one number for each dimension as stride, padding and dilation");
  std::vector<KernelAxis> axes;
  for (int64_t d = 0; d < rank; ++d) {
    const KernelAxis axis = {weight.size(2 + d), stride[size_t(d)], padding[size_t(d)], dilation[size_t(d)]};
    STD_TORCH_CHECK(axis.size > 0 && axis.stride > 0 && axis.padding >= 0 && axis.dilation > 0, op,
                    ": expected positive numbers as kernel size, stride and dilation");
    const bool packed_frames = input.dim() < weight.dim() && d == 0;
    if (packed_frames) {
      STD_TORCH_CHECK(axis.stride == 1 && 2 * axis.padding == axis.dilation * (axis.size - 1), op,
                      ": expected packed clips to keep their number of frames");
    } else {
      STD_TORCH_CHECK(input.size(first + d) + 2 * axis.padding > axis.dilation * (axis.size - 1), op,
                      ": expected a kernel within the padded input");
    }
    axes.push_back(axis);
  }
  if (rank == 2) axes.insert(axes.begin(), {1, 1, 0, 1});
  STD_TORCH_CHECK(axes[0].size <= INT16_MAX, op, ": expected a kernel of at most 32767 temporal taps");
  return {input.size(1), weight.size(0), groups, axes[0], axes[1], axes[2]};
}

Problem winograd_problem(const char* op, const Tensor& input, const Tensor& kernels, int64_t stride,
                         const std::vector<int64_t>& padding) {
  check_features(input, op);
  const int64_t points = kernels.dim() == 3 ? kernels.size(1) : 0, block = points == 36 ? 4 : points == 16 ? 2 : 0;
  STD_TORCH_CHECK(input.dim() == 4 && block > 0 && kernels.scalar_type() == ScalarType::Float &&
                      kernels.size(2) == input.size(1) && kernels.stride(2) == 1,
                  op, ": expected transformed kernels [C_out, points, C_in]");
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0 && input.size(2) + 2 * padding[0] >= 3 &&
                      input.size(3) + 2 * padding[1] >= 3 && (stride == 1 || (stride == 2 && block == 2)),
                  op, ": expected a stride of the kernels, and a kernel within the padded input");
  return {input.size(1), kernels.size(0), 1, {1, 1, 0, 1}, {3, stride, padding[0], 1}, {3, stride, padding[1], 1},
          block};
}

int64_t kept_winograd_block(const Problem& problem, int64_t height, int64_t width) {
  Planes source = {}, target = {};
  source.height = height, source.width = width;
  target.height = problem.y.output(height), target.width = problem.x.output(width);
  if (target.height <= 0 || target.width <= 0) return 0;
  const Convolution conv = forward_convolution(problem, source, target, WeightStrides(problem, false));
  return winograd_block(conv, problem.out_channels, problem.in_channels, best_kernels());
}

Tensor winograd_kernels(const Tensor& weight, int64_t block, int64_t stride) {
  check_features(weight, "winograd_kernels: weight");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                  "winograd_kernels: expected a weight of 3x3 kernels");
  STD_TORCH_CHECK((stride == 1 && (block == 2 || block == 4)) || (stride == 2 && block == 2),
                  "winograd_kernels: expected blocks of a side of 2 or, at stride 1, of 4");
  const FloatArray weights = floats(weight);
  const Problem problem = {weight.size(1), weight.size(0), 1, {1, 1, 0, 1}, {3, stride, 1, 1}, {3, stride, 1, 1}};
  Planes map = {};
  map.height = map.width = 4;  // which has no influence, but that taps are dropped on smaller ones
  Convolution conv = forward_convolution(problem, map, map, WeightStrides(problem, weights.channels_last()));
  conv.weight = weights.data();
  conv.weight_extent = weight.numel();
  conv.winograd.block = block;
  const Kernels& kernels = best_kernels();
  const int64_t row = transformed_row(conv, problem.in_channels, kernels), points = (block + 2) * (block + 2);
  Tensor transformed = empty_strided({problem.out_channels, points, problem.in_channels}, {row, row / points, 1},
                                     aoti_torch_dtype_float32());
  std::vector<int64_t> rows(size_t(problem.out_channels));
  std::iota(rows.begin(), rows.end(), 0);
  transform_weights(conv, rows, 0, problem.in_channels, kernels, static_cast<float*>(transformed.mutable_data_ptr()));
  return transformed;
}

std::vector<int64_t> output_sizes(const Problem& problem, const Tensor& input) {
  const int64_t rank = input.dim();
  std::vector<int64_t> sizes = {input.size(0), problem.out_channels};
  if (rank == 5) sizes.push_back(problem.t.output(input.size(2)));
  sizes.push_back(problem.y.output(input.size(rank - 2)));
  sizes.push_back(problem.x.output(input.size(rank - 1)));
  return sizes;
}

WeightStrides::WeightStrides(const Problem& problem, bool channels_last)
    : out(problem.group_in() * problem.t.size * problem.taps()),
      in(channels_last ? 1 : problem.t.size * problem.taps()),
      time(problem.taps() * (channels_last ? problem.group_in() : 1)),
      tap(channels_last ? problem.group_in() : 1) {}

std::vector<Unit> frame_units(const Problem& problem, const WeightStrides& strides, int64_t frame_count,
                              const FrameRoutes& rows, int64_t group_rows, const FrameRoutes& live, int64_t group_live,
                              bool whole_frames) {
  std::vector<Unit> units;
  units.reserve(size_t(frame_count * problem.group_count));
  for (int64_t t = 0; t < frame_count; ++t)
    add_units(units, problem, strides, Unit{.frame = t, .source_frame = t}, rows[t], group_rows, live[t], group_live,
              whole_frames);
  return units;
}

std::span<const Route> TapRoutes::operator()(int64_t begin, int64_t end) {
  std::vector<Route>& list = lists_[{begin, end}];
  if (list.empty() && begin < end) {
    list.reserve(size_t(channels_ * (end - begin)));
    for (int64_t c = 0; c < channels_; ++c)
      for (int64_t j = begin; j < end; ++j) list.push_back({int32_t(c), true, false, int16_t(j)});
  }
  return list;
}

std::vector<Unit> clip_units(const Problem& problem, const WeightStrides& strides, const std::vector<Clip>& clips,
                             TapRoutes& rows, TapRoutes& live, bool whole_frames) {
  const KernelAxis& t = problem.t;
  std::vector<Unit> units;
  for (const Clip& clip : clips)
    for (int64_t frame = 0; frame < clip.output_frames; ++frame) {
      const int64_t first = frame * t.stride - t.padding;  // the frame that tap 0 reads
      const int64_t begin = std::max(clip.tap_begin, first < 0 ? ceil_div(-first, t.dilation) : 0);
      const int64_t end = std::min(clip.tap_end, ceil_div(std::max<int64_t>(0, clip.input_frames - first), t.dilation));
      add_units(units, problem, strides, Unit{.frame = clip.output + frame, .source_frame = clip.input + first},
                rows(0, 1), problem.group_out(), live(begin, std::max(begin, end)), problem.group_in(), whole_frames);
    }
  return units;
}

std::vector<Unit> clip_gradient_units(const Problem& problem, const WeightStrides& strides,
                                      const std::vector<Clip>& clips, TapRoutes& rows, TapRoutes& live) {
  const KernelAxis& t = problem.t;
  const MetTaps met(t);
  std::vector<Unit> units;
  for (const Clip& clip : clips)
    for (int64_t frame = 0; frame < clip.input_frames; ++frame) {
      int64_t first = 0;  // the first tap that meets the frame
      while (first < met.step && (frame + t.padding - first * t.dilation) % t.stride != 0) ++first;
      const int64_t output = (frame + t.padding - first * t.dilation) / t.stride;  // where it does
      int64_t begin = 0, end = first == met.step ? 0 : met.count;
      const auto misses = [&](int64_t i) {
        const int64_t tap = first + i * met.step, at = output - i * met.frames;
        return tap < clip.tap_begin || tap >= clip.tap_end || at < 0 || at >= clip.output_frames;
      };
      while (begin < end && misses(begin)) ++begin;
      while (begin < end && misses(end - 1)) --end;
      add_units(units, problem, strides,
                Unit{.frame = clip.input + frame,
                     .source_frame = clip.output + output,
                     .weight_offset = begin < end ? first * strides.time : 0},
                rows(0, 1), problem.group_in(), live(begin, end), problem.group_out(), false);
    }
  return units;
}

namespace {

// The operands of a convolution as the kernels take them.
struct Operands {
  FloatArray weights, biases;
  WeightStrides strides;
  Convolution conv;

  Operands(const Problem& problem,
           const Tensor& input,                // [N, C_in, H, W] | [B, C_in, T, H, W]
           const Tensor& weight,               // [C_out, C_in / groups, kh, kw] | [..., kt, kh, kw] | transformed
           const std::optional<Tensor>& bias,  // [C_out]
           int64_t activation,
           const Tensor& output)  // [N, C_out, H', W'] | [B, C_out, T', H', W']
      : weights(problem.block > 0 ? FloatArray() : floats(weight)),
        biases(floats(bias)),
        strides(problem, weights.channels_last()),
        conv(forward_convolution(problem, planes_of(input), planes_of(output), strides)) {
    STD_TORCH_CHECK(activation >= 0 && activation <= int64_t(Activation::silu), "unknown activation");
    STD_TORCH_CHECK(!bias.has_value() || bias->numel() == problem.out_channels, "expected bias [C_out]");
    conv.weight = weights.data();
    conv.weight_extent = weight.numel();
    if (problem.block > 0) {
      STD_TORCH_CHECK(suits_winograd(conv), "expected no transformed kernels for a map of that size");
      const auto* const kernels = static_cast<const float*>(weight.const_data_ptr());
      conv.winograd = {kernels, 0, weight.stride(0), weight.stride(1), problem.block};
    }
    conv.bias = biases.data();
    conv.activation = Activation(activation);
  }
};

}  // namespace

void convolve(const Problem& problem, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
              int64_t activation, const Tensor& output, const MakeUnits& make_units, const FrameChannels& zeros,
              OutputUse use) {
  if (output.numel() == 0) return;
  Operands operands(problem, input, weight, bias, activation, output);
  Convolution& conv = operands.conv;
  conv.accumulates = use == OutputUse::added_to;
  conv.target.streamed = use == OutputUse::final && conv.target.scalar == Scalar::f32 &&
                         conv.target.column_stride == 1 && output.numel() * 4 >= kStreamedBytes;
  const bool zeroes = conv.channels > 0 && !zeros.empty();
  if (zeroes) conv.zeros = &zeros;
  const std::vector<Unit> units = make_units(operands.strides, conv.rows_per_live > 0);
  std::vector<Convolution> convs = {std::move(conv)};
  run(convs, problem, units, problem.out_channels, problem.in_channels * problem.t.size,
      zeroes ? no_channels() : zeros, output.size(0));
  call_scratch().trim();
}

void convolve_blocks(const Problem& problem, const Tensor& input, const Tensor& weight,
                     const std::optional<Tensor>& bias, const Tensor& output, const MakeBlocks& make_blocks,
                     double finish_work, const std::function<void(int64_t, Scratch&)>& finish) {
  Operands operands(problem, input, weight, bias, int64_t(Activation::none), output);
  Convolution& conv = operands.conv;
  const UnitBlocks blocks = make_blocks(operands.strides, conv.rows_per_live > 0);
  const Kernels& kernels = best_kernels();
  const std::span<const Unit> units = blocks.units;
  const int64_t channel_count = problem.in_channels * problem.t.size;
  prepare(conv, problem, units, problem.out_channels, channel_count, kernels);
  transform(conv, problem, units, 0, problem.out_channels, channel_count, kernels);
  std::vector<Task> tasks;
  std::vector<size_t> task_ends = {0};
  for (size_t b = 0, begin = 0; b < blocks.ends.size(); begin = blocks.ends[b++]) {
    add_tasks(tasks, conv, units.subspan(begin, blocks.ends[b] - begin), kernels, 1);
    task_ends.push_back(tasks.size());
  }
  run_tasks(int64_t(blocks.ends.size()), work(tasks) + finish_work, [&](int64_t b, Scratch& scratch) {
    for (size_t i = task_ends[size_t(b)]; i < task_ends[size_t(b) + 1]; ++i) run_task(tasks[i], kernels, scratch);
    finish(b, scratch);
  });
  call_scratch().trim();
}

void check_gradient(const Problem& problem, const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                      sizes_of(grad_output) == output_sizes(problem, input),
                  "expected a gradient of the output's shape and dtype");
}

std::tuple<Tensor, Tensor, Tensor> convolution_gradients(const Problem& problem, const Tensor& grad_output,
                                                         const Tensor& input, const Tensor& weight,
                                                         const MakeUnits& units, const MakeUnits& gradient_units,
                                                         const FrameChannels& dead, bool want_input, bool want_weight,
                                                         bool want_bias) {
  Tensor grad_input = want_input ? input_gradient(problem, grad_output, input, weight, gradient_units, dead)
                                 : torch::stable::new_empty(input, {0});
  const auto zeros = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(weight, sizes, ScalarType::Float);
  };
  Tensor grad_weight = zeros(want_weight ? sizes_of(weight) : std::vector<int64_t>{0});
  Tensor grad_bias = zeros({want_bias ? problem.out_channels : 0});
  if (grad_output.numel() > 0 && (want_weight || want_bias))
    add_parameter_gradients(problem, grad_output, input, units,
                            want_weight ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr,
                            want_bias ? static_cast<float*>(grad_bias.mutable_data_ptr()) : nullptr);
  const auto in_dtype = [&](const Tensor& tensor) {
    return weight.scalar_type() == ScalarType::Float ? tensor : torch::stable::to(tensor, weight.scalar_type());
  };
  return {grad_input, in_dtype(grad_weight), in_dtype(grad_bias)};
}

}  // namespace adakernels
