// Bilinear patches: four weights for a whole patch make every row a sum of shifted runs.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../patch.h"
#include "copy.h"
#include "kernels.h"
#include "simd.h"

namespace adakernels {
namespace {

constexpr int64_t kAhead = 4;

inline void from_float(float& to, float value) { to = value; }
inline void from_float(uint16_t& to, float value) { to = to_bf16(value); }

// Rows of a patch lie apart in the frame, so that the hardware does not fetch them ahead.
template <typename T>
inline void prefetch_row(const T* row, int64_t count) {
  const char* end = reinterpret_cast<const char*>(row + count);
  for (const char* at = reinterpret_cast<const char*>(row); at < end; at += 64) __builtin_prefetch(at);
}

// to[i] = the sample between a[i] and its right neighbour.
template <typename T>
inline void mix_along_x(float* __restrict to, const T* __restrict a, int64_t count, int64_t right, float fraction) {
  if (fraction == 0) {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(a[i]);
    return;
  }
  const T* __restrict b = a + right;
  for (int64_t i = 0; i < count; ++i) to[i] = (1 - fraction) * to_float(a[i]) + fraction * to_float(b[i]);
}

// to[i] = (a * above[i] + b * below[i]) * scale + shift.
template <typename Out>
inline void mix_along_y(Out* __restrict to, const float* __restrict above, float a, const float* __restrict below,
                        float b, int64_t count, const Normalisation& n) {
  if (n.step == 0) {
    const float shift = n.shift[0];
    a *= n.scale[0];
    b *= n.scale[0];
    for (int64_t i = 0; i < count; ++i) from_float(to[i], a * above[i] + b * below[i] + shift);
  } else {
    const float* __restrict scale = n.scale;
    const float* __restrict shift = n.shift;
    for (int64_t i = 0; i < count; ++i)
      from_float(to[i], (a * above[i] + b * below[i]) * scale[i] + shift[i]);
  }
}

// to[i] = row[i] * scale + shift; without normalisation the number itself, be it infinite.
template <typename Out>
inline void finish_row(Out* __restrict to, const float* __restrict row, int64_t count, const Normalisation& n) {
  if (n.step == 0 && n.scale[0] == 1 && n.shift[0] == 0) {
    for (int64_t i = 0; i < count; ++i) from_float(to[i], row[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) from_float(to[i], row[i] * n.scale[i * n.step] + n.shift[i * n.step]);
  }
}

template <typename T>
void gather_typed(const PatchRows& p, void* target, Scratch& scratch) {
  using Out = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;
  const int64_t pitch = (p.count + kLanes - 1) / kLanes * kLanes;
  float* above = static_cast<float*>(scratch.reserve(2 * pitch * 4));
  float* below = above + pitch;
  const T* from = static_cast<const T*>(p.source);
  Out* to = static_cast<Out*>(target);
  mix_along_x(above, from, p.count, p.right, p.fraction_x);
  for (int64_t r = 0; r < p.row_count; ++r, to += p.count) {
    from += p.source_stride;
    if (r + kAhead < p.row_count) prefetch_row(from + kAhead * p.source_stride, p.count + p.right);
    if (p.fraction_y == 0) {
      finish_row(to, above, p.count, p.normalisation);
      if (r + 1 < p.row_count) mix_along_x(above, from, p.count, p.right, p.fraction_x);
      continue;
    }
    mix_along_x(below, from, p.count, p.right, p.fraction_x);
    mix_along_y(to, above, 1 - p.fraction_y, below, p.fraction_y, p.count, p.normalisation);
    std::swap(above, below);
  }
}

void gather_patch(const PatchRows& patch, void* target, Scratch& scratch) {
  if (patch.scalar == Scalar::f32)
    gather_typed<float>(patch, target, scratch);
  else if (patch.scalar == Scalar::bf16)
    gather_typed<uint16_t>(patch, target, scratch);
  else
    gather_typed<uint8_t>(patch, target, scratch);
}

// The row as float32, in `room` unless it is that already.
inline const float* widen(const float* row, int64_t, float*) { return row; }

template <typename T>
inline const float* widen(const T* __restrict row, int64_t count, float* __restrict room) {
  for (int64_t i = 0; i < count; ++i) room[i] = to_float(row[i]);
  return room;
}

// The parts along y and x of one vector's, or one number's, derivative: a and b are the taps of the upper
// row, d and e those of the lower one.
template <typename V>
inline void add_derivative(V& along_y, V& along_x, V g, V a, V b, V d, V e, float fraction_y, float fraction_x) {
  const V top = b - a, bottom = e - d, twist = bottom - top;
  along_y += g * ((d - a) + fraction_x * twist);
  along_x += g * (top + fraction_y * twist);
}

template <typename T>
void differentiate_typed(const PatchRows& p, const void* gradient, double* sums, Scratch& scratch) {
  using Out = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;
  using V = Vector<kLanes>;
  constexpr auto lanes = indices<kLanes>([](int i) { return i; });
  typename VectorOf<kLanes>::integer lane;
  std::memcpy(&lane, lanes.at, sizeof(lane));
  const Normalisation& n = p.normalisation;
  const T* from = static_cast<const T*>(p.source);
  const Out* to = static_cast<const Out*>(gradient);
  const int64_t width = p.count + p.right;
  float* const room = static_cast<float*>(scratch.reserve(3 * width * 4));
  float* rooms[3] = {room, room + width, room + 2 * width};
  const float* d = nullptr;
  V along_y = {}, along_x = {};
  for (int64_t r = 0; r < p.row_count; ++r, from += p.source_stride, to += p.count) {
    if (r + kAhead < p.row_count) prefetch_row(from + kAhead * p.source_stride, width);
    const float* grad = widen(to, p.count, rooms[2]);
    // The row below, which comes next, or again the row itself where the frame has no more rows than the patch.
    const float* a = r > 0 && p.down != 0 ? d : widen(from, width, rooms[0]);
    d = widen(from + p.down, width, rooms[1]);
    const float* b = a + p.right;
    const float* e = d + p.right;
    for (int64_t i = 0; p.count >= kLanes && i < p.count; i += kLanes) {
      // The last vector overlaps the one before, whose numbers are not counted again.
      const int64_t at = std::min(i, p.count - kLanes);
      V g = load<kLanes>(grad + at);
      if (at != i) g = lane >= int32_t(i - at) ? g : V{};
      g *= n.step == 0 ? broadcast<kLanes>(n.scale[0]) : load<kLanes>(n.scale + at);
      add_derivative(along_y, along_x, g, load<kLanes>(a + at), load<kLanes>(b + at), load<kLanes>(d + at),
                     load<kLanes>(e + at), p.fraction_y, p.fraction_x);
    }
    for (int64_t i = 0; p.count < kLanes && i < p.count; ++i) {
      float y = 0, x = 0;
      add_derivative(y, x, grad[i] * n.scale[i * n.step], a[i], b[i], d[i], e[i], p.fraction_y, p.fraction_x);
      along_y[0] += y;
      along_x[0] += x;
    }
    std::swap(rooms[0], rooms[1]);
  }
  for (int l = 0; l < kLanes; ++l) {
    sums[0] += double(along_y[l]);
    sums[1] += double(along_x[l]);
  }
}

void differentiate_patch(const PatchRows& patch, const void* gradient, double* sums, Scratch& scratch) {
  if (patch.scalar == Scalar::f32)
    differentiate_typed<float>(patch, gradient, sums, scratch);
  else if (patch.scalar == Scalar::bf16)
    differentiate_typed<uint16_t>(patch, gradient, sums, scratch);
  else
    differentiate_typed<uint8_t>(patch, gradient, sums, scratch);
}

// to[i] += scale * fraction * (a * x[i] + b * y[i]), or, of four taps, scale times the sample between that sum and the
// one `left` numbers before it.
template <typename T, bool four>
inline void add_taps(float* __restrict to, const T* __restrict x, const T* __restrict y, float a, float b,
                     float fraction, int64_t left, int64_t count, const Normalisation& n) {
  const T* __restrict u = x - left;
  const T* __restrict v = y - left;
  const auto sum = [&](int64_t i) {
    const float right = a * to_float(x[i]) + b * to_float(y[i]);
    return four ? (1 - fraction) * right + fraction * (a * to_float(u[i]) + b * to_float(v[i])) : fraction * right;
  };
  if (n.step == 0)
    for (int64_t i = 0; i < count; ++i) to[i] += sum(i) * n.scale[0];
  else
    for (int64_t i = 0; i < count; ++i) to[i] += sum(i) * n.scale[i];
}

template <typename T>
void spread_typed(const FrameRows& f, const PatchGradient* patches, int64_t patch_count, Scratch& scratch) {
  const int64_t width = f.patch_count, right = f.right;
  float* line = static_cast<float*>(scratch.reserve((f.count + width) * 4));
  // A row of zeros above and below each patch.
  T* zeros = reinterpret_cast<T*>(line + f.count);
  std::fill(zeros, zeros + width, T{});
  T* to = static_cast<T*>(f.target);
  for (int64_t y = f.begin; y < f.end; ++y, to += f.count) {
    float* row = line;
    if constexpr (std::is_same_v<T, float>) row = to;
    std::fill(row, row + f.count, 0.f);
    for (int64_t i = 0; i < patch_count; ++i) {
      const PatchGradient& p = patches[i];
      const int64_t r = y - p.row;
      const bool here = r >= 0 && r < f.patch_row_count;
      const bool above = r >= 1 && r <= f.patch_row_count && p.fraction_y != 0;
      if (!here && !above) continue;
      const T* grad = static_cast<const T*>(p.data) + r * width;
      const T* low = here ? grad : zeros;
      const T* high = above ? grad - width : zeros;
      float* at = row + p.column;
      const float a = 1 - p.fraction_y, b = p.fraction_y, fx = p.fraction_x;
      if (fx == 0) {
        add_taps<T, false>(at, low, high, a, b, 1.f, 0, width, f.normalisation);
        continue;
      }
      Normalisation inner = f.normalisation;
      inner.scale += right * inner.step;
      add_taps<T, false>(at, low, high, a, b, 1 - fx, 0, right, f.normalisation);
      add_taps<T, true>(at + right, low + right, high + right, a, b, fx, right, width - right, inner);
      add_taps<T, false>(at + width, low + width - right, high + width - right, a, b, fx, 0, right, f.normalisation);
    }
    if constexpr (!std::is_same_v<T, float>)
      for (int64_t x = 0; x < f.count; ++x) from_float(to[x], line[x]);
  }
}

void spread_patches(const FrameRows& frame, const PatchGradient* patches, int64_t patch_count, Scratch& scratch) {
  if (frame.scalar == Scalar::f32)
    spread_typed<float>(frame, patches, patch_count, scratch);
  else
    spread_typed<uint16_t>(frame, patches, patch_count, scratch);
}

}  // namespace
}  // namespace adakernels
