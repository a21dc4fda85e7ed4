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
#include "streams.h"
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

// Frames of a clip from `first` on, and their place among the frames of a tensor as `planes_of` numbers them.
struct Part {
  int64_t clip, first, place;
  Reconstruction what;
};

constexpr int64_t kMadePerTask = 64 * 1024;  // elements
// What a block computes of each channel, if there are blocks enough: filters are set up once for all of it.
constexpr int64_t kBlockPixels = 256;
// What holds frames on their way to another format: little next to the output, and enough for the threads to share.
constexpr int64_t kBufferBytes = 2 << 20, kBufferShare = 16;

// Some groups of a clip's frames and classes of its channels: none of them is made from anything else.
struct Block {
  const Part* part;
  int64_t frame_begin, frame_end, class_begin, class_end;
};

void finish(const Block& block, Scratch& scratch) {
  best_kernels().reconstruct(block.part->what, block.frame_begin, block.frame_end, block.class_begin, block.class_end,
                             scratch);
}

double reconstruction_work(const std::vector<Part>& parts) {
  double work = 0;
  for (const Part& part : parts) {
    const Reconstruction& what = part.what;
    work += double(what.channels * what.frames * what.height * what.width * what.kernel * what.kernel);
  }
  return work;
}

// Whether so many blocks keep the threads about equally busy.
bool balances(size_t blocks) {
  const size_t threads = size_t(torch::stable::get_num_threads());
  return blocks >= 4 * threads || (blocks > 0 && blocks % threads == 0);
}

// One block for each `groups` groups of frames.
std::vector<Block> blocks_of_frames(const std::vector<Part>& parts, int64_t groups) {
  std::vector<Block> blocks;
  for (const Part& part : parts) {
    const int64_t frames = part.what.frames, step = groups * part.what.frame_group();
    for (int64_t t = 0; t < frames; t += step)
      blocks.push_back({&part, t, std::min(t + step, frames), 0, part.what.channel_classes()});
  }
  return blocks;
}

// The same for as many groups as leave the threads equally busy, where a frame's planes are so small that each costs
// little next to what is worked out for them all.
std::vector<Block> blocks_of_frames(const std::vector<Part>& parts) {
  std::vector<Block> blocks = blocks_of_frames(parts, 1);
  if (!balances(blocks.size())) return blocks;
  const int64_t fewest = 2 * int64_t(torch::stable::get_num_threads());
  const int64_t plane = parts.front().what.height * parts.front().what.width;
  for (int64_t groups = std::min(kBlockPixels / plane, int64_t(blocks.size()) / fewest); groups > 1; --groups) {
    std::vector<Block> larger = blocks_of_frames(parts, groups);
    if (int64_t(larger.size()) >= fewest && balances(larger.size())) return larger;
  }
  return blocks;
}

