// sliced_conv3d for the CPU: turns the clips' flags and offsets into ranges of frames and temporal taps, and hands them
// to the convolution core.
#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "convolve.h"
#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr char kName[] = "sliced_conv3d";

// Throws unless the offsets start at 0, do not decrease and end at the number of rows.
const int32_t* checked_offsets(const Tensor& offsets,  // [B + 1]
                               int64_t rows) {
  STD_TORCH_CHECK(offsets.scalar_type() == ScalarType::Int && offsets.dim() == 1 && offsets.size(0) > 0 &&
                      offsets.is_contiguous(),
                  "sliced_conv3d: expected contiguous int32 frame_offsets of shape [B + 1]");
  const auto* values = static_cast<const int32_t*>(offsets.const_data_ptr());
  const int64_t count = offsets.size(0);
  // The dispatcher hands this type on to Python as a ValueError.
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("sliced_conv3d: expected " + what); };
  if (values[0] != 0) refuse("frame_offsets to start at 0, got " + std::to_string(values[0]));
  for (int64_t b = 1; b < count; ++b)
    if (values[b] < values[b - 1])
      refuse("frame_offsets that do not decrease, got " + std::to_string(values[b]) + " after " +
             std::to_string(values[b - 1]));
  if (values[count - 1] != rows)
    refuse("frame_offsets to end at the number of frames, " + std::to_string(rows) + ", got " +
           std::to_string(values[count - 1]));
  return values;
}

Problem checked_problem(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& frame_offsets,
                        const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                        const std::vector<int64_t>& dilation, int64_t groups) {
  STD_TORCH_CHECK(weight.dim() == 5 && input.dim() == (frame_offsets.has_value() ? 4 : 5),
                  "sliced_conv3d: expected a weight of 5 dimensions, and an input of 5, or of 4 with frame_offsets");
  return problem_of(kName, input, weight, stride, padding, dilation, groups);
}

// The clips of one call, and the lists that its units read.
class Domain {
 public:
  Domain(const Problem& problem,
         const Tensor& input,                          // [B, C_in, T, H, W] | [sum T, C_in, H, W]
         const Tensor& output,                         // [B, C_out, T', H', W'] | [sum T, C_out, H', W']
         const std::optional<Tensor>& temporal,        // [B]
         const std::optional<Tensor>& frame_offsets)   // [B + 1]
      : problem_(problem), input_routes_(problem.in_channels), output_routes_(problem.out_channels) {
    const int64_t count = frame_offsets.has_value() ? frame_offsets->size(0) - 1 : input.size(0);
    STD_TORCH_CHECK(!temporal.has_value() ||
                        (temporal->scalar_type() == ScalarType::Bool && temporal->dim() == 1 &&
                         temporal->size(0) == count && temporal->is_contiguous()),
                    "sliced_conv3d: expected a contiguous bool temporal of shape [B]");
    const bool* whole = temporal.has_value() ? static_cast<const bool*>(temporal->const_data_ptr()) : nullptr;
    const int32_t* offsets = frame_offsets.has_value() ? checked_offsets(*frame_offsets, input.size(0)) : nullptr;
    const int64_t centre = problem.t.size / 2;
    for (int64_t b = 0; b < count; ++b) {
      const bool all_taps = whole == nullptr || whole[b];
      Clip clip = {.tap_begin = all_taps ? 0 : centre, .tap_end = all_taps ? problem.t.size : centre + 1};
      if (offsets != nullptr) {
        clip.input = clip.output = offsets[b];
        clip.input_frames = clip.output_frames = offsets[b + 1] - offsets[b];
      } else {
        clip.input = b * clip_stride(input);
        clip.output = b * clip_stride(output);
        clip.input_frames = input.size(2);
        clip.output_frames = output.size(2);
      }
      clips_.push_back(clip);
    }
  }

  const std::vector<Clip>& clips() const { return clips_; }

  MakeUnits units() {
    return [this](const WeightStrides& strides, bool whole_frames) {
      return clip_units(problem_, strides, clips_, output_routes_, input_routes_, whole_frames);
    };
  }
  MakeUnits gradient_units() {
    return [this](const WeightStrides& strides, bool) {
      return clip_gradient_units(problem_, strides, clips_, input_routes_, output_routes_);
    };
  }

 private:
  const Problem& problem_;
  TapRoutes input_routes_, output_routes_;
  std::vector<Clip> clips_;
};

