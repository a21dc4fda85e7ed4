#include "routes.h"

namespace adakernels {

// A route is written before it is known whether it counts: what a policy holds is hard to predict for a branch.

FrameRoutes live_routes(PolicyValues policy, int64_t frame_count, int64_t channels) {
  const int64_t lists = policy == nullptr ? 1 : frame_count;
  FrameRoutes live(lists, channels);
  for (int64_t t = 0; t < lists; ++t) {
    Route* routes = live.routes_.get() + t * channels;
    int64_t count = 0;
    for (int64_t c = 0; c < channels; ++c) {
      routes[count] = {int32_t(c), true, false};
      count += policy == nullptr || policy[t * channels + c] != skip;
    }
    live.counts_[size_t(t)] = count;
  }
  return live;
}

FrameRoutes computed_routes(PolicyValues policy, int64_t frame_count, int64_t channels, int64_t frames) {
  if (policy == nullptr) return live_routes(nullptr, frame_count, channels);
  FrameRoutes computed(frame_count, channels);
  for (int64_t t = 0; t < frame_count; ++t) {
    const int64_t* here = policy + t * channels;
    const bool last = (t + 1) % frames == 0;
    const int64_t* next = last ? here : here + channels;
    Route* routes = computed.routes_.get() + t * channels;
    int64_t count = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const bool kept = here[c] == keep, reused = (next[c] == reuse) & !last;
      routes[count] = {int32_t(c), kept, reused};
      count += kept | reused;
    }
    computed.counts_[size_t(t)] = count;
  }
  return computed;
}

int64_t FrameChannels::list(int64_t frame, int64_t begin, int64_t end, int32_t* list) const {
  const int64_t *values = policy_ + frame * channels_, from = least(frame);
  int64_t count = 0;
  for (int64_t c = begin; c < end; ++c) {
    list[count] = int32_t(c);
    count += values[c] >= from;
  }
  return count;
}

uint32_t FrameChannels::bits(int64_t frame, int64_t begin, int64_t end) const {
  const int64_t *values = policy_ + frame * channels_, from = least(frame);
  uint32_t bits = 0;
  for (int64_t c = begin; c < end; ++c) bits |= uint32_t(values[c] >= from) << (c - begin);
  return bits;
}

FrameChannels zero_channels(PolicyValues policy, int64_t channels, int64_t frames) {
  return {policy, channels, frames};
}

FrameChannels dead_channels(PolicyValues policy, int64_t channels) { return {policy, channels, 0}; }

}  // namespace adakernels
