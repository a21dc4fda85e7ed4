// Depthwise convolutions and the sums over a gradient that cost no more than reading it.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/domain.cuh"
#include "cuda/frame_shape.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// What of a depthwise convolution is computed. Null is everything.
struct DepthwiseDomain {
  const int64_t* policy = nullptr;     // [N', C_out], see gated_conv2d
  const int64_t* in_policy = nullptr;  // [N, C_in]
  int64_t frames = 1;                  // of a clip of the policies
  // Of the frames that are written: how many first channels of the output are computed. Others are left as they are.
  const int32_t* count = nullptr;  // [N']
  Sources sources = nullptr;
  int32_t depth = 1;  // temporal taps
};

// Fills the output, which may be uninitialised. C_out is a multiple of C_in.
void depthwise_convolution(Tensor& output,                     // [N', C_out, H', W'] | [B, C_out, T', H', W']
                           const Tensor& input,                // [N, C_in, H, W] | [B, C_in, T, H, W]
                           const Tensor& weight,               // [C_out, 1, kh, kw] | [C_out, 1, kt, kh, kw]
                           const std::optional<Tensor>& bias,  // [C_out]
                           const DepthwiseDomain& domain, const Window& window, int64_t activation);

// Of what was computed: `grad` has been routed to the frames that computed it. The domain's sources and counts are
// those of the input's frames.
void depthwise_input_gradient(Tensor& grad_input,    // [N, C_in, H, W] | [B, C_in, T, H, W]
                              const Tensor& grad,    // [N', C_out, H', W'] | [B, C_out, T', H', W']
                              const Tensor& weight,  // [C_out, 1, kh, kw] | [C_out, 1, kt, kh, kw]
                              const DepthwiseDomain& domain, const Window& window);

void depthwise_weight_gradient(Tensor& grad_weight,  // [C_out, 1, kh, kw] | [C_out, 1, kt, kh, kw]
                               const Tensor& grad,   // [N', C_out, H', W'] | [B, C_out, T', H', W']
                               const Tensor& input,  // [N, C_in, H, W] | [B, C_in, T, H, W]
                               const DepthwiseDomain& domain, const Window& window);

void bias_gradient(Tensor& grad_bias,   // [C_out]
                   const Tensor& grad,  // [N', C_out, H', W'] | [B, C_out, T', H', W']
                   const DepthwiseDomain& domain);

// Whether output channel `out` of a frame is computed and input channel `in` is no known zero.
__device__ inline bool is_read(const DepthwiseDomain& domain, int64_t row, uint32_t out_channels, uint32_t out,
                               uint32_t in_channels, uint32_t in) {
  return (domain.policy == nullptr || is_needed(domain.policy, row, domain.frames, out_channels, out)) &&
         (domain.in_policy == nullptr || is_live(domain.in_policy, row, in_channels, in)) &&
         (domain.count == nullptr || int32_t(out) < domain.count[row]);
}

// to[i] = the sum over s of partial[s][i], in that order. partial: [splits, ...] float32
void sum_splits(Tensor& to, const Tensor& partial);

}  // namespace adakernels
