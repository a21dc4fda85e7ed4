// Makes the frames and channels that were not computed: sums of planes filtered by small kernels. Planes to be filtered
// are copied into buffers where zeros lie around them, so that a tap of a whole plane is one run of multiply-adds.
#pragma once

#include <algorithm>

#include "../reconstruct.h"
#include "activation.h"
#include "kernels.h"

namespace adakernels {
namespace {

constexpr int kSumVectors = 4;
constexpr int64_t kStripValues = 512;

// A run of values and what they are multiplied by.
struct WeightedRun {
  const float* source;
  float weight;
};

// out[i] = activation(sum over runs of weight * source[i])
template <int count>
inline void sum_vectors(const WeightedRun* runs, int64_t run_count, int64_t at, Activation activation, float* out) {
  using V = Vector<kLanes>;
  V sum[count] = {};
  for (const WeightedRun *run = runs, *end = runs + run_count; run != end; ++run) {
    const V weight = broadcast<kLanes>(run->weight);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) sum[i] += weight * load<kLanes>(run->source + at + i * kLanes);
  }
#pragma GCC unroll 4
  for (int i = 0; i < count; ++i) store<kLanes>(out + i * kLanes, activate<kLanes>(activation, sum[i]));
}

// Planes with zeros around them: a row is followed by one, which serves the next row too.
struct PaddedPlane {
  int64_t height, width, pitch, size;

  PaddedPlane(int64_t height, int64_t width, int64_t kernel)
      : height(height),
        width(width),
        pitch(width + kernel / 2),
        size((height + 2 * (kernel / 2)) * pitch + kernel / 2 + (kSumVectors + 1) * kLanes) {}

  // From the buffer's begin to the first pixel.
  int64_t origin(int64_t kernel) const { return kernel / 2 * (pitch + 1); }
};

// The sum of filtered planes, as terms of one run.
class FilterSum {
 public:
  void clear() { count_ = 0; }

  // plane: its first pixel; kernel: [size, size]
  void add(const float* plane, int64_t pitch, const float* kernel, int64_t size) {
    const int64_t half = size / 2;
    for (int64_t y = 0; y < size; ++y)
      for (int64_t x = 0; x < size; ++x) terms_[count_++] = {plane + (y - half) * pitch + x - half, kernel[y * size + x]};
  }
  void add(const float* plane, float weight) { terms_[count_++] = {plane, weight}; }

  // Rows of `target` = activation(sum of all terms). Meanwhile fetches as many values from `next` on, to be written.
  void store_to(float* target, int64_t target_pitch, const PaddedPlane& plane, Activation activation,
                const float* next = nullptr) const {
    const int64_t pitch = plane.pitch, width = plane.width;
    const auto fetch = [&](int64_t begin, int64_t end) {
      if (next == nullptr) return;
      for (int64_t i = begin * width; i < end * width; i += 16) __builtin_prefetch(next + i, 1, 2);
    };
    if (width % kLanes == 0) {
      for (int64_t y = 0; y < plane.height; ++y) {
        fetch(y, y + 1);
        sum(y * pitch, width, activation, target + y * target_pitch);
      }
      return;
    }
    alignas(64) float strip[kStripValues + kSumVectors * kLanes];
    if (pitch > kStripValues) {
      for (int64_t y = 0; y < plane.height; ++y)
        for (int64_t x = 0; x < width; x += kStripValues) {
          const int64_t count = std::min(kStripValues, width - x);
          sum(y * pitch + x, count, activation, strip);
          copy_row(target + y * target_pitch + x, strip, count);
        }
      return;
    }
    const int64_t rows = kStripValues / pitch;
    for (int64_t y = 0; y < plane.height; y += rows) {
      const int64_t end = std::min(y + rows, plane.height);
      fetch(y, end);
      sum(y * pitch, (end - y) * pitch, activation, strip);
      for (int64_t i = y; i < end; ++i) copy_row(target + i * target_pitch, strip + (i - y) * pitch, width);
    }
  }

 private:
  // Writes up to a vector more than `count` values, unless that is a multiple of a vector.
  void sum(int64_t at, int64_t count, Activation activation, float* out) const {
    int64_t i = 0;
    for (; i + (kSumVectors - 1) * kLanes < count; i += kSumVectors * kLanes)
      sum_vectors<kSumVectors>(terms_, count_, at + i, activation, out + i);
    for (; i < count; i += kLanes) sum_vectors<1>(terms_, count_, at + i, activation, out + i);
  }

  static void copy_row(float* to, const float* from, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store<kLanes>(to + i, load<kLanes>(from + i));
    for (; i < count; ++i) to[i] = from[i];
  }

