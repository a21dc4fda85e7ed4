// Makes the frames and channels that were not computed: sums of planes filtered by small kernels. Planes to be filtered
// are copied to where zeros lie before and after them, so that a tap of a plane is the plane itself from some offset on.
// What a row's first and last pixel then meet of the neighbouring rows is masked.
#pragma once

#include <algorithm>

#include "../../common/layout.h"
#include "../reconstruct.h"
#include "activation.h"
#include "direct.h"
#include "kernels.h"
#include "lanes.h"

namespace adakernels {
namespace {

constexpr int kSumVectors = 4;
// Guarded planes that a channel's frames take at once: the first-level cache holds them next to what is written.
constexpr int64_t kGuardedBytes = 24 * 1024;

using PlaneMask = VectorOf<kLanes>::integer;

inline Vector<kLanes> masked(Vector<kLanes> v, PlaneMask mask) { return Vector<kLanes>(PlaneMask(v) & mask); }

inline PlaneMask load_mask(const int32_t* mask) {
  PlaneMask v;
  std::memcpy(&v, mask, sizeof(v));
  return v;
}

// Planes of one size. Guarded ones lie `pitch` values apart, in whole vectors of which the last ends in zeros, and
// between zeros.
struct PlaneShape {
  int64_t width, size, kernel, guard, pitch;
  const int32_t *inner_left, *inner_right;  // at pixel x of a row: whether it has a left, a right neighbour

  PlaneShape(const Reconstruction& what)
      : width(what.width),
        size(what.height * what.width),
        kernel(what.kernel),
        guard(kernel == 1 ? 0 : whole_vectors(width + 1)),
        pitch(whole_vectors(size) + guard) {}

  static int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  int64_t mask_size() const { return width + kLanes; }

  // masks: [2][mask_size]
  void fill_masks(int32_t* masks) {
    for (int64_t i = 0; i < mask_size(); ++i) {
      masks[i] = i % width == 0 ? 0 : -1;
      masks[mask_size() + i] = i % width == width - 1 ? 0 : -1;
    }
    inner_left = masks;
    inner_right = masks + mask_size();
  }
};

// The activation of a sum of planes, some of them filtered.
class PlaneSum {
 public:
  explicit PlaneSum(const PlaneShape& shape) : shape_(shape) {}

  void clear() { filtered_count_ = weighted_count_ = 0; }

  // plane: guarded; kernel: of the shape's size
  void add_filtered(const float* plane, const float* kernel, float weight = 1) {
    if (shape_.kernel == 1) {
      add(plane, weight * kernel[0]);
      return;
    }
    Filtered& filtered = filtered_[filtered_count_++];
    filtered.pixels = plane;
    for (int i = 0; i < 9; ++i) filtered.kernel[i] = weight * kernel[i];
  }
  void add(const float* plane, float weight) { weighted_[weighted_count_++] = {plane, weight}; }

  // Overwrites the plane `to`, which may be one of those that are added unfiltered.
  void store_guarded(float* to) const { store_to<true>(to, Activation::none); }
  void store_dense(float* to, Activation activation) const { store_to<false>(to, activation); }

 private:
  struct Filtered {
    const float* pixels;
    float kernel[9];
  };
  struct Weighted {
    const float* pixels;
    float weight;
  };