// Whether PyTorch's own convolution, oneDNN, computes runs of clips that have the same taps: it is the faster one where
// channels are innermost in memory, as it wants them.
bool runs_on_torch(const Problem& problem, const Tensor& input) {
  const KernelAxis& t = problem.t;
  return problem.group_count == 1 && is_channels_last(input) && t.stride == 1 && t.size % 2 == 1 &&
         2 * t.padding == t.dilation * (t.size - 1);
}

// Neighbouring clips that one call serves: of single frames for the centre tap, of clips of one length for all taps.
struct Run {
  bool sliced;
  int64_t first_frame, clips, frames;  // frames: of each clip
};

std::vector<Run> runs_of(const std::vector<Clip>& clips, int64_t taps) {
  std::vector<Run> runs;
  for (const Clip& clip : clips) {
    if (clip.input_frames == 0) continue;
    const bool sliced = clip.tap_end - clip.tap_begin < taps;
    Run* const last = runs.empty() || runs.back().sliced != sliced ? nullptr : &runs.back();
    if (last != nullptr && sliced) {
      last->frames += clip.input_frames;
    } else if (last != nullptr && last->frames == clip.input_frames) {
      ++last->clips;
    } else {
      runs.push_back({sliced, clip.input, 1, clip.input_frames});
    }
  }
  return runs;
}

// A view of a run's clips, or of the single frames of a sliced one, in channels-last memory.
Tensor clips_view(const Tensor& tensor, const Run& run) {
  const int64_t rank = tensor.dim(), C = tensor.size(1), H = tensor.size(rank - 2), W = tensor.size(rank - 1);
  const int64_t frame = H * W * C;
  char* data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())) +
               run.first_frame * frame * int64_t(tensor.element_size());
  std::vector<int64_t> sizes = {run.clips, C, run.frames, H, W}, strides = {run.frames * frame, 1, frame, W * C, C};
  if (run.sliced) {
    sizes = {run.frames, C, H, W};
    strides = {frame, 1, W * C, C};
  }
  return torch::stable::from_blob(data, sizes, strides, tensor.device(), tensor.scalar_type());
}

using Stack = std::vector<StableIValue>;
using torch::stable::detail::from;
using torch::stable::detail::to;

// The taps of the weight that a run takes. [C_out, C_in, kt, kh, kw]
Tensor taps_of(const Tensor& weight, const Run& run) {
  return run.sliced ? torch::stable::select(weight, 2, weight.size(2) / 2) : weight;
}

// What follows the tensors in a call for a run: its stride, padding and dilation.
void push_geometry(Stack& stack, const Problem& problem, const Run& run) {
  std::vector<int64_t> stride, padding, dilation;
  for (const KernelAxis* axis : {&problem.t, &problem.y, &problem.x}) {
    if (run.sliced && axis == &problem.t) continue;
    stride.push_back(axis->stride);
    padding.push_back(axis->padding);
    dilation.push_back(axis->dilation);
  }
  for (const auto& values : {stride, padding, dilation}) stack.push_back(from(values));
}

void call(const char* op, Stack& stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
}

// The result of a single run is the output, those of several go to their places in one.
Tensor convolve_on_torch(const Problem& problem, const std::vector<Clip>& clips, const Tensor& input,
                         const Tensor& weight, const std::optional<Tensor>& bias, int64_t activation,
                         const std::vector<int64_t>& sizes) {
  const std::vector<Run> runs = runs_of(clips, problem.t.size);
  const auto push_arguments = [&](Stack& stack, const Run& run) {
    for (const StableIValue value : {from(clips_view(input, run)), from(taps_of(weight, run)), from(bias)})
      stack.push_back(value);
    push_geometry(stack, problem, run);
    stack.push_back(from(activation));
  };
  if (runs.size() == 1) {
    Stack stack;
    push_arguments(stack, runs[0]);
    call("adakernels::channels_last_conv", stack);
    stack = {stack[0], from(sizes), from(strides_like_format(input, sizes)), from(std::nullopt)};
    call("aten::as_strided", stack);
    return to<Tensor>(stack[0]);
  }
  const Tensor output = empty_like_format(input, sizes);
  for (const Run& run : runs) {
    Stack stack = {from(clips_view(output, run))};
    push_arguments(stack, run);
    call("adakernels::channels_last_conv_", stack);
  }
  return output;
}

