// Copies source channels into padded, phase-split planes in which neighbouring grid points are neighbours.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "../domain.h"
#include "simd.h"

namespace adakernels {
namespace {

// The part of the source that one tile needs, for one phase: `height` rows of `width` elements from (y, x) on, every
// step-th pixel, of which columns [begin, end) lie inside the source.
struct Window {
  int64_t y, x, height, width;
  int64_t step_y, step_x;
  int64_t begin, end;
};

inline Window window_of(const Planes& planes, int64_t y, int64_t x, int64_t height, int64_t width, int64_t step_y,
                        int64_t step_x) {
  const int64_t begin = std::min(width, x >= 0 ? 0 : (-x + step_x - 1) / step_x);
  const int64_t inside = x >= planes.width ? 0 : (planes.width - 1 - x) / step_x + 1;
  return {y, x, height, width, step_y, step_x, begin, std::clamp(inside, begin, width)};
}

// The pixels of a phase that lie inside the source, as rows of the grid's width.
inline Window inner_window(const Convolution& conv, const Phase& phase) {
  const auto inside = [](int64_t offset, int64_t step) {
    return offset < 0 ? offset + (step - 1 - offset) / step * step : offset;
  };
  const int64_t y = inside(phase.dy, conv.step_y), x = inside(phase.dx, conv.step_x);
  const int64_t height = std::max<int64_t>(0, (conv.source.height - y + conv.step_y - 1) / conv.step_y);
  return window_of(conv.source, y, x, height, conv.grid_width, conv.step_y, conv.step_x);
}

// The even, or odd, elements of a pair of vectors.
template <int lanes, int first>
inline Vector<lanes> every_second(Vector<lanes> low, Vector<lanes> high) {
  constexpr auto positions = indices<lanes>([](int i) { return 2 * i + first; });
  return shuffle<lanes>(low, high, positions);
}

// Element i * n + p of n vectors in a row becomes element i of vector p.
template <int n, int lanes>
inline void deinterleave(Vector<lanes>* v) {
  if constexpr (n > 1) {
    Vector<lanes> even[n / 2], odd[n / 2];
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      even[i] = every_second<lanes, 0>(v[2 * i], v[2 * i + 1]);
      odd[i] = every_second<lanes, 1>(v[2 * i], v[2 * i + 1]);
    }
    deinterleave<n / 2, lanes>(even);
    deinterleave<n / 2, lanes>(odd);
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}

// row[i] (+)= from[i * hop] for i < count. May write up to a vector past the end, and reads nothing past `limit`.
template <typename T, bool add>
inline void copy_run(float* row, const T* from, int64_t count, int64_t hop, const T* limit) {
  int64_t i = 0;
  if constexpr (!add && std::is_same_v<T, float>) {
    if (hop == 1) {
      for (; i < count && from + i + kLanes <= limit; i += kLanes) store<kLanes>(row + i, load<kLanes>(from + i));
    } else if (hop == 2) {
      for (; i < count && from + 2 * (i + kLanes) <= limit; i += kLanes)
        store<kLanes>(row + i, every_second<kLanes, 0>(load<kLanes>(from + 2 * i),
                                                       load<kLanes>(from + 2 * i + kLanes)));
    }
  }
  if (hop == 1)
    for (; i < count; ++i) row[i] = (add ? row[i] : 0.f) + to_float(from[i]);
  else
    for (; i < count; ++i) row[i] = (add ? row[i] : 0.f) + to_float(from[i * hop]);
}

template <typename T, bool add>
inline void copy_plane(float* plane, int64_t pitch, const T* source, const Planes& planes, const Window& window) {
  const T* limit = static_cast<const T*>(planes.data) + planes.extent;
  for (int64_t i = 0; i < window.height; ++i) {
    const int64_t y = window.y + i * window.step_y;
    float* row = plane + i * pitch;
    if (y < 0 || y >= planes.height) {
      if constexpr (!add)
        for (int64_t x = 0; x < window.width; ++x) row[x] = 0;
      continue;
    }
    const T* from = source + y * planes.row_stride + (window.x + window.begin * window.step_x) * planes.column_stride;
    if constexpr (!add)
      for (int64_t x = 0; x < window.begin; ++x) row[x] = 0;
    copy_run<T, add>(row + window.begin, from, window.end - window.begin, window.step_x * planes.column_stride, limit);
    if constexpr (!add)
      for (int64_t x = window.end; x < window.width; ++x) row[x] = 0;
  }
}

template <typename T>
inline void copy_typed(float* plane, int64_t pitch, const Planes& planes, int64_t frame, const Route& route,
                       const Window& window) {
  const T* here = static_cast<const T*>(planes.data) + plane_offset(planes, frame, route);
  const T* next = here + planes.frame_stride;
  copy_plane<T, false>(plane, pitch, route.here ? here : next, planes, window);
  if (route.here && route.next) copy_plane<T, true>(plane, pitch, next, planes, window);
}

// plane[i * pitch + j] = the route's channel at row i, column j of the window. Rows may share their outer zeros, and
// up to a vector past the plane's end is overwritten.
inline void copy_route(float* plane, int64_t pitch, const Planes& planes, int64_t frame, const Route& route,
                       const Window& window) {
  if (planes.scalar == Scalar::f32)
    copy_typed<float>(plane, pitch, planes, frame, route, window);
  else
    copy_typed<uint16_t>(plane, pitch, planes, frame, route, window);
}

// The rows that copying a route's channel to a window is going to read, to be fetched one by one next to other work:
// all at once they would keep it waiting.
class RowsAhead {
 public:
  RowsAhead() = default;
  RowsAhead(const Planes& planes, int64_t frame, const Route& route, const Window& window) {
    const int64_t size = planes.scalar == Scalar::f32 ? 4 : 2;
    if (planes.column_stride != 1) return;
    stride_ = planes.row_stride * size;
    bytes_ = planes.width * size;
    row_ = static_cast<const char*>(planes.data) + window.y * planes.row_stride * size +
           plane_offset(planes, frame + !route.here, route) * size;
  }
  void fetch_next() {
    for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(row_ + at);
    row_ += stride_;
  }

