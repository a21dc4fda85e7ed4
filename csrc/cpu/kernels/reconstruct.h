// Makes the frames and channels that were not computed: sums of planes filtered by small kernels. Planes to be filtered
// are copied to where zeros lie before and after them, so that a tap of a plane is the plane itself from some offset on.
// What a row's first and last pixel then meet of the neighbouring rows is masked. Where rows fill vectors, neighbours
// come of whole ones: a vector across two that were just written would have to wait until the cache has them.
#pragma once

#include <algorithm>

#include "../reconstruct.h"
#include "activation.h"
#include "direct.h"
#include "kernels.h"
#include "lanes.h"

namespace adakernels {
namespace {

constexpr int kSumVectors = 4;
// Guarded planes that a channel's frames take at once: the first-level cache holds them next to what is written.
constexpr int64_t kGuardedBytes = 12 * 1024;

using PlaneMask = VectorOf<kLanes>::integer;

inline Vector<kLanes> masked(Vector<kLanes> v, PlaneMask mask) { return Vector<kLanes>(PlaneMask(v) & mask); }

inline PlaneMask load_mask(const int32_t* mask) {
  PlaneMask v;
  std::memcpy(&v, mask, sizeof(v));
  return v;
}

// The pixels one to the left of those of v, which `before` precedes.
inline Vector<kLanes> shift_right(Vector<kLanes> before, Vector<kLanes> v) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0xffff, __m512i(v), __m512i(before), kLanes - 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return kLanes - 1 + i; });
  return shuffle<kLanes>(before, v, positions);
#endif
}

// The pixels one to the right of those of v, which `after` follows.
inline Vector<kLanes> shift_left(Vector<kLanes> v, Vector<kLanes> after) {
#if defined(__AVX512F__)
  return Vector<kLanes>(_mm512_maskz_alignr_epi32(0xffff, __m512i(after), __m512i(v), 1));
#else
  constexpr auto positions = indices<kLanes>([](int i) { return i + 1; });
  return shuffle<kLanes>(v, after, positions);
#endif
}

// The second half of one vector and the first half of another.
inline Vector<kLanes> join_halves(Vector<kLanes> low, Vector<kLanes> high) {
  constexpr auto positions = indices<kLanes>([](int i) { return i + kLanes / 2; });
  return shuffle<kLanes>(low, high, positions);
}

// Planes of one size. Guarded ones lie `pitch` values apart, in whole vectors of which the last ends in zeros, and
// between zeros.
struct PlaneShape {
  int64_t width, size, kernel, guard, pitch;
  int64_t lanes_in_row;  // modulo whole rows
  const int32_t *inner_left, *inner_right;  // at pixel x of a row: whether it has a left, a right neighbour

  explicit PlaneShape(const Reconstruction& what)
      : width(what.width),
        size(what.height * what.width),
        kernel(what.kernel),
        guard(kernel == 1 ? 0 : whole_vectors(width + kLanes)),
        pitch(whole_vectors(size) + guard),
        lanes_in_row(kLanes % width) {}

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

// The activation of a sum of planes, some of them filtered, for several frames: each plane is the first of some that lie
// `step` values apart.
class PlaneSum {
 public:
  explicit PlaneSum(const PlaneShape& shape) : shape_(shape) {}

  void clear() { filtered_count_ = weighted_count_ = 0; }

  // planes: guarded; kernel: of the shape's size
  void add_filtered(const float* planes, int64_t step, const float* kernel, float weight = 1) {
    if (shape_.kernel == 1) {
      add(planes, step, weight * kernel[0]);
      return;
    }
    Filtered& filtered = filtered_[filtered_count_++];
    filtered.planes = planes;
    filtered.step = step;
    for (int i = 0; i < 9; ++i) filtered.kernel[i] = weight * kernel[i];
  }
  void add(const float* planes, int64_t step, float weight) { weighted_[weighted_count_++] = {planes, step, weight}; }

  // Overwrites `count` planes from `to` on, which may be those of one that is added unfiltered. Guarded ones stay that.
  void write(float* to, int64_t step, int64_t count, bool guarded, Activation activation) const {
    const int64_t width = shape_.width, height = shape_.size / width;
    for (int64_t n = 0; n < count; ++n, to += step) {
      const auto blocks = [&](int64_t rows, const auto& block) {
        int64_t y = 0;
        for (; y + kSumVectors <= rows; y += kSumVectors) block(y, std::integral_constant<int, kSumVectors>());
        for (; y < rows; ++y) block(y, std::integral_constant<int, 1>());
      };
      if (width == kLanes)
        blocks(height, [&]<int rows>(int64_t y, std::integral_constant<int, rows>) {
          write_vectors<rows, RowsOf::one_vector>(n, y * kLanes, 0, to, activation);
        });
      else if (width % kLanes == 0)
        blocks(height, [&]<int rows>(int64_t y, std::integral_constant<int, rows>) {
          for (int64_t x = 0; x < width; x += kLanes)
            write_vectors<rows, RowsOf::several_vectors>(n, y * width + x, x, to, activation);
        });
      else if (2 * width == kLanes && height % 2 == 0)
        blocks(height / 2, [&]<int rows>(int64_t y, std::integral_constant<int, rows>) {
          write_vectors<rows, RowsOf::half_a_vector>(n, y * kLanes, 0, to, activation);
        });
      else
        write_flat(n, to, guarded, activation);
    }
  }

