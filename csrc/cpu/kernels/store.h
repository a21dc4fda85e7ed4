// Stores computed rows to the planes that their routes name.
#pragma once

#include <type_traits>

#include "../domain.h"
#include "copy.h"
#include "simd.h"

namespace adakernels {
namespace {

// `count` values from `from` on, in a computed row, and where in a target plane they go.
struct Segment {
  int64_t from, target, count;
};

// streamed: whole lines go past the caches.
template <typename T>
inline void store_run(T* to, const float* from, int64_t count, int64_t hop, bool streamed = false) {
  if constexpr (std::is_same_v<T, float>) {
    constexpr int64_t line = kLineBytes / 4;
    const int64_t head = bytes_to_line(to) / 4;
    if (streamed && hop == 1 && count >= head + line) {
      const int64_t end = head + (count - head) / line * line;
      if (head > 0) store_run(to, from, head, 1);
      for (int64_t i = head; i < end; i += kLanes) stream<kLanes>(to + i, load<kLanes>(from + i));
      if (count > end) store_run(to + end, from + end, count - end, 1);
      return;
    }
    if (hop == 1) {
      // Whole vectors: the last one overlaps the one before.
      constexpr int half = kLanes > 4 ? kLanes / 2 : kLanes;
      const auto copy = [&]<int lanes>(std::integral_constant<int, lanes>) {
        for (int64_t i = 0; i + lanes < count; i += lanes) store<lanes>(to + i, load<lanes>(from + i));
        store<lanes>(to + count - lanes, load<lanes>(from + count - lanes));
      };
      if (count >= kLanes)
        copy(std::integral_constant<int, kLanes>());
      else if (count >= half)
        copy(std::integral_constant<int, half>());
      else if (count >= 4)
        copy(std::integral_constant<int, 4>());
      else
        for (int64_t i = 0; i < count; ++i) to[i] = from[i];
      return;
    }
    for (int64_t i = 0; i < count; ++i) to[i * hop] = from[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * hop] = to_bf16(from[i]);
  }
}

template <typename T>
inline void store_typed(const Planes& planes, int64_t hop, int64_t frame, const Route& route, const float* row,
                        const Segment* segments, int64_t segment_count) {
  T* here = static_cast<T*>(planes.data) + plane_offset(planes, frame, route);
  for (int64_t s = 0; s < segment_count; ++s) {
    const Segment& segment = segments[s];
    const float* const from = row + segment.from;
    if (route.here) store_run(here + segment.target, from, segment.count, hop, planes.streamed);
    if (route.next)
      store_run(here + planes.frame_stride + segment.target, from, segment.count, hop, planes.streamed);
  }
}

// hop: elements between neighbouring grid points of the target.
inline void store_route(const Planes& planes, int64_t hop, int64_t frame, const Route& route, const float* row,
                        const Segment* segments, int64_t segment_count) {
  if (planes.scalar == Scalar::f32)
    store_typed<float>(planes, hop, frame, route, row, segments, segment_count);
  else
    store_typed<uint16_t>(planes, hop, frame, route, row, segments, segment_count);
}

template <typename T>
inline void add_target_typed(const Planes& planes, int64_t hop, int64_t frame, const Route& route, float* row,
                             const Segment* segments, int64_t segment_count) {
  const T* plane = static_cast<const T*>(planes.data) + frame * planes.frame_stride +
                   route.channel * planes.channel_stride;
  for (int64_t s = 0; s < segment_count; ++s) {
    const Segment& segment = segments[s];
    const T* from = plane + segment.target;
    float* to = row + segment.from;
    if (hop == 1)
      for (int64_t i = 0; i < segment.count; ++i) to[i] += to_float(from[i]);
    else
      for (int64_t i = 0; i < segment.count; ++i) to[i] += to_float(from[i * hop]);
  }
  if (segment_count == 0) return;
  // Rows are computed from left to right: what comes next is fetched next to the arithmetic.
  const Segment& last = segments[segment_count - 1];
  if (hop == 1)
    for (int64_t i = 0; i < last.count; i += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(plane + last.target + last.count + i, 1);
}

// Adds to a computed row what the target holds.
inline void add_target(const Planes& planes, int64_t hop, int64_t frame, const Route& route, float* row,
                       const Segment* segments, int64_t segment_count) {
  if (planes.scalar == Scalar::f32)
    add_target_typed<float>(planes, hop, frame, route, row, segments, segment_count);
  else
    add_target_typed<uint16_t>(planes, hop, frame, route, row, segments, segment_count);
}

// Offset of a grid point in a target plane.
inline int64_t target_offset(const Convolution& conv, int64_t y, int64_t x) {
  return (conv.target_y + y * conv.target_step_y) * conv.target.row_stride +
         (conv.target_x + x * conv.target_step_x) * conv.target.column_stride;
}

}  // namespace
}  // namespace adakernels
