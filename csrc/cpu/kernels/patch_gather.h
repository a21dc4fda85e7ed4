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

inline void from_float(float& to, float value) { to = value; }
inline void from_float(uint16_t& to, float value) { to = to_bf16(value); }

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
    if (p.fraction_y == 0) {
      mix_along_y(to, above, 1.f, above, 0.f, p.count, p.normalisation);
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

template <typename T>
void differentiate_typed(const PatchRows& p, const void* gradient, double* sums) {
  using Out = std::conditional_t<std::is_same_v<T, uint8_t>, float, T>;
  const float fx = p.fraction_x, fy = p.fraction_y;
  const Normalisation& n = p.normalisation;
  const T* a = static_cast<const T*>(p.source);
  const Out* grad = static_cast<const Out*>(gradient);
  for (int64_t r = 0; r < p.row_count; ++r, a += p.source_stride, grad += p.count) {
    const T* b = a + p.right;
    const T* d = a + p.down;
    const T* e = d + p.right;
    float along_y[kLanes] = {}, along_x[kLanes] = {};
    const auto add = [&](int64_t i, int l) {
      const float top_left = to_float(a[i]), top = to_float(b[i]) - top_left;
      const float bottom_left = to_float(d[i]), bottom = to_float(e[i]) - bottom_left;
      const float g = to_float(grad[i]) * n.scale[i * n.step];
      along_y[l] += g * ((bottom_left - top_left) + fx * (bottom - top));
      along_x[l] += g * (top + fy * (bottom - top));
    };
    int64_t i = 0;
    for (; i + kLanes <= p.count; i += kLanes)
      for (int l = 0; l < kLanes; ++l) add(i + l, l);
    for (; i < p.count; ++i) add(i, 0);
    for (int l = 0; l < kLanes; ++l) {
      sums[0] += double(along_y[l]);
      sums[1] += double(along_x[l]);
    }
  }
}

void differentiate_patch(const PatchRows& patch, const void* gradient, double* sums) {
  if (patch.scalar == Scalar::f32)
    differentiate_typed<float>(patch, gradient, sums);
  else if (patch.scalar == Scalar::bf16)
    differentiate_typed<uint16_t>(patch, gradient, sums);
  else
    differentiate_typed<uint8_t>(patch, gradient, sums);
}

// to[i] = scale * (a * x[i] + b * y[i]); a null operand counts as zero.
template <typename T>
inline void weigh_rows(float* __restrict to, const T* __restrict x, float a, const T* __restrict y, float b,
                       int64_t count, const Normalisation& n) {
  if (x == nullptr)
    for (int64_t i = 0; i < count; ++i) to[i] = b * to_float(y[i]);
  else if (y == nullptr)
    for (int64_t i = 0; i < count; ++i) to[i] = a * to_float(x[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = a * to_float(x[i]) + b * to_float(y[i]);
  if (n.step == 0)
    for (int64_t i = 0; i < count; ++i) to[i] *= n.scale[0];
  else
    for (int64_t i = 0; i < count; ++i) to[i] *= n.scale[i];
}

template <typename T>
void spread_typed(const FrameRows& f, const PatchGradient* patches, int64_t patch_count, Scratch& scratch) {
  const int64_t width = f.patch_count;
  // A row of the frame, then one of a patch between as many zeros as lie between neighbouring pixels.
  float* line = static_cast<float*>(scratch.reserve((f.count + width + 2 * f.right) * 4));
  float* weighed = line + f.count + f.right;
  std::fill(weighed - f.right, weighed, 0.f);
  std::fill(weighed + width, weighed + width + f.right, 0.f);
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
      weigh_rows(weighed, here ? grad : nullptr, 1 - p.fraction_y, above ? grad - width : nullptr, p.fraction_y, width,
                 f.normalisation);
      float* __restrict at = row + p.column;
      const float fx = p.fraction_x;
      const float* __restrict same = weighed;
      const float* __restrict left = weighed - f.right;
      if (fx == 0)
        for (int64_t x = 0; x < width; ++x) at[x] += same[x];
      else
        for (int64_t x = 0; x < width + f.right; ++x) at[x] += (1 - fx) * same[x] + fx * left[x];
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