 private:
  struct Filtered {
    const float* planes;
    int64_t step;
    float kernel[9];
  };
  struct Weighted {
    const float* planes;
    int64_t step;
    float weight;
  };

  // A plane from its first vector to its last, whatever rows they are of.
  void write_flat(int64_t n, float* to, bool guarded, Activation activation) const {
    const int64_t size = shape_.size, whole = size / kLanes * kLanes;
    int64_t at = 0, x = 0;
    const auto run = [&]<int count>(std::integral_constant<int, count>) {
      Vector<kLanes> sum[count] = {};
      x = add_vectors<count>(n, at, x, sum);
      for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
        for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->planes + n * w->step + at + i * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) store<kLanes>(to + at + i * kLanes, activate<kLanes>(activation, sum[i]));
      at += count * kLanes;
    };
    while (at + kSumVectors * kLanes <= whole) run(std::integral_constant<int, kSumVectors>());
    while (at < whole) run(std::integral_constant<int, 1>());
    if (whole == size) return;
    Vector<kLanes> rest = {};
    add_vectors<1>(n, at, x, &rest);
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
      for (int64_t i = 0; i < size - whole; ++i) rest[i] += w->weight * w->planes[n * w->step + whole + i];
    rest = activate<kLanes>(activation, rest);
    for (int64_t i = 0; i < (guarded ? kLanes : size - whole); ++i) to[whole + i] = i < size - whole ? rest[i] : 0.f;
  }

  // Adds what filters make of neighbouring vectors, the first one at pixel x of a row. Returns the pixel after them.
  template <int count>
  int64_t add_vectors(int64_t n, int64_t at, int64_t x, Vector<kLanes>* sum) const {
    using V = Vector<kLanes>;
    const int64_t width = shape_.width;
    V left[count] = {}, right[count] = {};
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f)
#pragma GCC unroll 3
      for (int64_t y = 0; y < 3; ++y) {
        const float* row = f->planes + n * f->step + at + (y - 1) * width;
        const float* kernel = f->kernel + y * 3;
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
      x += shape_.lanes_in_row;
      x = x < width ? x : x - width;
    }
    return x;
  }

  enum class RowsOf { half_a_vector, one_vector, several_vectors };

  // Vectors of `count` rows, or pairs of rows, whose taps share what is loaded. The first one begins at pixel x of a row.
  template <int count, RowsOf rows>
  void write_vectors(int64_t n, int64_t at, int64_t x, float* to, Activation activation) const {
    using V = Vector<kLanes>;
    constexpr bool halves = rows == RowsOf::half_a_vector;
    constexpr int apart = halves ? 2 : 1;  // taps from those of one vector to those of the next
    const int64_t pitch = halves ? kLanes : shape_.width;
    const PlaneMask inner_left = load_mask(shape_.inner_left + x), inner_right = load_mask(shape_.inner_right + x);
    V sum[count] = {};
    for (const Filtered* f = filtered_; f != filtered_ + filtered_count_; ++f) {
      V kernel[9];
#pragma GCC unroll 9
      for (int i = 0; i < 9; ++i) kernel[i] = broadcast<kLanes>(f->kernel[i]);
      const float* row = f->planes + n * f->step + at - pitch;
#pragma GCC unroll 12
      for (int r = 0; r < apart * (count - 1) + 3; ++r) {
        V here = load<kLanes>(row), left_of_it = here, right_of_it = here;
        if (rows == RowsOf::several_vectors) left_of_it = load<kLanes>(row - kLanes), right_of_it = load<kLanes>(row + kLanes);
        if (halves && r % 2 == 0) {
          // The second row of one pair and the first one of the next.
          const V next = load<kLanes>(row + kLanes);
          left_of_it = right_of_it = here = join_halves(here, next);
          row += kLanes;
        } else if (!halves) {
          row += pitch;
        }
        const V left = masked(shift_right(left_of_it, here), inner_left);
        const V right = masked(shift_left(here, right_of_it), inner_right);
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          if (r < y || (r - y) % apart != 0 || (r - y) / apart >= count) continue;
          V& to = sum[(r - y) / apart];
          to += kernel[y * 3] * left;
          to += kernel[y * 3 + 1] * here;
          to += kernel[y * 3 + 2] * right;
        }
      }
    }
    for (const Weighted* w = weighted_; w != weighted_ + weighted_count_; ++w)