 private:
  const char* row_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0;
};

// Those of a channel that is copied soon after live channel i: memory takes longer to answer than a small map takes.
inline RowsAhead rows_ahead(const Planes& planes, const Unit& unit, int64_t i, const Window& window) {
  constexpr int64_t kElements = 1024, kMostChannels = 8;
  const int64_t plane = std::max<int64_t>(1, planes.height * planes.width);
  const int64_t ahead = i + std::min(kMostChannels, 1 + kElements / plane);
  return ahead < unit.live_count ? RowsAhead(planes, unit.source_frame, unit.live[ahead], window) : RowsAhead();
}

// Two phases that lie side by side: even gets pixels x, x + 2, ... of each row, odd gets x + 1, x + 3, ...
// Nothing is written `plane` elements past the beginning of either, because the other may lie there.
inline void copy_pair(float* even, float* odd, int64_t plane, int64_t pitch, const Planes& planes, int64_t frame,
                      const Route& route, const Window& left, const Window& right) {
  const float* data = static_cast<const float*>(planes.data);
  const float* limit = data + planes.extent;
  const float* source = data + plane_offset(planes, frame, route);
  const int64_t begin = std::max(left.begin, right.begin), end = std::max(begin, std::min(left.end, right.end));
  const float* even_end = even + plane;
  // Short rows without edges take a vector each; the next row overwrites what is too much.
  const int64_t last = left.y + (left.height - 1) * left.step_y;
  if (left.width <= kLanes && left.height > 0 && begin == 0 && end == left.width && left.y >= 0 &&
      last < planes.height && source - data + last * planes.row_stride + left.x + 2 * kLanes <= planes.extent &&
      (left.height - 1) * pitch + kLanes <= plane) {
    const float* from = source + left.y * planes.row_stride + left.x;
    for (int64_t y = 0; y < left.height; ++y, from += left.step_y * planes.row_stride) {
      const Vector<kLanes> low = load<kLanes>(from), high = load<kLanes>(from + kLanes);
      store<kLanes>(even + y * pitch, every_second<kLanes, 0>(low, high));
      store<kLanes>(odd + y * pitch, every_second<kLanes, 1>(low, high));
    }
    return;
  }
  for (int64_t y = 0; y < left.height; ++y, even += pitch, odd += pitch) {
    const int64_t row = left.y + y * left.step_y;
    if (row < 0 || row >= planes.height) {
      for (int64_t i = 0; i < left.width; ++i) even[i] = odd[i] = 0;
      continue;
    }
    const float* from = source + row * planes.row_stride + left.x;
    const auto edge = [&](int64_t i) {
      even[i] = i >= left.begin && i < left.end ? from[2 * i] : 0.f;
      odd[i] = i >= right.begin && i < right.end ? from[2 * i + 1] : 0.f;
    };
    for (int64_t i = 0; i < begin; ++i) edge(i);
    int64_t i = begin;
    for (; i < end && from + 2 * (i + kLanes) <= limit && even + i + kLanes <= even_end; i += kLanes) {
      const Vector<kLanes> low = load<kLanes>(from + 2 * i), high = load<kLanes>(from + 2 * i + kLanes);
      store<kLanes>(even + i, every_second<kLanes, 0>(low, high));
      store<kLanes>(odd + i, every_second<kLanes, 1>(low, high));
    }
    for (; i < end; ++i) edge(i);
    for (i = end; i < left.width; ++i) edge(i);
  }
}

// Copies a channel to all phases, which follow one another `plane` elements apart.
inline void copy_phases(float* to, int64_t plane, int64_t pitch, const Planes& planes, int64_t frame,
                        const Route& route, const Window* windows, int64_t phase_count) {
  const bool pairs = planes.scalar == Scalar::f32 && planes.column_stride == 1 && route.here && !route.next;
  for (int64_t p = 0; p < phase_count; ++p, to += plane) {
    const Window& window = windows[p];
    const int64_t apart = p + 1 < phase_count && windows[p + 1].y == window.y ? windows[p + 1].x - window.x : 0;
    if (pairs && window.step_x == 2 && std::abs(apart) == 1) {
      float* const next = to + plane;
      const bool ascending = apart == 1;
      copy_pair(ascending ? to : next, ascending ? next : to, plane, pitch, planes, frame, route,
                windows[p + !ascending], windows[p + ascending]);
      ++p;
      to = next;
    } else {
      copy_route(to, pitch, planes, frame, route, window);
    }
  }
}

}  // namespace
}  // namespace adakernels
