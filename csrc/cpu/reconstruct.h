// How the frames and channels of a clip that were not computed are made from those that were.
#pragma once

#include <cstdint>

#include "domain.h"

namespace adakernels {

constexpr int kLevels = 3;

// Computed channels of a channel level.
inline int64_t computed_channels(int64_t channels, int level) {
  return (channels + (int64_t(1) << level) - 1) >> level;
}

// Dense float32 planes of a clip, or of some groups of its frames. At the beginning the frames and channels of its
// largest live branches hold computed features, at the end all of them hold the activation of the weighted sum of all
// branches.
struct Reconstruction {
  float* planes;
  int64_t channels, frames, height, width;
  int64_t channel_stride, frame_stride;
  // Weights of the levels; 0 for dead ones. Both have one that is not.
  float temporal[kLevels], channel[kLevels];
  int64_t kernel;                // 1 or 3
  const float* temporal_weight;  // [2^(levels - 1) - 1, channels, kernel, kernel] or null
  const float* channel_weight;   // [channels, kernel, kernel] or null
  Activation activation;
  bool streamed;  // what was not computed goes past the caches; all planes begin with a line of these

  // Every 2^level-th frame is computed, and frames of a group of that many are made from each other.
  int64_t frame_step() const {
    int level = 0;
    while (temporal[level] == 0) ++level;
    return int64_t(1) << level;
  }
  int64_t frame_group() const {
    int level = kLevels - 1;
    while (temporal[level] == 0) --level;
    return int64_t(1) << level;
  }
  int64_t computed() const {
    int level = 0;
    while (channel[level] == 0) ++level;
    return computed_channels(channels, level);
  }
  // Channels of one class, those that are equal modulo this number, are not made from those of another.
  int64_t channel_classes() const {
    int64_t classes = channels;
    for (int level = 1; level < kLevels; ++level)
      if (channel[level] != 0) classes = computed_channels(channels, level);
    for (int level = 1; level < kLevels; ++level)
      if (channel[level] != 0 && computed_channels(channels, level) % classes != 0) return 1;
    return classes;
  }
};

}  // namespace adakernels