  template <bool guarded>
  void store_to(float* to, Activation activation) const {
    const int64_t width = shape_.width, size = shape_.size;
    if (width % kLanes == 0) {
      const int64_t height = size / width;
      int64_t y = 0;
      for (; y + kSumVectors <= height; y += kSumVectors)
        for (int64_t x = 0; x < width; x += kLanes) store_rows<kSumVectors>(y * width + x, x, to, activation);
      for (; y < height; ++y)
        for (int64_t x = 0; x < width; x += kLanes) store_rows<1>(y * width + x, x, to, activation);
      return;
    }
    const int64_t whole = size / kLanes * kLanes, step = kLanes % width;
    int64_t at = 0, x = 0;
    const auto run = [&]<int count>(std::integral_constant<int, count>) {
      Vector<kLanes> sum[count] = {};
      for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) add_vectors<count>(*f, at, x, sum);
      for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->pixels + at + i * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) store<kLanes>(to + at + i * kLanes, activate<kLanes>(activation, sum[i]));
      for (int i = 0; i < count; ++i) x = x + step < width ? x + step : x + step - width;
      at += count * kLanes;
    };
    while (at + kSumVectors * kLanes <= whole) run(std::integral_constant<int, kSumVectors>());
    while (at < whole) run(std::integral_constant<int, 1>());
    if (whole == size) return;
    Vector<kLanes> rest[1] = {};
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) add_vectors<1>(*f, at, x, rest);
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
      for (int64_t i = 0; i < size - whole; ++i) rest[0][i] += w->weight * w->pixels[whole + i];
    rest[0] = activate<kLanes>(activation, rest[0]);
    for (int64_t i = 0; i < (guarded ? kLanes : size - whole); ++i) to[whole + i] = i < size - whole ? rest[0][i] : 0.f;
  }

  // Neighbouring vectors of a filtered plane, the first one at pixel x of a row.
  template <int count>
  void add_vectors(const Filtered& filtered, int64_t at, int64_t x, Vector<kLanes>* sum) const {
    using V = Vector<kLanes>;
    const int64_t width = shape_.width, step = kLanes % width;
    V left[count] = {}, right[count] = {};
#pragma GCC unroll 3
    for (int64_t y = 0; y < 3; ++y) {
      const float* row = filtered.pixels + at + (y - 1) * width;
      const float* kernel = filtered.kernel + y * 3;
      const V a = broadcast<kLanes>(kernel[0]), b = broadcast<kLanes>(kernel[1]), c = broadcast<kLanes>(kernel[2]);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) {
        left[i] += a * load<kLanes>(row + i * kLanes - 1);
        sum[i] += b * load<kLanes>(row + i * kLanes);
        right[i] += c * load<kLanes>(row + i * kLanes + 1);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
      sum[i] += masked(left[i], load_mask(shape_.inner_left + x)) + masked(right[i], load_mask(shape_.inner_right + x));
      x = x + step < width ? x + step : x + step - width;
    }
  }

  // A vector of each of `count` rows, whose taps share what is loaded.
  template <int count>
  void store_rows(int64_t at, int64_t x, float* to, Activation activation) const {
    using V = Vector<kLanes>;
    const int64_t width = shape_.width;
    const PlaneMask inner_left = load_mask(shape_.inner_left + x), inner_right = load_mask(shape_.inner_right + x);
    V sum[count] = {};
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) {
      V kernel[9];
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) kernel[i] = broadcast<kLanes>(f->kernel[i]);
      const float* row = f->pixels + at - width;
#pragma GCC unroll 6
      for (int r = 0; r < count + 2; ++r, row += width) {
        const V left = masked(load<kLanes>(row - 1), inner_left), here = load<kLanes>(row);
        const V right = masked(load<kLanes>(row + 1), inner_right);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          const int i = r - y;
          if (i < 0 || i >= count) continue;
          sum[i] += kernel[y * 3] * left;
          sum[i] += kernel[y * 3 + 1] * here;
          sum[i] += kernel[y * 3 + 2] * right;
        }
      }
    }
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->pixels + at + i * width);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store<kLanes>(to + at + i * width, activate<kLanes>(activation, sum[i]));
  }

  const PlaneShape& shape_;
  Filtered filtered_[kLevels];
  Weighted weighted_[kLevels];
  int filtered_count_ = 0, weighted_count_ = 0;
};

// The planes of one channel in some frames: what the channel levels make of the computed ones, and what the temporal
// levels make of that.
class ChannelMaker {
 public:
  ChannelMaker(const Reconstruction& what, Scratch& scratch)
      : what_(what),
        shape_(what),
        sum_(shape_),
        step_(what.frame_step()),
        group_(what.frame_group()),
        frames_(std::max<int64_t>(1, kGuardedBytes / 4 / shape_.pitch * step_ / group_) * group_) {
    const int64_t planes = ceil_div(std::min(what.frames, frames_), step_);
    Layout layout;
    const int64_t masks_at = layout.add<int32_t>(2 * shape_.mask_size());
    const int64_t mixed_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    const int64_t made_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
    shape_.fill_masks(reinterpret_cast<int32_t*>(memory + masks_at));
    mixed_ = reinterpret_cast<float*>(memory + mixed_at) + shape_.guard;
    made_ = reinterpret_cast<float*>(memory + made_at) + shape_.guard;
    for (float* plane : {mixed_, made_})
      for (int64_t i = 0; i <= planes; ++i, plane += shape_.pitch)
        std::fill(plane - shape_.guard, plane, 0.f);
  }

