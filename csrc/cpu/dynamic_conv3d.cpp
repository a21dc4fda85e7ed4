// dynamic_conv3d for the CPU: the convolution core computes some frames and channels of each clip, in the place where
// the output has them, and the reconstruction makes the others from these.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "../common/layout.h"
#include "convolve.h"
#include "reconstruct.h"
#include "schedule.h"
#include "tensors.h"

namespace adakernels {

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A clip's weights of the levels of one gate.
struct Levels {
  float weights[kLevels];
  bool any() const { return std::any_of(weights, weights + kLevels, [](float w) { return w != 0; }); }
  bool only_first() const { return std::all_of(weights + 1, weights + kLevels, [](float w) { return w == 0; }); }
};

// Level 0 for every clip where there is no gate. [B, S]
std::vector<Levels> levels_of(const std::optional<Tensor>& gate, int64_t clips, const char* name) {
  std::vector<Levels> levels(size_t(clips), Levels{{gate.has_value() ? 0.f : 1.f}});
  if (!gate.has_value()) return levels;
  STD_TORCH_CHECK(gate->dim() == 2 && gate->size(0) == clips && gate->size(1) >= 1 && gate->size(1) <= kLevels,
                  "dynamic_conv3d: expected ", name, " of shape [B, 1 to 3]");
  const FloatArray values = floats(gate);
  for (int64_t b = 0; b < clips; ++b)
    for (int64_t s = 0; s < gate->size(1); ++s) {
      const float weight = values.data()[b * gate->size(1) + s];
      if (!(weight >= 0)) {
        // As Python prints it, which knows no sign of NaN.
        char text[32];
        std::snprintf(text, sizeof text, "%g", std::isnan(weight) ? NAN : weight);
        throw std::invalid_argument(std::string("dynamic_conv3d: expected ") + name +
                                    " of non-negative weights, got " + text);
      }
      levels[size_t(b)].weights[s] = weight;
    }
  return levels;
}

// The kernel size of the reconstruction; throws unless its weights are there for all levels that the gates have.
int64_t kernel_size(const std::optional<Tensor>& temporal_gate, const std::optional<Tensor>& channel_gate,
                    const std::optional<Tensor>& temporal_weight,  // [2^(S_t-1) - 1, C_out, k, k]
                    const std::optional<Tensor>& channel_weight,   // [C_out, k, k]
                    int64_t channels) {
  int64_t size = 1;
  const auto check = [&](const std::optional<Tensor>& gate, const std::optional<Tensor>& filters, int64_t dims,
                         const char* name) {
    const int64_t levels = gate.has_value() ? gate->size(1) : 1;
    STD_TORCH_CHECK(filters.has_value() || levels == 1, "dynamic_conv3d: expected ", name, " for several levels");
    if (!filters.has_value()) return;
    size = filters->size(filters->dim() - 1);
    STD_TORCH_CHECK(filters->dim() == dims && (size == 1 || size == 3) && filters->size(dims - 2) == size &&
                        filters->size(dims - 3) == channels &&
                        (dims == 3 || filters->size(0) + 1 >= int64_t(1) << (levels - 1)),
                    "dynamic_conv3d: expected ", name, " of k x k for every channel that is made");
  };
  check(channel_gate, channel_weight, 3, "channel_weight");
  const int64_t before = size;
  check(temporal_gate, temporal_weight, 4, "temporal_weight");
  STD_TORCH_CHECK(!channel_weight.has_value() || !temporal_weight.has_value() || size == before,
                  "dynamic_conv3d: expected one k of temporal_weight and channel_weight");
  return size;
}

constexpr int64_t kMadePerTask = 64 * 1024;  // elements

// Finishes a group of a clip's frames, for some classes of channels.
struct ReconstructionTask {
  const Reconstruction* what;
  int64_t first_frame, class_begin, class_end;
};

void reconstruct_all(const std::vector<Reconstruction>& clips) {
  std::vector<ReconstructionTask> tasks;
  double work = 0;
  for (const Reconstruction& what : clips) {
    const int64_t group = what.frame_group(), classes = what.channel_classes();
    const int64_t per_class = what.channels / classes * group * what.height * what.width;
    const int64_t parts = std::clamp<int64_t>(classes * per_class / kMadePerTask, 1, classes);
    for (int64_t t = 0; t < what.frames; t += group)
      for (int64_t p = 0; p < parts; ++p)
        tasks.push_back({&what, t, classes * p / parts, classes * (p + 1) / parts});
    work += double(what.channels * what.frames * what.height * what.width * what.kernel * what.kernel);
  }
  const Kernels& kernels = best_kernels();
  run_tasks(int64_t(tasks.size()), work, [&](int64_t i, Scratch& scratch) {
    const ReconstructionTask& task = tasks[size_t(i)];
    kernels.reconstruct(*task.what, task.first_frame, task.class_begin, task.class_end, scratch);
  });
}

Tensor dynamic_conv3d(const Tensor& input,                            // [B, C_in, T, H, W]
                      const Tensor& weight,                           // [C_out, C_in / groups, kt, kh, kw]
                      const std::optional<Tensor>& bias,              // [C_out]
                      const std::optional<Tensor>& temporal_gate,     // [B, S_t]
                      const std::optional<Tensor>& channel_gate,      // [B, S_c]
                      const std::optional<Tensor>& temporal_weight,   // [2^(S_t-1) - 1, C_out, k, k]
                      const std::optional<Tensor>& channel_weight,    // [C_out, k, k]
                      std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                      int64_t groups, int64_t activation) {
  const Problem problem = problem_of("dynamic_conv3d", input, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(input.dim() == 5, "dynamic_conv3d: expected input of 5 dimensions");
  const int64_t B = input.size(0), C = problem.out_channels;
  const std::vector<Levels> temporal = levels_of(temporal_gate, B, "temporal_gate");
  const std::vector<Levels> channel = levels_of(channel_gate, B, "channel_gate");
  const int64_t kernel = kernel_size(temporal_gate, channel_gate, temporal_weight, channel_weight, C);
  const std::vector<int64_t> sizes = output_sizes(problem, input);
  const int64_t T = sizes[2], plane = sizes[3] * sizes[4];
  Tensor output = empty_like_format(input, sizes);
  if (output.numel() == 0) return output;

  // Frames and channels are made from rows of float32 pixels: where the output has none, in a tensor of its own.
  const bool in_place = output.is_contiguous() && output.scalar_type() == ScalarType::Float;
  Tensor features = in_place ? output : torch::stable::new_empty(input, sizes, ScalarType::Float);
  float* const data = static_cast<float*>(features.mutable_data_ptr());
  const FloatArray temporal_filters = floats(temporal_weight), channel_filters = floats(channel_weight);
  std::vector<Reconstruction> made;
  bool whole = true;  // all clips are computed whole and counted once
  for (int64_t b = 0; b < B; ++b) {
    const Levels &t = temporal[size_t(b)], &c = channel[size_t(b)];
    float* const clip = data + b * C * T * plane;
    if (!t.any() || !c.any()) {
      std::memset(clip, 0, size_t(C * T * plane) * 4);
      continue;
    }
    Reconstruction what = {clip, C, T, sizes[3], sizes[4], {}, {}, kernel, temporal_filters.data(),
                           channel_filters.data(), Activation(activation)};
    std::copy_n(t.weights, kLevels, what.temporal);
    std::copy_n(c.weights, kLevels, what.channel);
    whole = whole && t.only_first() && c.only_first() && t.weights[0] * c.weights[0] == 1;
    made.push_back(what);
  }

  std::map<int64_t, TapRoutes> rows;  // by the number of channels that are computed
  TapRoutes live(problem.in_channels);
  const auto units = [&](const WeightStrides& strides, bool whole_frames) {
    std::vector<Unit> all;
    for (const Reconstruction& what : made) {
      const int64_t b = (what.clip - data) / (C * T * plane), step = what.frame_step(), first = b * C * T;
      Problem strided = problem;
      strided.t.stride *= step;
      const Clip clip = {b * clip_stride(input), input.size(2), first, ceil_div(T, step), 0, problem.t.size};
      TapRoutes& computed = rows.try_emplace(what.computed(), what.computed()).first->second;
      for (Unit unit : clip_units(strided, strides, {clip}, computed, live, whole_frames)) {
        unit.frame = first + (unit.frame - first) * step;
        all.push_back(unit);
      }
    }
    return all;
  };
  if (!made.empty())
    convolve(problem, input, weight, bias, whole ? activation : int64_t(Activation::none), features, units,
             zero_channels(nullptr, C, 1));
  if (!whole) reconstruct_all(made);
  if (!in_place) torch::stable::copy_(output, features);
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) { m.impl("dynamic_conv3d", TORCH_BOX(&dynamic_conv3d)); }

}  // namespace adakernels
