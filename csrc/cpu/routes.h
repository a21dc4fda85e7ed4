// Lists of channels per frame, built from policies.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "domain.h"

namespace adakernels {

// The values of a policy argument. [N, C], contiguous; null where the argument was not given.
using PolicyValues = const int64_t*;

// For each frame a list of routes, sorted by channel.
class FrameRoutes {
 public:
  std::span<const Route> operator[](int64_t frame) const {
    const size_t f = shared_ ? 0 : size_t(frame);
    return {routes_.data() + begin_[f], size_t(begin_[f + 1] - begin_[f])};
  }

 private:
  friend FrameRoutes computed_routes(PolicyValues, int64_t, int64_t, int64_t);
  friend FrameRoutes live_routes(PolicyValues, int64_t, int64_t);
  std::vector<Route> routes_;
  std::vector<int64_t> begin_ = {0};
  bool shared_ = false;  // one list serves all frames
};

struct FrameChannel {
  int64_t frame, channel;
};
using FrameChannels = std::vector<FrameChannel>;

// U_t = keep_t | reuse_{t+1} (AdaFuse, Eq. 5); all channels without a policy.
FrameRoutes computed_routes(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames);

// keep_t | reuse_t: all channels that are not known to be zero.
FrameRoutes live_routes(PolicyValues policy, int64_t frame_count, int64_t channels);

// The channels of each frame that no frame computes: skipped ones, and reused ones of a clip's first frame.
FrameChannels zero_channels(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames);

// The channels of each frame that `live_routes` leaves out.
FrameChannels dead_channels(PolicyValues policy, int64_t frame_count, int64_t channels);

}  // namespace adakernels
