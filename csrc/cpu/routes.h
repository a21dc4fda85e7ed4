// Lists of channels per frame, built from policies.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "domain.h"

namespace adakernels {

// The values of a policy argument. [N, C], contiguous; null where the argument was not given.
using PolicyValues = const int64_t*;

// The order is that of adakernels.Policy.
enum Policy : int64_t { keep = 0, reuse = 1, skip = 2 };

// For each frame a list of routes, sorted by channel.
class FrameRoutes {
 public:
  std::span<const Route> operator[](int64_t frame) const {
    const int64_t f = counts_.size() == 1 ? 0 : frame;
    return {routes_.get() + f * channels_, size_t(counts_[size_t(f)])};
  }

 private:
  friend FrameRoutes computed_routes(PolicyValues, int64_t, int64_t, int64_t);
  friend FrameRoutes live_routes(PolicyValues, int64_t, int64_t);
  FrameRoutes(int64_t lists, int64_t channels)
      : routes_(new Route[size_t(lists * channels)]), counts_(size_t(lists)), channels_(channels) {}
  std::unique_ptr<Route[]> routes_;  // [lists, channels]
  std::vector<int64_t> counts_;      // one list serves all frames where there is no policy
  int64_t channels_;
};

// U_t = keep_t | reuse_{t+1} (AdaFuse, Eq. 5); all channels without a policy.
FrameRoutes computed_routes(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames);

// keep_t | reuse_t: all channels that are not known to be zero.
FrameRoutes live_routes(PolicyValues policy, int64_t frame_count, int64_t channels);

// A set of channels of each frame.
class FrameChannels {
 public:
  bool empty() const { return policy_ == nullptr; }
  // Writes to `list` those of a frame's channels [begin, end) that belong to it, and returns how many. list: [end - begin]
  int64_t list(int64_t frame, int64_t begin, int64_t end, int32_t* list) const;
  // The same of up to 32 channels as a set of bits.
  uint32_t bits(int64_t frame, int64_t begin, int64_t end) const;

 private:
  friend FrameChannels zero_channels(PolicyValues, int64_t, int64_t);
  friend FrameChannels dead_channels(PolicyValues, int64_t);
  FrameChannels(PolicyValues policy, int64_t channels, int64_t frames)
      : policy_(policy), channels_(channels), frames_(frames) {}
  // The least value of a policy that says that a channel belongs to the set of a frame.
  Policy least(int64_t frame) const { return frames_ > 0 && frame % frames_ == 0 ? reuse : skip; }

  PolicyValues policy_;
  int64_t channels_, frames_;
};

// The channels of each frame that no frame computes: skipped ones, and reused ones of a clip's first frame.
FrameChannels zero_channels(PolicyValues policy, int64_t channels, int64_t frames);

inline FrameChannels no_channels() { return zero_channels(nullptr, 0, 0); }

// The channels of each frame that `live_routes` leaves out.
FrameChannels dead_channels(PolicyValues policy, int64_t channels);

}  // namespace adakernels
