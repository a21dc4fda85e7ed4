// Makes the frames and channels that were not computed: sums of planes filtered by small kernels.
#pragma once

#include <algorithm>

#include "../reconstruct.h"
#include "kernels.h"
#include "plane_sum.h"

namespace adakernels {
namespace {

// Planes that a channel's frames take at once: the first-level cache holds them next to what is written.
constexpr int64_t kMadeBytes = 12 * 1024;

// The planes of one channel in some frames: what the channel levels make of the computed ones, and what the temporal
// levels make of that. Planes that filters cannot read as they lie are copied first.
class ChannelMaker {
 public:
  ChannelMaker(const Reconstruction& what, Scratch& scratch)
      : what_(what),
        shape_(what.height, what.width, what.kernel),
        sum_(shape_),
        copies_(!shape_.reads_as_they_lie()),
        step_(what.frame_step()),
        group_(what.frame_group()),
        frames_(std::max<int64_t>(1, kMadeBytes / 4 / shape_.pitch * step_ / group_) * group_) {
    for (int64_t after = 0; after < group_; ++after) plan_frame(after);
    const int64_t planes = copies_ ? (std::min(what.frames, frames_) + step_ - 1) / step_ : 0;
    Layout layout;
    const int64_t tables_at = layout.add<float>(shape_.table_size());
    const int64_t mixed_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    const int64_t made_at = layout.add<float>(shape_.guard + planes * shape_.pitch);
    char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
    shape_.fill_tables(reinterpret_cast<float*>(memory + tables_at));
    mixed_ = reinterpret_cast<float*>(memory + mixed_at) + shape_.guard;
    made_ = reinterpret_cast<float*>(memory + made_at) + shape_.guard;
    for (float* plane : {mixed_, made_})
      for (int64_t i = 0; i <= planes; ++i, plane += shape_.pitch) std::fill(plane - shape_.guard, plane, 0.f);
  }

  void make(int64_t channel, int64_t frame_begin, int64_t frame_end) {
    for (int64_t first = frame_begin; first < frame_end; first += frames_) {
      const int64_t count = std::min(frame_end - first, frames_);
      const Planes made = make_channel(channel, first, (count + step_ - 1) / step_);
      if (group_ == 1) continue;
      // From the last frame of a group down, since it is made from those before it.
      for (int64_t after = std::min(group_, count) - 1; after >= 0; --after)
        make_frames(made, channel, first, after, (count - after + group_ - 1) / group_);
    }
  }

 private:
  // A channel's planes in computed frames, to be scaled.
  struct Planes {
    const float* first;
    int64_t step;
    float scale;
  };

  // What levels make from one frame for one that comes so many frames after it: they share a kernel, their sum.
  struct Source {
    int64_t frame;
    float here;  // the weight of that frame itself
    int count;   // of filters
    struct {
      int64_t number;
      float weight;
    } filters[kLevels];
  };

  // What makes the frame that comes `after` frames after a group's first one.
  struct Frame {
    int count;
    Source sources[kLevels];
  };

  void plan_frame(int64_t after) {
    Frame& frame = plan_[after];
    frame.count = 0;
    for (int64_t source = after; source >= 0; --source) {
      Source one = {source, 0, 0, {}};
      for (int level = 0; level < kLevels; ++level) {
        const int64_t behind = after & ((int64_t(1) << level) - 1);
        const float weight = what_.temporal[level];
        if (weight == 0 || after - behind != source) continue;
        if (behind == 0)
          one.here += weight;
        else
          one.filters[one.count++] = {behind - 1, weight};
      }
      if (one.here != 0 || one.count > 0) frame.sources[frame.count++] = one;
    }
  }

  float* dense(int64_t channel, int64_t frame) const {
    return what_.planes + channel * what_.channel_stride + frame * what_.frame_stride;
  }

  // The channel in `count` computed frames, and in the end already where frames make no others.
  Planes make_channel(int64_t channel, int64_t first, int64_t count) {
    const int64_t step = step_ * what_.frame_stride;
    const bool finishes = group_ == 1;
    const float scale = finishes ? what_.temporal[0] : 1.f;
    const float* const filter = what_.channel_weight + channel * what_.kernel * what_.kernel;
    float* const own = dense(channel, first);
    float own_weight = 0;
    bool mixes = false;
    sum_.clear();
    for (int level = 0; level < kLevels; ++level) {
      const float weight = what_.channel[level];
      if (weight == 0) continue;
      const int64_t computed = computed_channels(what_.channels, level);
      if (channel < computed) {
        own_weight += weight;
        continue;
      }
      mixes = true;
      int64_t made_from = channel - computed;
      while (made_from >= computed) made_from -= computed;
      const float* const source = dense(made_from, first);
      if (copies_)
        sum_.add(source, step, weight);
      else
        sum_.add_filtered(source, step, filter, weight * scale);
    }
    if (!mixes && !copies_ && (!finishes || (own_weight * scale == 1 && what_.activation == Activation::none)))
      return {own, step, own_weight};
    if (mixes && copies_) {
      sum_.write(mixed_, shape_.pitch, count, true, {Activation::none});
      sum_.clear();
      sum_.add_filtered(mixed_, shape_.pitch, filter, scale);
    }
    if (own_weight != 0) sum_.add(own, step, own_weight * scale);
    if (finishes)
      sum_.write(own, step, count, false, {what_.activation, what_.streamed && own_weight == 0});
    else if (copies_)
      sum_.write(made_, shape_.pitch, count, true, {Activation::none});
    else
      sum_.write(own, step, count, false, {Activation::none});
    return {copies_ ? made_ : own, copies_ ? shape_.pitch : step, 1.f};
  }

  // The channel in those frames of `count` groups that come `after` frames after a group's first one.
  void make_frames(const Planes& computed, int64_t channel, int64_t first, int64_t after, int64_t count) {
    const int64_t taps = what_.kernel * what_.kernel;
    const Frame& frame = plan_[after];
    if (after == 0 && frame.count == 1 && frame.sources[0].here * computed.scale == 1 && !copies_ &&
        what_.activation == Activation::none)
      return;
    sum_.clear();
    const int64_t step = group_ / step_ * computed.step;
    for (const Source* source = frame.sources; source != frame.sources + frame.count; ++source) {
      const float* const planes = computed.first + source->frame / step_ * computed.step;
      if (source->count == 0) {
        sum_.add(planes, step, source->here * computed.scale);
        continue;
      }
      float kernel[9] = {};
      for (int i = 0; i < source->count; ++i) {
        const float* const made =
            what_.temporal_weight + (source->filters[i].number * what_.channels + channel) * taps;
        for (int64_t t = 0; t < taps; ++t) kernel[t] += source->filters[i].weight * made[t];
      }
      sum_.add_filtered(planes, step, kernel, computed.scale);
    }
    sum_.write(dense(channel, first + after), group_ * what_.frame_stride, count, false,
               {what_.activation, what_.streamed && after % step_ != 0});
  }

  const Reconstruction& what_;
  PlaneShape shape_;
  PlaneSum sum_;
  bool copies_;
  int64_t step_, group_;
  int64_t frames_;  // made at once
  Frame plan_[1 << (kLevels - 1)];
  float* mixed_;    // copies of the planes that a channel is made from, in every computed frame
  float* made_;     // and of the channel in every computed frame
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
