// The iteration domain of a convolution, as data: what the core visits for each output frame.
#pragma once

#include <cstdint>
#include <vector>

namespace adakernels {

class FrameChannels;

enum class Scalar : int32_t { f32, bf16, u8 };

// The order is the operator schema's `activation` argument.
enum class Activation : int32_t { none, relu, relu6, silu };

// A stack of frames of channel planes, strides in elements.
struct Planes {
  void* data;
  Scalar scalar;
  int64_t extent;  // elements from `data` to behind the last one
  int64_t height, width;
  int64_t frame_stride, channel_stride, row_stride, column_stride;
  int64_t tap_stride = 0;  // from a channel's plane to the one that the next temporal tap of a kernel reads
  bool streamed = false;   // written past the caches, where stores are long enough
};

// A channel of frame t and where its plane lives: in frame t, in frame t+1 (its history), or in both.
// Reading sums the planes it names; writing stores to each of them.
// To a 3D convolution a source channel is one at a temporal tap, whose plane lies so many frames further on: taps that
// fall outside of a clip are not on the list.
struct Route {
  int32_t channel;
  bool here, next;
  int16_t tap = 0;
};

// Elements from a stack's data to the plane of a route from some frame.
inline int64_t plane_offset(const Planes& planes, int64_t frame, const Route& route) {
  return frame * planes.frame_stride + route.channel * planes.channel_stride + route.tap * planes.tap_stride;
}

// One kernel tap: its offset in the source and in a weight row. By phases: tap (dy, dx) reads, for grid point (y, x),
// element (y + shift_y, x + shift_x) of the source taken every step pixels from the phase's first one.
struct Tap {
  int64_t dy, dx;
  int32_t weight;
  int32_t phase = 0, shift_y = 0, shift_x = 0;
};

// The sub-grid of the source that starts at this offset and takes every step-th pixel.
struct Phase {
  int64_t dy, dx;
};

// What is visited for one frame and one group of channels.
struct Unit {
  int64_t frame = 0;            // of the target
  int64_t source_frame = 0;     // where live routes count from: that of temporal tap 0, maybe before the clip
  const Route* rows = nullptr;  // target channels to compute
  int64_t row_count = 0;
  const Route* live = nullptr;  // source channels to read
  int64_t live_count = 0;
  int64_t weight_offset = 0;
};

// Transformed 3x3 kernels: point p of channel c at row(r)[p * point_stride + c].
struct WinogradWeights {
  const float* weight;
  int64_t first_row, row_stride, point_stride;
  int64_t block;  // 0, 2 or 4: outputs are made in blocks of that side, by (block + 2)^2 points of each kernel

  const float* row(int64_t r) const { return weight + (r - first_row) * row_stride; }
};

// Element [i, c]: weight i of target channel c, of the last row its bias.
struct Columns {
  const float* data;
  int64_t count;  // channels, rounded up to whole vectors
};

// A convolution from `source` to `target`: grid point (y, x) of the target sums, over live channels and taps,
// weight * source(y * step_y + dy, x * step_x + dx), zero outside the source, and is stored at
// (target_y + y * target_step_y, target_x + x * target_step_x).
// Forward, data gradient and its stride phases are all of this form.
struct Convolution {
  Planes source, target;
  // Row r, channel c at temporal tap j, tap k at [r * weight_row + c * weight_channel + j * weight_time + k.weight].
  const float* weight;
  int64_t weight_row, weight_channel, weight_time;
  int64_t weight_extent;  // elements from `weight` to behind the last one
  const float* bias;  // [rows] or null
  Activation activation;
  bool accumulates;  // adds what the target holds before it activates
  int64_t grid_height, grid_width;
  int64_t step_y, step_x;
  int64_t target_y, target_x, target_step_y, target_step_x;
  std::vector<Tap> taps;
  std::vector<Phase> phases;     // set by lay_out_taps, as is what follows
  int64_t shift_y, shift_x;      // the largest of the taps
  int64_t times = 1;             // temporal taps
  bool all_live_here;            // no live route reads the next frame
  int64_t rows_per_live;         // of a depthwise convolution: row r reads live channel r / rows_per_live alone; else 0
  int64_t channels = 0;          // of a depthwise one between channels-last planes: source channels; else 0
  Columns columns;               // of such a one
  const FrameChannels* zeros = nullptr;  // target channels that such a one zeroes, or null
  WinogradWeights winograd;      // block 0: the direct convolution
};

// Drops the taps that read nothing but zeros, as those of a large dilation may, and groups the others by phase.
void lay_out_taps(Convolution& conv);

// Whether the one tap is the grid point itself and planes are one row each, so that nothing needs to be copied.
bool reads_in_place(const Convolution& conv);

// Whether the rows of the map are so short that points are better gathered one after the other for every tap, which
// takes as many rows of weights to pay, and a source without its padding is no larger than the grid.
bool gathers_points(const Convolution& conv, const Unit& unit);

// Where the weights of a live route lie in a row.
inline int64_t live_weight(const Convolution& conv, const Route& live) {
  return live.channel * conv.weight_channel + live.tap * conv.weight_time;
}

// The number of a live route among all channels and temporal taps.
inline int64_t live_number(const Convolution& conv, const Route& live) { return live.channel * conv.times + live.tap; }

// The distance of the weights of one number and the next, the same for all of them; else 0.
inline int64_t number_stride(const Convolution& conv) {
  if (conv.times == 1) return conv.weight_channel;
  return conv.weight_channel == conv.times * conv.weight_time ? conv.weight_time : 0;
}

// How many numbers there are from that of the first of some live routes to that of the last.
int64_t live_span(const Convolution& conv, const Route* live, int64_t count);

// Part of a unit: a rectangle of the grid and a range of the unit's rows.
struct Tile {
  int64_t y_begin, y_end, x_begin, x_end;
  int64_t row_begin, row_end;
  int64_t next = 0;  // a hint: elements from the source of this tile to that of the tile its thread takes next
};

}  // namespace adakernels
