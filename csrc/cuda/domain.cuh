// The domain of a convolution: per frame, the output and the input channels to visit.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

#include "cuda/tensors.cuh"

namespace adakernels {

// Null lists are everything. A list is a permutation of all channels whose first `count` are those to visit, in
// ascending order, so that a block of it is filled up with real channels and its rest tells what nobody computes.
struct Domain {
  const int32_t* outputs;       // [N, C_out] | null
  const int32_t* output_count;  // [N] | null
  const int32_t* inputs;        // [N, C_in] | null
  const int32_t* input_count;   // [N] | null
};

// Frames of the input by output frame and temporal tap; -1 is none. Null: the output frame's own row, for one tap.
using Sources = const int32_t*;  // [N', kt]

__device__ inline int64_t source_of(Sources sources, int32_t depth, int64_t row, int32_t tap) {
  return sources != nullptr ? sources[row * depth + tap] : row;
}

// A domain together with the memory that it lies in, which has to live until the kernels that read it are launched.
struct DomainLists {
  std::optional<Tensor> outputs;       // [N, C_out]
  std::optional<Tensor> output_count;  // [N]
  std::optional<Tensor> inputs;        // [N, C_in]
  std::optional<Tensor> input_count;   // [N]

  Domain domain() const;
};

// The output channels that are kept in their frame or reused in the next one, and the input channels that are not
// SKIP. One launch; nothing waits for it.
DomainLists build_domain(const std::optional<Tensor>& policy,     // [N, C_out]
                         const std::optional<Tensor>& in_policy,  // [N, C_in]
                         int64_t frames);

// Values of a policy; any other is as SKIP for an output and live for an input.
constexpr int64_t kKeep = 0, kReuse = 1, kSkip = 2;

// Whether a channel is kept in this frame or reused in the next one of the clip (AdaFuse, Eq. 5).
__device__ inline bool is_needed(const int64_t* policy, int64_t row, int64_t frames, uint32_t channels,
                                 uint32_t channel) {
  const int64_t* own = policy + row * channels + channel;
  return *own == kKeep || (row % frames + 1 < frames && own[channels] == kReuse);
}

// Whether an input channel is not known to be zero.
__device__ inline bool is_live(const int64_t* in_policy, int64_t row, uint32_t channels, uint32_t channel) {
  return in_policy[row * channels + channel] != kSkip;
}

}  // namespace adakernels
