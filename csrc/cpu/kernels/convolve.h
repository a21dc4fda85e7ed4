// The direct convolution: a tile of one frame's grid, for the rows and live channels of its unit.
#pragma once

#include <algorithm>

#include "activation.h"
#include "gemm_tile.h"
#include "kernels.h"

namespace adakernels {
namespace {

template <typename T>
inline float to_float(T value) {
  if constexpr (sizeof(T) == 2) return from_bf16(value);
  else return value;
}

// row[i] = source[first + i * step] for i < count, zero where outside [0, width).
template <typename T, bool add>
inline void copy_row(float* row, const T* source, int64_t first, int64_t step, int64_t count, int64_t width,
                     int64_t stride) {
  const int64_t begin = std::min(count, first >= 0 ? 0 : (-first + step - 1) / step);
  const int64_t end = std::max(begin, std::min(count, first >= width ? 0 : (width - 1 - first) / step + 1));
  if constexpr (!add) {
    for (int64_t i = 0; i < begin; ++i) row[i] = 0;
    for (int64_t i = end; i < count; ++i) row[i] = 0;
  }
  const T* from = source + first * stride;
  if (step * stride == 1) {
    if constexpr (!add && sizeof(T) == 4) {
      int64_t i = begin;
      for (; i + kLanes <= end; i += kLanes) store<kLanes>(row + i, load<kLanes>(reinterpret_cast<const float*>(from) + i));
      for (; i < end; ++i) row[i] = from[i];
    } else {
      for (int64_t i = begin; i < end; ++i) row[i] = (add ? row[i] : 0.f) + to_float(from[i]);
    }
  } else {
    const int64_t hop = step * stride;
    for (int64_t i = begin; i < end; ++i) row[i] = (add ? row[i] : 0.f) + to_float(from[i * hop]);
  }
}

template <typename T, bool add>
void copy_plane(float* plane, const T* source, const Planes& planes, const Convolution& conv, int64_t y, int64_t x,
                int64_t height, int64_t width, int64_t pitch) {
  for (int64_t i = 0; i < height; ++i) {
    const int64_t at = y + i * conv.step_y;
    float* row = plane + i * pitch;
    if (at < 0 || at >= planes.height) {
      if constexpr (!add) std::fill(row, row + width, 0.f);
    } else {
      copy_row<T, add>(row, source + at * planes.row_stride, x, conv.step_x, width, planes.width,
                       planes.column_stride);
    }
  }
}

template <typename T>
void copy_route(float* plane, const Convolution& conv, const Unit& unit, const Route& route, int64_t y, int64_t x,
                int64_t height, int64_t width, int64_t pitch) {
  const Planes& planes = conv.source;
  const T* here = static_cast<const T*>(planes.data) + unit.frame * planes.frame_stride +
                  route.channel * planes.channel_stride;
  const T* next = here + planes.frame_stride;
  copy_plane<T, false>(plane, route.here ? here : next, planes, conv, y, x, height, width, pitch);
  if (route.here && route.next) copy_plane<T, true>(plane, next, planes, conv, y, x, height, width, pitch);
}

// A run of grid points of one row inside a register tile.
struct Segment {
  int64_t tile, target, count;
};

template <typename T>
inline void store_run(T* to, const float* from, int64_t count, int64_t stride) {
  if constexpr (sizeof(T) == 4) {
    if (stride == 1) {
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store<kLanes>(to + i, load<kLanes>(from + i));
      for (; i < count; ++i) to[i] = from[i];
    } else {
      for (int64_t i = 0; i < count; ++i) to[i * stride] = from[i];
    }
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = to_bf16(from[i]);
  }
}

// Stores rows of a register tile to the planes that their routes name.
template <typename T>
void store_rows(const Convolution& conv, const Unit& unit, const Route* rows, int64_t row_count, const float* tile,
                int64_t tile_stride, const Segment* segments, int64_t segment_count) {
  const Planes& planes = conv.target;
  const int64_t stride = conv.target_step_x * planes.column_stride;
  for (int64_t r = 0; r < row_count; ++r) {
    T* here = static_cast<T*>(planes.data) + unit.frame * planes.frame_stride +
              rows[r].channel * planes.channel_stride;
    for (int64_t s = 0; s < segment_count; ++s) {
      const float* from = tile + r * tile_stride + segments[s].tile;
      if (rows[r].here) store_run(here + segments[s].target, from, segments[s].count, stride);
      if (rows[r].next) store_run(here + planes.frame_stride + segments[s].target, from, segments[s].count, stride);
    }
  }
}

template <int vectors, int lanes, int rows = kRows>
inline void dispatch_rows(int64_t row_count, const float* const* row, const Step* steps, int64_t step_count,
                          const float* source, const float* start, float* out, int64_t stride) {
  if (row_count == rows)
    gemm_tile<rows, vectors, lanes>(row, steps, step_count, source, start, out, stride);
  else if constexpr (rows > 1)
    dispatch_rows<vectors, lanes, rows - 1>(row_count, row, steps, step_count, source, start, out, stride);
}

// A tile of one row holds as many vectors as the register file would give to several rows (depthwise).
constexpr int kSingleRowVectors = 8;
constexpr int kTilePixels = kSingleRowVectors * kLanes;

// Computes up to `count` pixels of `row_count` rows into `out`; returns how many.
inline int64_t compute_tile(int64_t row_count, const float* const* row, const Step* steps, int64_t step_count,
                            const float* source, int64_t count, const float* start, float* out, int64_t stride) {
  if (row_count == 1 && count > kVectors * kLanes) {
    gemm_tile<1, kSingleRowVectors, kLanes>(row, steps, step_count, source, start, out, stride);
    return kSingleRowVectors * kLanes;
  }
#if defined(__AVX512F__)
  // Half a vector costs half the time where 512-bit operations are issued in two halves.
  constexpr int half = kLanes / 2;
  if (count <= half) {
    dispatch_rows<1, half>(row_count, row, steps, step_count, source, start, out, stride);
    return half;
  }
  const bool keep_half = count % kLanes != 0 && count % kLanes <= half;
#else
  const bool keep_half = false;
#endif
  const int64_t vectors = keep_half ? count / kLanes : (count + kLanes - 1) / kLanes;
  if (vectors >= 3 && kVectors >= 3) {
    dispatch_rows<std::min(3, kVectors), kLanes>(row_count, row, steps, step_count, source, start, out, stride);
    return 3 * kLanes;
  }
  if (vectors >= 2) {
    dispatch_rows<2, kLanes>(row_count, row, steps, step_count, source, start, out, stride);
    return 2 * kLanes;
  }
  dispatch_rows<1, kLanes>(row_count, row, steps, step_count, source, start, out, stride);
  return kLanes;
}

void convolve(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  const int64_t grid_height = tile.y_end - tile.y_begin, grid_width = tile.x_end - tile.x_begin;
  const int64_t row_total = tile.row_end - tile.row_begin;
  if (grid_height <= 0 || grid_width <= 0 || row_total <= 0) return;

  // The source channels of a tile are copied once so that every tap of every grid point is a plain offset:
  // zero-padded, and split by stride phase so that neighbouring grid points are neighbours in memory.
  // Grid point (y, x) is number y * pitch + x; the pitch - width points between two rows are computed and dropped,
  // which is cheaper than the nine-fold copy of im2col.
  const int64_t width = grid_width + conv.shift_x, height = grid_height + conv.shift_y;
  const int64_t x_first = tile.x_begin * conv.step_x, y_first = tile.y_begin * conv.step_y;
  int64_t shared = 0;  // zeros right of one row and left of the next are stored once
  if (conv.step_x == 1 && conv.phases.size() == 1) {
    const int64_t left = x_first + conv.phases[0].dx;
    shared = std::max<int64_t>(0, std::min({-left, left + width - conv.source.width, conv.shift_x}));
  }
  const int64_t pitch = width - shared;
  const int64_t plane = height * pitch + shared;
  const int64_t channel = int64_t(conv.phases.size()) * plane;

  const int64_t live_count = conv.taps.empty() ? 0 : unit.live_count;
  const int64_t step_count = live_count * int64_t(conv.taps.size());
  const int64_t point_count = (grid_height - 1) * pitch + grid_width;
  const int64_t source_count = live_count * channel;
  const int64_t source_floats = (source_count + kTilePixels + 15) / 16 * 16;
  char* memory = static_cast<char*>(scratch.reserve(source_floats * 4 + step_count * int64_t(sizeof(Step))));
  float* source = reinterpret_cast<float*>(memory);
  Step* steps = reinterpret_cast<Step*>(memory + source_floats * 4);

  for (int64_t i = 0; i < live_count; ++i) {
    float* to = source + i * channel;
    for (const Phase& phase : conv.phases) {
      const int64_t y = y_first + phase.dy, x = x_first + phase.dx;
      if (conv.source.scalar == Scalar::f32)
        copy_route<float>(to, conv, unit, unit.live[i], y, x, height, width, pitch);
      else
        copy_route<uint16_t>(to, conv, unit, unit.live[i], y, x, height, width, pitch);
      to += plane;
    }
  }
  // Register tiles read past the last point: those lanes are dropped, but must be readable.
  std::fill(source + source_count, source + source_floats, 0.f);

  Step* step = steps;
  for (int64_t i = 0; i < live_count; ++i) {
    const int64_t weight = unit.live[i].channel * conv.weight_channel;
    for (const Tap& tap : conv.taps)
      *step++ = {int32_t(weight + tap.weight),
                 int32_t(i * channel + tap.phase * plane + tap.shift_y * pitch + tap.shift_x)};
  }

  // Rows are spread evenly, so that no group of rows is left with a register tile of one.
  const int64_t group_count = (row_total + kRows - 1) / kRows;
  alignas(64) float out[kRows * kVectors * kLanes > kTilePixels ? kRows * kVectors * kLanes : kTilePixels];
  Segment segments[kTilePixels];
  for (int64_t g = 0; g < group_count; ++g) {
    const int64_t first = tile.row_begin + row_total * g / group_count;
    const int64_t count = tile.row_begin + row_total * (g + 1) / group_count - first;
    const float* row[kRows];
    float start[kRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t channel = unit.rows[first + r].channel;
      row[r] = conv.weight + unit.weight_offset + channel * conv.weight_row;
      start[r] = conv.bias ? conv.bias[channel] : 0.f;
    }
    const int64_t stride = count == 1 ? kTilePixels : kVectors * kLanes;
    for (int64_t point = 0; point < point_count;) {
      const int64_t done = compute_tile(count, row, steps, step_count, source + point, point_count - point, start, out, stride);
      const int64_t valid = std::min(done, point_count - point);
      for (int64_t r = 0; r < count; ++r) activate(conv.activation, out + r * stride, valid);
      int64_t segment_count = 0;
      for (int64_t at = point; at < point + valid;) {
        const int64_t y = at / pitch, x = at % pitch;
        const int64_t run = std::min(pitch - x, point + valid - at);
        const int64_t kept = std::min(run, grid_width - x);
        if (kept > 0)
          segments[segment_count++] = {
              at - point,
              (conv.target_y + (tile.y_begin + y) * conv.target_step_y) * conv.target.row_stride +
                  (conv.target_x + (tile.x_begin + x) * conv.target_step_x) * conv.target.column_stride,
              kept};
        at += run;
      }
      if (conv.target.scalar == Scalar::f32)
        store_rows<float>(conv, unit, unit.rows + first, count, out, stride, segments, segment_count);
      else
        store_rows<uint16_t>(conv, unit, unit.rows + first, count, out, stride, segments, segment_count);
      point += done;
    }
  }
}

}  // namespace
}  // namespace adakernels