// Blocks of classes in all frames of a channel, which are neighbours in memory, as far as that leaves blocks that are
// small enough.
std::vector<Block> blocks_of_classes(const std::vector<Part>& parts) {
  std::vector<Block> blocks;
  for (const Part& part : parts) {
    const Reconstruction& what = part.what;
    const int64_t group = what.frame_group(), groups = ceil_div(what.frames, group), classes = what.channel_classes();
    const int64_t wanted = std::max<int64_t>(1, what.channels * what.frames * what.height * what.width / kMadePerTask);
    const int64_t class_parts = std::min(wanted, classes);
    const int64_t frame_parts = std::clamp<int64_t>(wanted / class_parts, 1, groups);
    for (int64_t c = 0; c < class_parts; ++c)
      for (int64_t f = 0; f < frame_parts; ++f)
        blocks.push_back({&part, groups * f / frame_parts * group,
                          std::min(groups * (f + 1) / frame_parts * group, what.frames), classes * c / class_parts,
                          classes * (c + 1) / class_parts});
  }
  return blocks;
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

  const FloatArray temporal_filters = floats(temporal_weight), channel_filters = floats(channel_weight);
  std::vector<Part> clips;  // those with live branches
  bool whole = true;        // all clips are computed whole and counted once
  for (int64_t b = 0; b < B; ++b) {
    const Levels &t = temporal[size_t(b)], &c = channel[size_t(b)];
    if (!t.any() || !c.any()) {
      Tensor clip = torch::stable::select(output, 0, b);
      torch::stable::zero_(clip);
      continue;
    }
    Reconstruction what = {nullptr, C, T, sizes[3], sizes[4], 0, 0, {}, {}, kernel, temporal_filters.data(),
                           channel_filters.data(), Activation(activation), false};
    std::copy_n(t.weights, kLevels, what.temporal);
    std::copy_n(c.weights, kLevels, what.channel);
    whole = whole && t.only_first() && c.only_first() && t.weights[0] * c.weights[0] == 1;
    clips.push_back({b, 0, b * clip_stride(output), what});
  }

  std::map<int64_t, TapRoutes> rows;  // by the number of channels that are computed
  TapRoutes live(problem.in_channels);
  // The units of a part, from its first frame to its last.
  const auto units_of = [&](const Part& part, const WeightStrides& strides, bool whole_frames) {
    const int64_t step = part.what.frame_step();
    Problem strided = problem;
    strided.t.stride *= step;
    const Clip clip = {part.clip * clip_stride(input), input.size(2), 0, ceil_div(T, step), 0, problem.t.size};
    TapRoutes& computed = rows.try_emplace(part.what.computed(), part.what.computed()).first->second;
    std::vector<Unit> units = clip_units(strided, strides, {clip}, computed, live, whole_frames);
    for (Unit& unit : units) unit.frame = part.place + unit.frame * step - part.first;
    std::erase_if(units, [&](const Unit& unit) {
      return unit.frame < part.place || unit.frame >= part.place + part.what.frames;
    });
    return units;
  };
  const auto compute = [&](const std::vector<Part>& parts, const Tensor& target) {
    std::vector<Block> blocks = blocks_of_frames(parts);
    const bool frames_balance = balances(blocks.size());
    if (whole || !(frames_balance || groups > 1)) {
      const auto units = [&](const WeightStrides& strides, bool whole_frames) {
        std::vector<Unit> all;
        for (const Part& part : parts) {
          const std::vector<Unit> some = units_of(part, strides, whole_frames);
          all.insert(all.end(), some.begin(), some.end());
        }
        return all;
      };
      convolve(problem, input, weight, bias, whole ? activation : int64_t(Activation::none), target, units,
               zero_channels(nullptr, C, 1), whole ? OutputUse::final : OutputUse::read_again);
      if (whole) return;
      blocks = blocks_of_classes(parts);
      run_tasks(int64_t(blocks.size()), reconstruction_work(parts),
                [&](int64_t b, Scratch& scratch) { finish(blocks[size_t(b)], scratch); });
      return;
    }
    // What reads all input channels goes by frames, what reads one of them by channels.
    const auto make_blocks = [&](const WeightStrides& strides, bool depthwise) {
      UnitBlocks made;
      if (depthwise) blocks = blocks_of_classes(parts);
      const Part* part = nullptr;
      std::vector<Unit> units;  // of that part
      for (const Block& block : blocks) {
        if (part != block.part) units = units_of(*block.part, strides, depthwise);
        part = block.part;
        const Reconstruction& what = part->what;
        for (const Unit& frame_unit : units) {
          const int64_t frame = frame_unit.frame - part->place;
          if (frame < block.frame_begin || frame >= block.frame_end) continue;
          if (!depthwise) {
            made.units.push_back(frame_unit);
            continue;
          }
          // Units of one frame follow one another: they read the same temporal taps, so vectors are shared.
          for (int64_t first = 0; first < what.computed(); first += what.channel_classes()) {
            Unit unit = frame_unit;
            const int64_t end = std::min(first + block.class_end, unit.row_count);
            unit.rows += first + block.class_begin;
            unit.row_count = end - first - block.class_begin;
            if (unit.row_count > 0) made.units.push_back(unit);
          }
        }
        made.ends.push_back(made.units.size());
      }
      return made;
    };
    convolve_blocks(problem, input, weight, bias, target, make_blocks, reconstruction_work(parts),
                    [&](int64_t b, Scratch& scratch) { finish(blocks[size_t(b)], scratch); });
  };
  if (clips.empty()) return output;
  // Frames and channels are made from rows of float32 pixels: where the output has none, in a buffer of some frames.
  const bool in_place = output.is_contiguous() && output.scalar_type() == ScalarType::Float;
  if (whole || in_place) {
    float* const data = static_cast<float*>(output.mutable_data_ptr());
    const bool streamed = output.numel() * 4 >= kStreamedBytes && plane * 4 % kLineBytes == 0 &&
                          bytes_to_line(data) == 0;
    for (Part& part : clips) {
      part.what.planes = data + part.place * plane;
      part.what.channel_stride = T * plane;
      part.what.frame_stride = plane;
      part.what.streamed = streamed;
    }
    compute(clips, output);
    return output;
  }
  int64_t room = std::min(std::max(kBufferBytes / (C * plane * 4), B * T / kBufferShare), B * T);
  for (const Part& part : clips) room = std::max(room, std::min(T, part.what.frame_group()));
  Tensor buffer = torch::stable::new_empty(input, {room, C, sizes[3], sizes[4]}, ScalarType::Float);
  float* const data = static_cast<float*>(buffer.mutable_data_ptr());
  std::vector<Part> parts;
  int64_t used = 0;
  const auto flush = [&] {
    compute(parts, buffer);
    for (const Part& part : parts) {
      Tensor clip = torch::stable::select(output, 0, part.clip);
      Tensor to = torch::stable::narrow(clip, 1, part.first, part.what.frames);
      const Tensor from = torch::stable::narrow(buffer, 0, part.place, part.what.frames);
      torch::stable::copy_(to, torch::stable::transpose(from, 0, 1));
    }
    parts.clear();
    used = 0;
  };
  for (const Part& whole_clip : clips)
    for (int64_t first = 0; first < T;) {
      int64_t count = std::min(T - first, room - used);
      if (count < T - first) count = count / whole_clip.what.frame_group() * whole_clip.what.frame_group();
      if (count == 0) {
        flush();
        continue;
      }
      Part part = whole_clip;
      part.first = first;
      part.place = used;
      part.what.frames = count;
      part.what.planes = data + used * C * plane;
      part.what.channel_stride = plane;
      part.what.frame_stride = C * plane;
      parts.push_back(part);
      first += count;
      used += count;
    }
  flush();
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adakernels, CPU, m) { m.impl("dynamic_conv3d", TORCH_BOX(&dynamic_conv3d)); }

}  // namespace adakernels