#pragma GCC unroll 4
      for (int i = 0; i < count; ++i) sum[i] += w->weight * load<kLanes>(w->planes + n * w->step + at + i * pitch);
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) store<kLanes>(to + at + i * pitch, activate<kLanes>(activation, sum[i]));
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
    const int64_t planes = (std::min(what.frames, frames_) + step_ - 1) / step_;
    Layout layout;
    const int64_t masks_at = layout.add<int32_t>(2 * shape_.mask_size());
    const int64_t mixed_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    const int64_t made_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
    shape_.fill_masks(reinterpret_cast<int32_t*>(memory + masks_at));
    mixed_ = reinterpret_cast<float*>(memory + mixed_at) + shape_.guard;
    made_ = reinterpret_cast<float*>(memory + made_at) + shape_.guard;
    for (float* plane : {mixed_, made_})
      for (int64_t i = 0; i <= planes; ++i, plane += shape_.pitch) std::fill(plane - shape_.guard, plane, 0.f);
  }

  void make(int64_t channel, int64_t frame_begin, int64_t frame_end) {
    for (int64_t first = frame_begin; first < frame_end; first += frames_) {
      const int64_t count = std::min(frame_end - first, frames_);
      make_channel(channel, first, (count + step_ - 1) / step_);
      // Where frames make no others, a channel went to the output at once.
      for (int64_t after = 0; group_ > 1 && after < std::min(group_, count); ++after)
        make_frames(channel, first, after, (count - after + group_ - 1) / group_);
    }
  }

 private:
  float* dense(int64_t channel, int64_t frame) const {
    return what_.planes + channel * what_.channel_stride + frame * what_.frame_stride;
  }

  // The channel in `count` computed frames.
  void make_channel(int64_t channel, int64_t first, int64_t count) {
    const int64_t step = step_ * what_.frame_stride;
    float own_weight = 0;
    bool mixes = false;
    sum_.clear();
    for (int level = 0; level < kLevels; ++level) {
      const float weight = what_.channel[level];
      const int64_t computed = computed_channels(what_.channels, level);
      if (weight == 0) continue;
      if (channel < computed) {
        own_weight += weight;
      } else {
        sum_.add(dense(channel % computed, first), step, weight);
        mixes = true;
      }
    }
    if (mixes) sum_.write(mixed_, shape_.pitch, count, true, Activation::none);
    const bool finishes = group_ == 1;
    const float scale = finishes ? what_.temporal[0] : 1.f;
    float* const own = dense(channel, first);
    sum_.clear();
    if (mixes)
      sum_.add_filtered(mixed_, shape_.pitch, what_.channel_weight + channel * what_.kernel * what_.kernel, scale);
    if (own_weight != 0) sum_.add(own, step, own_weight * scale);
    if (finishes)
      sum_.write(own, step, count, false, what_.activation);
    else
      sum_.write(made_, shape_.pitch, count, true, Activation::none);
  }

  // The channel in those frames of `count` groups that come `after` frames after a group's first one.
  void make_frames(int64_t channel, int64_t first, int64_t after, int64_t count) {
    const int64_t taps = what_.kernel * what_.kernel;
    sum_.clear();
    // Levels that make this frame from the same one share a kernel.
    for (int64_t source = after; source >= 0; --source) {
      float kernel[9] = {}, here = 0;
      bool filters = false;
      for (int level = 0; level < kLevels; ++level) {
        const int64_t behind = after & ((int64_t(1) << level) - 1);
        const float weight = what_.temporal[level];
        if (weight == 0 || after - behind != source) continue;
        if (behind == 0) {
          here += weight;
          continue;
        }
        const float* made = what_.temporal_weight + ((behind - 1) * what_.channels + channel) * taps;
        for (int64_t i = 0; i < taps; ++i) kernel[i] += weight * made[i];
        filters = true;
      }
      const float* planes = made_ + source / step_ * shape_.pitch;
      const int64_t step = group_ / step_ * shape_.pitch;
      if (filters)
        sum_.add_filtered(planes, step, kernel);
      else if (here != 0)
        sum_.add(planes, step, here);
    }
    sum_.write(dense(channel, first + after), group_ * what_.frame_stride, count, false, what_.activation);
  }

  const Reconstruction& what_;
  PlaneShape shape_;
  PlaneSum sum_;
  int64_t step_, group_;
  int64_t frames_;  // made at once
  float* mixed_;    // the planes that a channel is made from, in every computed frame
  float* made_;     // the channel in every computed frame
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
