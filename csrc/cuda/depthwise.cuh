// Depthwise convolutions and the sums over a gradient that cost no more than reading it.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/frame_shape.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// Fills the output, which may be uninitialised, by the policies: see gated_conv2d. C_out is a multiple of C_in.
void depthwise_convolution(Tensor& output,                          // [N, C_out, H', W']
                           const Tensor& input,                     // [N, C_in, H, W]
                           const Tensor& weight,                    // [C_out, 1, kh, kw]
                           const std::optional<Tensor>& bias,       // [C_out]
                           const std::optional<Tensor>& policy,     // [N, C_out]
                           const std::optional<Tensor>& in_policy,  // [N, C_in]
                           int64_t frames, const Window& window, int64_t activation);

// Of what was computed: `grad` has been routed to the frames that computed it.
void depthwise_input_gradient(Tensor& grad_input,                      // [N, C_in, H, W]
                              const Tensor& grad,                      // [N, C_out, H', W']
                              const Tensor& weight,                    // [C_out, 1, kh, kw]
                              const std::optional<Tensor>& policy,     // [N, C_out]
                              const std::optional<Tensor>& in_policy,  // [N, C_in]
                              int64_t frames, const Window& window);

void depthwise_weight_gradient(Tensor& grad_weight,                     // [C_out, 1, kh, kw]
                               const Tensor& grad,                      // [N, C_out, H', W']
                               const Tensor& input,                     // [N, C_in, H, W]
                               const std::optional<Tensor>& policy,     // [N, C_out]
                               const std::optional<Tensor>& in_policy,  // [N, C_in]
                               int64_t frames, const Window& window);

void bias_gradient(Tensor& grad_bias,                    // [C_out]
                   const Tensor& grad,                   // [N, C_out, H', W']
                   const std::optional<Tensor>& policy,  // [N, C_out]
                   int64_t frames);

// to[i] = the sum over s of partial[s][i], in that order. partial: [splits, ...] float32
void sum_splits(Tensor& to, const Tensor& partial);

}  // namespace adakernels
