// Element-wise passes over a plane: the mixing of a frame with its history, and the sums of its gradient.
#pragma once

#include "../domain.h"
#include "copy.h"
#include "store.h"

namespace adakernels {
namespace {

// to[i] = a * x[i] + b * y[i]; a null operand counts as zero and is not read, and a factor of 1 passes values on as
// they are.
template <typename T>
void mix_run(T* to, const T* x, float a, const T* y, float b, int64_t count, int64_t to_hop, int64_t hop) {
  for (int64_t i = 0; i < count; ++i) {
    float value = 0;
    if (x != nullptr) value = a * to_float(x[i * hop]);
    if (y != nullptr) value += b * to_float(y[i * hop]);
    store_run(to + i * to_hop, &value, 1, 1);
  }
}

template <typename T>
void mix_typed(const Planes& target, int64_t frame, int64_t channel, const Planes& source, float here, float other,
               int64_t other_frame) {
  T* to = static_cast<T*>(target.data) + frame * target.frame_stride + channel * target.channel_stride;
  const T* base = static_cast<const T*>(source.data) + channel * source.channel_stride;
  const T* x = here != 0 ? base + frame * source.frame_stride : nullptr;
  const T* y = other != 0 ? base + other_frame * source.frame_stride : nullptr;
  const bool flat = target.column_stride == 1 && source.column_stride == 1 && target.row_stride == target.width &&
                    source.row_stride == source.width;
  const int64_t rows = flat ? 1 : target.height, columns = flat ? target.height * target.width : target.width;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = r * source.row_stride;
    T* row = to + r * target.row_stride;
    const T* x_row = x == nullptr ? nullptr : x + at;
    const T* y_row = y == nullptr ? nullptr : y + at;
    // Unit strides apart, so that the loop becomes vector code.
    if (target.column_stride == 1 && source.column_stride == 1)
      mix_run<T>(row, x_row, here, y_row, other, columns, 1, 1);
    else
      mix_run<T>(row, x_row, here, y_row, other, columns, target.column_stride, source.column_stride);
  }
}

// Plane of `frame` in target = here * source[frame] + other * source[other_frame].
void mix_planes(const Planes& target, int64_t frame, int64_t channel, const Planes& source, float here, float other,
                int64_t other_frame) {
  if (target.scalar == Scalar::f32)
    mix_typed<float>(target, frame, channel, source, here, other, other_frame);
  else
    mix_typed<uint16_t>(target, frame, channel, source, here, other, other_frame);
}

template <typename T>
double dot_typed(const Planes& a, int64_t a_frame, const Planes& b, int64_t b_frame, int64_t channel) {
  const T* x = static_cast<const T*>(a.data) + a_frame * a.frame_stride + channel * a.channel_stride;
  const T* y = static_cast<const T*>(b.data) + b_frame * b.frame_stride + channel * b.channel_stride;
  double sum = 0;
  for (int64_t r = 0; r < a.height; ++r) {
    const T* x_row = x + r * a.row_stride;
    const T* y_row = y + r * b.row_stride;
    float partial[kLanes] = {};
    int64_t i = 0;
    if (a.column_stride == 1 && b.column_stride == 1)
      for (; i + kLanes <= a.width; i += kLanes)
        for (int l = 0; l < kLanes; ++l) partial[l] += to_float(x_row[i + l]) * to_float(y_row[i + l]);
    for (; i < a.width; ++i) partial[0] += to_float(x_row[i * a.column_stride]) * to_float(y_row[i * b.column_stride]);
    for (const float p : partial) sum += double(p);
  }
  return sum;
}

// The sum over a plane of products of two stacks of frames.
double dot_planes(const Planes& a, int64_t a_frame, const Planes& b, int64_t b_frame, int64_t channel) {
  return a.scalar == Scalar::f32 ? dot_typed<float>(a, a_frame, b, b_frame, channel)
                                 : dot_typed<uint16_t>(a, a_frame, b, b_frame, channel);
}

}  // namespace
}  // namespace adakernels