std::tuple<Tensor, Tensor, Tensor> gradients_on_torch(const Problem& problem, const std::vector<Clip>& clips,
                                                      const Tensor& grad_output, const Tensor& input,
                                                      const Tensor& weight, bool want_input, bool want_weight,
                                                      bool want_bias) {
  const auto zeros = [&](bool wanted, const std::vector<int64_t>& sizes) {
    return torch::stable::new_zeros(weight, wanted ? sizes : std::vector<int64_t>{0});
  };
  const Tensor grad_input = want_input ? empty_like_format(input, sizes_of(input)) : zeros(false, {});
  const Tensor grad_weight = zeros(want_weight, sizes_of(weight));
  const Tensor grad_bias = zeros(want_bias, {problem.out_channels});
  for (const Run& run : runs_of(clips, problem.t.size)) {
    Stack stack = {from(want_input ? clips_view(grad_input, run) : grad_input),
                   from(want_weight ? taps_of(grad_weight, run) : grad_weight),
                   from(grad_bias),
                   from(clips_view(grad_output, run)),
                   from(clips_view(input, run)),
                   from(taps_of(weight, run))};
    push_geometry(stack, problem, run);
    for (const bool want : {want_input, want_weight, want_bias}) stack.push_back(from(want));
    call("adakernels::channels_last_conv_backward_", stack);
  }
  return {grad_input, grad_weight, grad_bias};
}

// Whether each point of the output follows from the one at its place alone.
bool is_pointwise(const Problem& problem) {
  const auto is_point = [](const KernelAxis& axis) { return axis.size == 1 && axis.stride == 1 && axis.padding == 0; };
  return is_point(problem.t) && is_point(problem.y) && is_point(problem.x);
}

// A view of contiguous clips as single frames of one row, which take fewer and longer passes. [B, C, 1, 1, T * H * W]
Tensor rows_view(const Tensor& clips) {
  const int64_t C = clips.size(1), points = clips.size(2) * clips.size(3) * clips.size(4);
  return torch::stable::from_blob(const_cast<void*>(clips.const_data_ptr()), {clips.size(0), C, 1, 1, points},
                                  {C * points, points, points, points, 1}, clips.device(), clips.scalar_type());
}

Tensor sliced_conv3d(const Tensor& input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
                     const Tensor& weight,                        // [C_out, C_in / groups, kt, kh, kw]
                     const std::optional<Tensor>& bias,           // [C_out]
                     const std::optional<Tensor>& temporal,       // [B]
                     const std::optional<Tensor>& frame_offsets,  // [B + 1]
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, int64_t activation) {
  const Problem problem = checked_problem(input, weight, frame_offsets, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes = output_sizes(problem, input);
  if (runs_on_torch(problem, input) && std::find(sizes.begin(), sizes.end(), 0) == sizes.end()) {
    // The output has the frames of the input.
    Domain domain(problem, input, input, temporal, frame_offsets);
    return convolve_on_torch(problem, domain.clips(), input, weight, bias, activation, sizes);
  }
  const Tensor output = empty_like_format(input, sizes);
  const bool in_rows = !frame_offsets.has_value() && input.is_contiguous() && input.numel() > 0 && is_pointwise(problem);
  const Tensor source = in_rows ? rows_view(input) : input, target = in_rows ? rows_view(output) : output;
  Domain domain(problem, source, target, temporal, frame_offsets);
  convolve(problem, source, weight, bias, activation, target, domain.units(), no_channels());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> sliced_conv3d_backward(
    const Tensor& grad_output,                   // [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    const Tensor& input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
    const Tensor& weight,                        // [C_out, C_in / groups, kt, kh, kw]
    const std::optional<Tensor>& temporal,       // [B]
    const std::optional<Tensor>& frame_offsets,  // [B + 1]
    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
    bool want_input, bool want_weight, bool want_bias) {
  const Problem problem = checked_problem(input, weight, frame_offsets, stride, padding, dilation, groups);
  check_gradient(problem, grad_output, input);
  // In bfloat16, oneDNN 3.12 gets weight gradients wrong where a kernel is longer than the input.
  if (runs_on_torch(problem, input) && input.scalar_type() == ScalarType::Float && grad_output.numel() > 0 &&
      has_format(grad_output, true)) {
    Domain domain(problem, input, input, temporal, frame_offsets);
    return gradients_on_torch(problem, domain.clips(), grad_output, input, weight, want_input, want_weight, want_bias);
  }
  Domain domain(problem, input, grad_output, temporal, frame_offsets);
  return convolution_gradients(problem, grad_output, input, weight, domain.units(), domain.gradient_units(),
                               no_channels(), want_input, want_weight, want_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) {
  m.impl("sliced_conv3d", TORCH_BOX(&sliced_conv3d));
  m.impl("sliced_conv3d_backward", TORCH_BOX(&sliced_conv3d_backward));
}

}  // namespace adakernels
