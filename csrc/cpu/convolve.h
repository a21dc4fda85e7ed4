// What all convolution operators share: the geometry of a call, its units, and the passes forward and backward.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "domain.h"
#include "kernels/kernels.h"
#include "routes.h"

namespace adakernels {

// A kernel's extent along one dimension.
struct KernelAxis {
  int64_t size, stride, padding, dilation;
  int64_t output(int64_t input) const { return (input + 2 * padding - dilation * (size - 1) - 1) / stride + 1; }
};

// Sizes of one call. A 2D convolution has one temporal tap.
struct Problem {
  int64_t in_channels, out_channels, group_count;
  KernelAxis t, y, x;
  int64_t block = 0;  // not 0: the weight's kernels are transformed for blocks of that side, by winograd_kernels

  int64_t taps() const { return y.size * x.size; }
  int64_t group_in() const { return in_channels / group_count; }
  int64_t group_out() const { return out_channels / group_count; }
};

// Checks what a caller past the public function `op` may get wrong, so that nothing is read out of bounds. Frames of
// packed clips go with a weight of one more dimension.
Problem problem_of(const char* op,
                   const torch::stable::Tensor& input,   // [N, C_in, H, W] | [B, C_in, T, H, W]
                   const torch::stable::Tensor& weight,  // [C_out, C_in / groups, kh, kw] | [..., kt, kh, kw]
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups);

// The same of a 2D convolution with transformed kernels.
Problem winograd_problem(const char* op,
                         const torch::stable::Tensor& input,    // [N, C_in, H, W]
                         const torch::stable::Tensor& kernels,  // [C_out, points, C_in]
                         int64_t stride, const std::vector<int64_t>& padding);

// The side of the blocks to transform the kernels of a 2D convolution for, once for many calls with maps of that size;
// 0 where they are better left as they are.
int64_t kept_winograd_block(const Problem& problem, int64_t height, int64_t width);

// The kernels of a weight as Winograd's method multiplies with them, float32.
torch::stable::Tensor winograd_kernels(const torch::stable::Tensor& weight,  // [C_out, C_in, 3, 3]
                                       int64_t block, int64_t stride);       // [C_out, points, C_in]

// Sizes of the output for an input. A packed input keeps its number of frames.
std::vector<int64_t> output_sizes(const Problem& problem, const torch::stable::Tensor& input);

// Distances between the elements of a weight. [C_out, C_in / groups, kh, kw] | [C_out, C_in / groups, kt, kh, kw]
struct WeightStrides {
  int64_t out, in, time, tap;

  WeightStrides(const Problem& problem, bool channels_last);
};

// Lists of units that read and write lists which the caller keeps. `whole_frames`: one unit per frame for all groups.
using MakeUnits = std::function<std::vector<Unit>(const WeightStrides&, bool whole_frames)>;

// One unit per frame and group, from lists that are sorted by channel, of a 2D convolution.
std::vector<Unit> frame_units(const Problem& problem, const WeightStrides& strides, int64_t frame_count,
                              const FrameRoutes& rows, int64_t group_rows, const FrameRoutes& live, int64_t group_live,
                              bool whole_frames);

// A clip of some input frames and the output's frames for it, counted in the strides of their stacks, and the temporal
// taps [tap_begin, tap_end) that are not left out.
struct Clip {
  int64_t input = 0, input_frames = 0, output = 0, output_frames = 0;
  int64_t tap_begin = 0, tap_end = 0;
};

// For each range of temporal taps the routes of all channels at these taps, by channel and then by tap.
class TapRoutes {
 public:
  explicit TapRoutes(int64_t channels) : channels_(channels) {}
  std::span<const Route> operator()(int64_t begin, int64_t end);

 private:
  int64_t channels_;
  std::map<std::pair<int64_t, int64_t>, std::vector<Route>> lists_;
};

// One unit per output frame and group of 3D clips, from `rows` of all output channels.
std::vector<Unit> clip_units(const Problem& problem, const WeightStrides& strides, const std::vector<Clip>& clips,
                             TapRoutes& rows, TapRoutes& live, bool whole_frames);

// The same with the roles exchanged: one per input frame, which reads the output channels at the taps that met it.
std::vector<Unit> clip_gradient_units(const Problem& problem, const WeightStrides& strides,
                                      const std::vector<Clip>& clips, TapRoutes& rows, TapRoutes& live);

// What becomes of an output: it is done, or read again at once, or was there before and is added to.
enum class OutputUse { final, read_again, added_to };

// Computes `output`, or adds to it before it is activated, and zeroes the channels in `zeros`, which no unit writes.
void convolve(const Problem& problem, const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
              const std::optional<torch::stable::Tensor>& bias, int64_t activation,
              const torch::stable::Tensor& output, const MakeUnits& units, const FrameChannels& zeros,
              OutputUse use = OutputUse::final);

// Units in blocks, each of which ends where the next one begins.
struct UnitBlocks {
  std::vector<Unit> units;
  std::vector<size_t> ends;
};
using MakeBlocks = std::function<UnitBlocks(const WeightStrides&, bool whole_frames)>;

// Computes what the units of blocks write, each block in one thread, which then calls finish(block, scratch): that
// finds what was computed in its caches. finish_work: multiply-adds that all these calls stand for
void convolve_blocks(const Problem& problem, const torch::stable::Tensor& input, const torch::stable::Tensor& weight,
                     const std::optional<torch::stable::Tensor>& bias, const torch::stable::Tensor& output,
                     const MakeBlocks& blocks, double finish_work,
                     const std::function<void(int64_t, Scratch&)>& finish);

// Throws unless the gradient has the output's shape and dtype.
void check_gradient(const Problem& problem, const torch::stable::Tensor& grad_output,
                    const torch::stable::Tensor& input);

// The gradients of input, weight and bias, each empty where it is not wanted. units: those of the forward pass;
// gradient_units: with the roles exchanged; dead: the input's channels that none of these writes.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> convolution_gradients(
    const Problem& problem, const torch::stable::Tensor& grad_output, const torch::stable::Tensor& input,
    const torch::stable::Tensor& weight, const MakeUnits& units, const MakeUnits& gradient_units,
    const FrameChannels& dead, bool want_input, bool want_weight, bool want_bias);

}  // namespace adakernels
