// The depthwise convolution: every row reads one live channel. A vector holds one pixel of kLanes planes, so that a tap
// of a pixel is one aligned multiply-add, whatever the list of channels, the size of the plane and the stride.
#pragma once

#include <algorithm>
#include <utility>

#include "activation.h"
#include "direct.h"
#include "gemm_tile.h"
#include "kernels.h"
#include "lanes.h"

namespace adakernels {
namespace {

// Pixels of a row that are summed at once: with the tap's weights and a product they fill 16 registers.
constexpr int kRunPixels = 14;
// Computed pixels that wait to be stored together, so that the rows of small planes make whole vectors.
constexpr int64_t kStoredPixels = 128;
// Up to this size, a plane is fetched while the ones before it are computed: it ends before the processor would have
// seen what to fetch ahead.
constexpr int64_t kPrefetchedPixels = 1024;

// out[i] = start + sum over steps of weights[step.weight] * source[step.source + i], all of them vectors.
template <int count>
void depthwise_run(const float* source, const Step* steps, int64_t step_count, const float* weights,
                   const float* start, float* out) {
  using V = Vector<kLanes>;
  V sum[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) sum[i] = load<kLanes>(start);
  for (const Step *step = steps, *end = step + step_count; step != end; ++step) {
    const V weight = load<kLanes>(weights + step->weight);
    const float* pixels = source + step->source;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) sum[i] += weight * load<kLanes>(pixels + i * kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) store<kLanes>(out + i * kLanes, sum[i]);
}

using RunFunction = void (*)(const float*, const Step*, int64_t, const float*, const float*, float*);

template <int... counts>
constexpr RunFunction pick_run(int64_t count, std::integer_sequence<int, counts...>) {
  constexpr RunFunction functions[] = {depthwise_run<counts + 1>...};
  return functions[count - 1];
}

// One row of the grid: its steps, and where the pixels that it reads end.
struct GridRow {
  int32_t step_begin, step_end, pixel_end;
};

// What the planes of a task have in common. Pixel p of the source, counted from row `first_row` on, is kept at
// offsets[p] of a ring of rows that lie in the order of their stride phases between zeros.
struct DepthwiseGeometry {
  int64_t first_row, last_row;
  int64_t ring_rows, phase_columns, pitch;  // in vectors
  const int32_t* offsets;
  const GridRow* rows;
  const Step* steps;
};

// A plane to compute: its row, what it is read from, and what it is written to.
struct Lanes {
  const float* source[kLanes];
  const float* weights[kLanes];
  float* target[kLanes];
  // Second targets, and the lanes that go to them.
  float* copy[kLanes];
  int copied[kLanes];
  int64_t copy_count;
  alignas(64) float start[kLanes];
};

// Fetches part `i` of `parts` of some planes.
template <bool write, typename Plane>
inline void prefetch_part(Plane* const* planes, int64_t size, int64_t i, int64_t parts) {
  constexpr int64_t line = 16;
  const int64_t lines = (size + line - 1) / line;
  for (int64_t at = lines * i / parts; at < lines * (i + 1) / parts; ++at)
    for (int l = 0; l < kLanes; ++l) __builtin_prefetch(planes[l] + at * line, write, 2);
}

// `next`: the planes that come after these, or null.
inline void depthwise_group(const Convolution& conv, const Tile& tile, const DepthwiseGeometry& geometry,
                            const Lanes& lanes, const Lanes* next, float* ring, float* weights, float* out) {
  const int64_t width = conv.grid_width;
  const int64_t source_size = (geometry.last_row - geometry.first_row + 1) * conv.source.width;
  const int64_t target_size = (tile.y_end - tile.y_begin) * width;
  if (source_size > kPrefetchedPixels) next = nullptr;
  gather_lanes(lanes.weights, 0, conv.weight_row,
               [&](int64_t i, Vector<kLanes> v) { store<kLanes>(weights + i * kLanes, v); });
  const int64_t runs = (width + kRunPixels - 1) / kRunPixels, rows_stored = std::max<int64_t>(1, kStoredPixels / width);
  float* target[kLanes];
  int64_t filled = 0;
  for (int64_t y = tile.y_begin; y < tile.y_end; y += rows_stored) {
    const int64_t end = std::min(tile.y_end, y + rows_stored);
    for (int64_t i = y; i < end; ++i) {
      const GridRow& row = geometry.rows[i - tile.y_begin];
      if (next != nullptr) {
        prefetch_part<false>(next->source, source_size, i - tile.y_begin, tile.y_end - tile.y_begin);
        prefetch_part<true>(next->target, target_size, i - tile.y_begin, tile.y_end - tile.y_begin);
      }
      if (filled < row.pixel_end) {
        gather_lanes(lanes.source, filled, row.pixel_end, [&](int64_t p, Vector<kLanes> v) {
          store<kLanes>(ring + geometry.offsets[p], v);
        });
        filled = row.pixel_end;
      }
      float* to = out + (i - y) * width * kLanes;
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t first = width * r / runs, count = width * (r + 1) / runs - first;
        pick_run(count, std::make_integer_sequence<int, kRunPixels>())(
            ring + first * kLanes, geometry.steps + row.step_begin, row.step_end - row.step_begin, weights,
            lanes.start, to + first * kLanes);
      }
      activate(conv.activation, to, width * kLanes);
    }
    for (int l = 0; l < kLanes; ++l) target[l] = lanes.target[l] + y * width;
    scatter_lanes(target, out, (end - y) * width);
    for (int64_t i = 0; i < lanes.copy_count; ++i)
      std::memcpy(lanes.copy[i] + y * width, target[lanes.copied[i]], size_t((end - y) * width) * 4);
  }
}

// Rows that are told apart at once by whether the channel that they read is live, so that the dead ones are filled next
// to the arithmetic of the others.
constexpr int64_t kSortedRows = 32;

// Marks the live channels of a unit. Returns whether these are the first `channels` ones, which needs no marks.
inline bool mark_live(const Unit& unit, int64_t channels, uint8_t* marks) {
  // In a sorted list of distinct channels the first ones are all there if the last of as many entries is.
  if (unit.live_count >= channels && (channels == 0 || unit.live[channels - 1].channel == channels - 1)) return true;
  std::memset(marks, 0, size_t(channels));
  for (const Route* live = unit.live; live != unit.live + unit.live_count && live->channel < channels; ++live)
    marks[live->channel] = 1;
  return false;
}

// Tile rows count through all units of the task, which may be of several frames.
void convolve_depthwise(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                        Scratch& scratch) {
  const Planes &source = conv.source, &target = conv.target;
  const int64_t grid_rows = tile.y_end - tile.y_begin, tap_count = int64_t(conv.taps.size());
  int64_t first_y = 0, last_y = 0, first_x = 0, last_x = 0;
  for (const Tap& tap : conv.taps) {
    first_y = std::min<int64_t>(first_y, tap.dy), last_y = std::max<int64_t>(last_y, tap.dy);
    first_x = std::min<int64_t>(first_x, tap.dx), last_x = std::max<int64_t>(last_x, tap.dx);
  }
  DepthwiseGeometry geometry;
  geometry.first_row = std::clamp<int64_t>(tile.y_begin * conv.step_y + first_y, 0, source.height);
  geometry.last_row = std::clamp<int64_t>((tile.y_end - 1) * conv.step_y + last_y, -1, source.height - 1);
  const int64_t source_rows = std::max<int64_t>(0, geometry.last_row - geometry.first_row + 1);
  // Pixels come in fours, so that up to three of them run ahead into further rows.
  geometry.ring_rows = std::max<int64_t>(1, std::min(source_rows, last_y - first_y + 2 + 3 / source.width));
  const int64_t columns =
      std::max(source.width, (conv.grid_width - 1) * conv.step_x + last_x + 1) - first_x;
  geometry.phase_columns = (columns + conv.step_x - 1) / conv.step_x;
  geometry.pitch = geometry.phase_columns * conv.step_x;
  const int64_t rows_stored = std::max<int64_t>(1, kStoredPixels / conv.grid_width);

  Layout layout;
  const int64_t offsets_at = layout.add<int32_t>(source_rows * source.width);
  const int64_t rows_at = layout.add<GridRow>(grid_rows), steps_at = layout.add<Step>(grid_rows * tap_count);
  const int64_t ring_size = geometry.ring_rows * geometry.pitch * kLanes;
  const int64_t ring_at = layout.add<float>(ring_size);
  const int64_t weights_at = layout.add<float>(conv.weight_row * kLanes);
  const int64_t out_at = layout.add<float>(rows_stored * conv.grid_width * kLanes);
  const int64_t unused_at = layout.add<float>(target.height * target.width);
  int64_t most_channels = 0;
  for (const Unit* unit = units; unit != units + unit_count; ++unit)
    if (unit->row_count > 0)
      most_channels = std::max(most_channels, unit->rows[unit->row_count - 1].channel / conv.rows_per_live + 1);
  const int64_t marks_at = layout.add<uint8_t>(most_channels);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  int32_t* offsets = reinterpret_cast<int32_t*>(memory + offsets_at);
  GridRow* rows = reinterpret_cast<GridRow*>(memory + rows_at);
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  float* ring = reinterpret_cast<float*>(memory + ring_at);
  uint8_t* marks = reinterpret_cast<uint8_t*>(memory + marks_at);
  std::memset(ring, 0, size_t(ring_size) * 4);
  geometry.offsets = offsets;
  geometry.rows = rows;
  geometry.steps = steps;

  const auto row_offset = [&](int64_t y) { return (y - geometry.first_row) % geometry.ring_rows * geometry.pitch; };
  for (int64_t y = 0; y < source_rows; ++y) {
    const int64_t row = row_offset(geometry.first_row + y);
    int64_t phase = -first_x % conv.step_x, column = -first_x / conv.step_x;
    for (int64_t x = 0; x < source.width; ++x) {
      *offsets++ = int32_t((row + phase * geometry.phase_columns + column) * kLanes);
      if (++phase == conv.step_x) phase = 0, ++column;
    }
  }
  int32_t step_count = 0;
  for (int64_t i = 0; i < grid_rows; ++i) {
    const int64_t y = (tile.y_begin + i) * conv.step_y;
    rows[i].step_begin = step_count;
    for (const Tap& tap : conv.taps) {
      if (y + tap.dy < 0 || y + tap.dy >= source.height) continue;
      const int64_t x = tap.dx - first_x;
      const int64_t column = x % conv.step_x * geometry.phase_columns + x / conv.step_x;
      steps[step_count++] = {tap.weight * kLanes, int32_t((row_offset(y + tap.dy) + column) * kLanes)};
    }
    rows[i].step_end = step_count;
    const int64_t row_end = std::clamp(y + last_y + 1 - geometry.first_row, int64_t(0), source_rows);
    rows[i].pixel_end = int32_t(std::min((row_end * source.width + 3) / 4 * 4, source_rows * source.width));
  }

  Lanes groups[2];  // one to compute, and one that is being put together
  int current = 0, lane_count = 0;
  bool waiting = false;
  groups[0].copy_count = 0;
  float* unused = reinterpret_cast<float*>(memory + unused_at);
  const auto compute_waiting = [&](const Lanes* next) {
    if (waiting)
      depthwise_group(conv, tile, geometry, groups[1 - current], next, ring,
                      reinterpret_cast<float*>(memory + weights_at), reinterpret_cast<float*>(memory + out_at));
  };
  const auto finish_group = [&] {
    Lanes& lanes = groups[current];
    for (int l = lane_count; l < kLanes; ++l) {
      lanes.source[l] = lanes.source[0];
      lanes.weights[l] = lanes.weights[0];
      lanes.start[l] = lanes.start[0];
      lanes.target[l] = unused;
    }
    compute_waiting(&lanes);
    waiting = true;
    current = 1 - current;
    lane_count = 0;
    groups[current].copy_count = 0;
  };
  const auto target_plane = [&](const Unit& unit, const Route& row) {
    return static_cast<float*>(target.data) + (unit.frame + !row.here) * target.frame_stride +
           row.channel * target.channel_stride;
  };
  const auto start_of = [&](const Route& row) { return conv.bias ? conv.bias[row.channel] : 0.f; };
  int64_t begin = tile.row_begin, end = tile.row_end;
  for (const Unit* unit = units; unit != units + unit_count && end > 0; ++unit) {
    const auto channel_of = [&](const Route& row) { return row.channel / int32_t(conv.rows_per_live); };
    const bool all_live = unit->row_count == 0 || mark_live(*unit, channel_of(unit->rows[unit->row_count - 1]) + 1, marks);
    const float* frame = static_cast<const float*>(source.data) + unit->source_frame * source.frame_stride +
                         geometry.first_row * source.width;
    const int64_t rows_end = std::min(end, unit->row_count);
    for (int64_t first = begin; first < rows_end; first += kSortedRows) {
      const int64_t count = std::min(kSortedRows, rows_end - first);
      const Route* rows = unit->rows + first;
      // Which rows are live is hard to predict for a branch.
      int64_t live[kSortedRows], dead[kSortedRows], live_count = 0, dead_count = 0;
      for (int64_t r = 0; r < count; ++r) {
        const bool is_live = all_live || marks[channel_of(rows[r])];
        live[live_count] = dead[dead_count] = r;
        live_count += is_live;
        dead_count += !is_live;
      }
      for (int64_t i = 0; i < dead_count; ++i) {
        const Route& row = rows[dead[i]];
        float value[kLanes];
        store<kLanes>(value, activate<kLanes>(conv.activation, Vector<kLanes>{} + start_of(row)));
        float* plane = target_plane(*unit, row);
        for (float* to : {plane, row.here && row.next ? plane + target.frame_stride : plane})
          std::fill(to + tile.y_begin * target.width, to + tile.y_end * target.width, value[0]);
      }
      for (int64_t i = 0; i < live_count; ++i) {
        const Route& row = rows[live[i]];
        Lanes& lanes = groups[current];
        float* plane = target_plane(*unit, row);
        lanes.source[lane_count] = frame + channel_of(row) * source.channel_stride;
        lanes.weights[lane_count] = conv.weight + row.channel * conv.weight_row;
        lanes.start[lane_count] = start_of(row);
        lanes.target[lane_count] = plane;
        lanes.copy[lanes.copy_count] = plane + target.frame_stride;
        lanes.copied[lanes.copy_count] = lane_count;
        lanes.copy_count += row.here & row.next;
        if (++lane_count == kLanes) finish_group();
      }
    }
    begin = std::max<int64_t>(0, begin - unit->row_count);
    end -= unit->row_count;
  }
  if (lane_count > 0) finish_group();
  compute_waiting(nullptr);
}

}  // namespace
}  // namespace adakernels
