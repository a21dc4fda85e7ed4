// The weight gradient of one frame: products of gradient planes and shifted source planes, summed over grid points.
#pragma once

#include "direct.h"
#include "transpose.h"

namespace adakernels {
namespace {

// The patch of a whole frame, as convolve_direct lays it out.
struct FrameLayout {
  int64_t width, height, pitch, plane, channel, point_count;

  explicit FrameLayout(const Convolution& conv) {
    width = conv.grid_width + conv.shift_x;
    height = conv.grid_height + conv.shift_y;
    pitch = width;
    plane = height * pitch;
    channel = int64_t(conv.phases.size()) * plane;
    point_count = (conv.grid_height - 1) * pitch + conv.grid_width;
  }
};

// Gradient planes of a frame's rows as float32, numbered like the patch's points, zero between the rows of the grid.
int64_t gradient_points(const Convolution& conv) { return FrameLayout(conv).point_count; }

void copy_gradient(const Convolution& conv, const Planes& gradient, int64_t frame, const Route& row, float* points) {
  const FrameLayout layout(conv);
  const Window window = {0, 0, conv.grid_height, conv.grid_width, 1, 1, 0, conv.grid_width};
  for (int64_t i = 0; i < layout.point_count + kLanes; ++i) points[i] = 0;
  copy_route(points, layout.pitch, gradient, frame, row, window);
  // The copy may overrun a row's end.
  for (int64_t y = 0; y + 1 < conv.grid_height; ++y)
    for (int64_t x = conv.grid_width; x < layout.pitch; ++x) points[y * layout.pitch + x] = 0;
  for (int64_t i = 0; i < kLanes; ++i) points[layout.point_count + i] = 0;
}

// Adds a unit's part to the gradient of its weights from live channels [live_begin, live_end).
// gradients: [row_count][gradient_points + kLanes], as copy_gradient leaves them.
void add_weight_gradient(const Convolution& conv, const Unit& unit, const float* gradients, int64_t live_begin,
                         int64_t live_end, float* grad_weight, Scratch& scratch) {
  constexpr int64_t block = kVectors * kLanes;  // columns of a register tile: (live channel, tap) pairs
  constexpr int64_t chunk = 12 * kLanes;        // grid points that a panel spans
  const FrameLayout frame(conv);
  const int64_t tap_count = int64_t(conv.taps.size()), phase_count = int64_t(conv.phases.size());
  const int64_t live_count = live_end - live_begin, column_count = live_count * tap_count;
  const int64_t block_count = (column_count + block - 1) / block, columns = block_count * block;

  Layout layout;
  const int64_t windows_at = layout.add<Window>(phase_count);
  const int64_t patch_at = layout.add<float>(live_count * frame.channel + kTilePixels);
  const int64_t panel_at = layout.add<float>(chunk * block);
  const int64_t steps_at = layout.add<Step>(chunk);
  const int64_t offsets_at = layout.add<int64_t>(columns);
  const int64_t targets_at = layout.add<int64_t>(columns);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  Window* windows = reinterpret_cast<Window*>(memory + windows_at);
  float* patch = reinterpret_cast<float*>(memory + patch_at);
  float* panel = reinterpret_cast<float*>(memory + panel_at);
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  int64_t* offsets = reinterpret_cast<int64_t*>(memory + offsets_at);
  int64_t* targets = reinterpret_cast<int64_t*>(memory + targets_at);

  for (int64_t p = 0; p < phase_count; ++p) {
    const Phase& phase = conv.phases[size_t(p)];
    windows[p] =
        window_of(conv.source, phase.dy, phase.dx, frame.height, frame.width, conv.step_y, conv.step_x);
  }
  for (int64_t i = 0; i < live_count; ++i)
    copy_phases(patch + i * frame.channel, frame.plane, frame.pitch, conv.source, unit.source_frame,
                unit.live[live_begin + i], windows, phase_count);
  for (int64_t i = 0; i < kTilePixels; ++i) patch[live_count * frame.channel + i] = 0;
  for (int64_t j = 0; j < columns; ++j) {
    const int64_t i = std::min(j, column_count - 1);  // columns past the last one repeat it and are dropped
    const Tap& tap = conv.taps[size_t(i % tap_count)];
    offsets[j] = i / tap_count * frame.channel + tap.phase * frame.plane + tap.shift_y * frame.pitch + tap.shift_x;
    targets[j] = live_weight(conv, unit.live[live_begin + i / tap_count]) + tap.weight;
  }
  for (int64_t k = 0; k < chunk; ++k) steps[k] = {int32_t(k), int32_t(k * block)};

  alignas(64) float out[kRows * kTilePixels];
  const float zero[kRows] = {};
  const int64_t stride = frame.point_count + kLanes;
  for (int64_t begin = 0; begin < frame.point_count; begin += chunk) {
    const int64_t count = std::min(chunk, frame.point_count - begin);
    for (int64_t b = 0; b < block_count; ++b) {
      for (int64_t p = 0; p < count; p += kLanes)
        for (int64_t j = 0; j < block; j += kLanes) {
          const float* rows[kLanes];
          for (int i = 0; i < kLanes; ++i) rows[i] = patch + offsets[b * block + j + i] + begin + p;
          transpose(rows, panel + p * block + j, block);
        }
      const int64_t kept = std::min(block, column_count - b * block);
      const int64_t* target = targets + b * block;
      const bool dense = target[kept - 1] - target[0] == kept - 1;
      for_row_groups(0, unit.row_count, [&](int64_t first, int64_t row_count) {
        const float* rows[kRows];
        for (int64_t r = 0; r < row_count; ++r) rows[r] = gradients + (first + r) * stride + begin;
        const Product product = {rows, steps, count, panel, zero};
        multiply<0, true>(product, row_count, block, out, kTilePixels, [](int64_t, int64_t) {});
        for (int64_t r = 0; r < row_count; ++r) {
          float* to = grad_weight + unit.weight_offset + unit.rows[first + r].channel * conv.weight_row;
          const float* from = out + r * kTilePixels;
          if (dense) {
            for (int64_t j = 0; j < kept; ++j) to[target[0] + j] += from[j];
          } else {
            for (int64_t j = 0; j < kept; ++j) to[target[j]] += from[j];
          }
        }
      });
    }
  }
}

}  // namespace
}  // namespace adakernels
