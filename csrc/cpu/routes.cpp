#include "routes.h"

namespace adakernels {

namespace {

// The order is that of adakernels.Policy.
enum Policy : int64_t { keep = 0, reuse = 1, skip = 2 };

}  // namespace

FrameRoutes live_routes(PolicyValues policy, int64_t frame_count, int64_t channels) {
  FrameRoutes lists;
  lists.shared_ = policy == nullptr;
  for (int64_t t = 0; t < (lists.shared_ ? 1 : frame_count); ++t) {
    for (int64_t c = 0; c < channels; ++c)
      if (policy == nullptr || policy[t * channels + c] != skip)
        lists.routes_.push_back({int32_t(c), true, false});
    lists.begin_.push_back(int64_t(lists.routes_.size()));
  }
  return lists;
}

FrameRoutes computed_routes(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames) {
  if (policy == nullptr) return live_routes(nullptr, frame_count, channels);
  FrameRoutes lists;
  for (int64_t t = 0; t < frame_count; ++t) {
    const int64_t* here = policy + t * channels;
    const int64_t* next = (t + 1) % frames != 0 ? here + channels : nullptr;
    for (int64_t c = 0; c < channels; ++c) {
      const bool kept = here[c] == keep, reused = next != nullptr && next[c] == reuse;
      if (kept || reused) lists.routes_.push_back({int32_t(c), kept, reused});
    }
    lists.begin_.push_back(int64_t(lists.routes_.size()));
  }
  return lists;
}

FrameChannels zero_channels(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames) {
  FrameChannels zeros;
  if (policy == nullptr) return zeros;
  for (int64_t t = 0; t < frame_count; ++t)
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t value = policy[t * channels + c];
      if (value == skip || (value == reuse && t % frames == 0)) zeros.push_back({t, c});
    }
  return zeros;
}

FrameChannels dead_channels(PolicyValues policy, int64_t frame_count, int64_t channels) {
  FrameChannels dead;
  if (policy == nullptr) return dead;
  for (int64_t t = 0; t < frame_count; ++t)
    for (int64_t c = 0; c < channels; ++c)
      if (policy[t * channels + c] == skip) dead.push_back({t, c});
  return dead;
}

}  // namespace adakernels