  void make(int64_t channel, int64_t frame_begin, int64_t frame_end) {
    for (first_ = frame_begin; first_ < frame_end; first_ += frames_) {
      const int64_t end = std::min(frame_end, first_ + frames_);
      mix(channel, end);
      // Where frames make no others, a channel's go to the output at once.
      for (int64_t t = first_; t < end; t += step_) make_channel(channel, t);
      if (group_ == 1) continue;
      for (int64_t t = first_; t < end; ++t) make_frame(channel, t);
    }
  }

 private:
  float* dense(int64_t channel, int64_t frame) const {
    return what_.planes + channel * what_.channel_stride + frame * what_.frame_stride;
  }
  int64_t guarded(int64_t frame) const { return (frame - first_) / step_ * shape_.pitch; }

  // The sum of the planes that a channel is made from, by the weights of the levels.
  void mix(int64_t channel, int64_t end) {
    float weights[kLevels];
    int64_t sources[kLevels];
    own_ = 0;
    source_count_ = 0;
    for (int level = 0; level < kLevels; ++level) {
      const float weight = what_.channel[level];
      const int64_t computed = computed_channels(what_.channels, level);
      if (weight == 0) continue;
      if (channel < computed) {
        own_ += weight;
      } else {
        weights[source_count_] = weight;
        sources[source_count_++] = channel % computed;
      }
    }
    if (source_count_ == 0) return;
    for (int64_t t = first_; t < end; t += step_) {
      sum_.clear();
      for (int i = 0; i < source_count_; ++i) sum_.add(dense(sources[i], t), weights[i]);
      sum_.store_guarded(mixed_ + guarded(t));
    }
  }

  void make_channel(int64_t channel, int64_t frame) {
    const float scale = group_ == 1 ? what_.temporal[0] : 1.f;
    float* const own = dense(channel, frame);
    if (group_ == 1 && source_count_ == 0 && own_ * scale == 1 && what_.activation == Activation::none) return;
    sum_.clear();
    if (source_count_ > 0)
      sum_.add_filtered(mixed_ + guarded(frame), what_.channel_weight + channel * what_.kernel * what_.kernel, scale);
    if (own_ != 0) sum_.add(own, own_ * scale);
    if (group_ == 1)
      sum_.store_dense(own, what_.activation);
    else
      sum_.store_guarded(made_ + guarded(frame));
  }

  void make_frame(int64_t channel, int64_t frame) {
    const int64_t taps = what_.kernel * what_.kernel;
    sum_.clear();
    // Levels that make this frame from the same one share a kernel.
    for (int64_t source = frame; source >= frame / group_ * group_; --source) {
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
        const float* made = what_.temporal_weight + ((after - 1) * what_.channels + channel) * taps;
        for (int64_t i = 0; i < taps; ++i) kernel[i] += weight * made[i];
        filters = true;
      }
      if (filters)
        sum_.add_filtered(made_ + guarded(source), kernel);
      else if (here != 0)
        sum_.add(made_ + guarded(source), here);
    }
    sum_.store_dense(dense(channel, frame), what_.activation);
  }

  const Reconstruction& what_;
  PlaneShape shape_;
  PlaneSum sum_;
  int64_t step_, group_;
  int64_t frames_;  // made at once, from `first_` on
  int64_t first_ = 0;
  float* mixed_;  // the planes that a channel is made from, in every computed frame
  float* made_;   // the channel in every computed frame
  float own_ = 0;  // the weight of the channel's own computed planes
  int source_count_ = 0;
};

// The channels of some classes in frames that make up whole groups.
void reconstruct(const Reconstruction& what, int64_t frame_begin, int64_t frame_end, int64_t class_begin,
                 int64_t class_end, Scratch& scratch) {
  ChannelMaker maker(what, scratch);
  const int64_t classes = what.channel_classes();
  // From the last channel down, since it is made from those before it, and they are overwritten in the end.
  for (int64_t one = class_begin; one < class_end; ++one)
    for (int64_t channel = one + (what.channels - 1 - one) / classes * classes; channel >= one; channel -= classes)
      maker.make(channel, frame_begin, frame_end);
}

}  // namespace
}  // namespace adakernels