  WeightedRun terms_[kLevels * 9 + 1];
  int64_t count_ = 0;
};

// Rows of a padded plane = weight * a dense one, or that added to what is there.
template <bool add>
inline void copy_plane(float* to, const PaddedPlane& plane, const float* from, float weight) {
  for (int64_t y = 0; y < plane.height; ++y, to += plane.pitch, from += plane.width) {
    int64_t x = 0;
    for (; x + kLanes <= plane.width; x += kLanes) {
      const auto v = weight * load<kLanes>(from + x);
      store<kLanes>(to + x, add ? load<kLanes>(to + x) + v : v);
    }
    for (; x < plane.width; ++x) to[x] = (add ? to[x] : 0.f) + weight * from[x];
  }
}

// The planes of one channel in the frames of one group: what the channel levels make of the computed ones, and what
// the temporal levels make of that.
class ChannelMaker {
 public:
  ChannelMaker(const Reconstruction& what, int64_t first_frame, Scratch& scratch)
      : what_(what),
        plane_(what.height, what.width, what.kernel),
        first_(first_frame),
        end_(std::min(first_frame + what.frame_group(), what.frames)),
        step_(what.frame_step()) {
    const int64_t bytes = (1 + (end_ - first_ + step_ - 1) / step_) * plane_.size * 4;
    float* memory = static_cast<float*>(scratch.reserve(bytes));
    std::memset(memory, 0, size_t(bytes));
    mixed_ = memory + plane_.origin(what.kernel);
    made_ = mixed_ + plane_.size;
  }

  void make(int64_t channel) {
    for (int64_t t = first_; t < end_; t += step_) make_channel(channel, t);
    for (int64_t t = first_; t < end_; ++t) make_frame(channel, t);
  }

 private:
  float* dense(int64_t channel, int64_t frame) const {
    return what_.planes + channel * what_.channel_stride + frame * what_.frame_stride;
  }
  float* made(int64_t frame) const { return made_ + (frame - first_) / step_ * plane_.size; }

  void make_channel(int64_t channel, int64_t frame) {
    float here = 0;
    bool mixes = false;
    for (int level = 0; level < kLevels; ++level) {
      const float weight = what_.channel[level];
      const int64_t computed = computed_channels(what_.channels, level);
      if (weight == 0) continue;
      if (channel < computed) {
        here += weight;
      } else {
        (mixes ? copy_plane<true> : copy_plane<false>)(mixed_, plane_, dense(channel % computed, frame), weight);
        mixes = true;
      }
    }
    float* to = made(frame);
    if (here != 0) copy_plane<false>(to, plane_, dense(channel, frame), here);
    if (!mixes) return;
    terms_.clear();
    const int64_t size = what_.kernel;
    terms_.add(mixed_, plane_.pitch, what_.channel_weight + channel * size * size, size);
    if (here != 0) terms_.add(to, 1.f);
    terms_.store_to(to, plane_.pitch, plane_, Activation::none);
  }

  void make_frame(int64_t channel, int64_t frame) {
    const int64_t size = what_.kernel;
    terms_.clear();
    // Levels that make this frame from the same one share a kernel.
    for (int64_t source = frame; source >= first_; --source) {
      float kernel[9] = {}, here = 0;
      bool filters = false;
      for (int level = 0; level < kLevels; ++level) {
        const int64_t after = frame & ((int64_t(1) << level) - 1);
        const float weight = what_.temporal[level];
        if (weight == 0 || frame - after != source) continue;
        if (after == 0) {
          here += weight;
          continue;
        }
        const float* made = what_.temporal_weight + ((after - 1) * what_.channels + channel) * size * size;
        for (int64_t i = 0; i < size * size; ++i) kernel[i] += weight * made[i];
        filters = true;
      }
      if (filters)
        terms_.add(made(source), plane_.pitch, kernel, size);
      else if (here != 0)
        terms_.add(made(source), here);
    }
    const float* next = frame + 1 < end_ ? dense(channel, frame + 1) : nullptr;
    terms_.store_to(dense(channel, frame), what_.width, plane_, what_.activation, next);
  }

  const Reconstruction& what_;
  PaddedPlane plane_;
  int64_t first_, end_, step_;
  float* mixed_;  // the planes that a channel is made from
  float* made_;   // the channel in every computed frame
  FilterSum terms_;
};

// The channels of some classes in the group of frames that begins at `first_frame`.
void reconstruct(const Reconstruction& what, int64_t first_frame, int64_t class_begin, int64_t class_end,
                 Scratch& scratch) {
  ChannelMaker maker(what, first_frame, scratch);
  const int64_t classes = what.channel_classes();
  // From the last channel down, since it is made from those before it, and they are overwritten in the end.
  for (int64_t one = class_begin; one < class_end; ++one)
    for (int64_t channel = one + (what.channels - 1 - one) / classes * classes; channel >= one; channel -= classes)
      maker.make(channel);
}

}  // namespace
}  // namespace adakernels
