// Convolutions of clips with groups = 1 and their gradient, over the domain that the policies leave.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/frame_shape.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// Fills the output, which may be uninitialised, by the policies: see gated_conv2d.
void gated_convolution(Tensor& output,                          // [N, C_out, H', W']
                       const Tensor& input,                     // [N, C_in, H, W]
                       const Tensor& weight,                    // [C_out, C_in, kh, kw]
                       const std::optional<Tensor>& bias,       // [C_out]
                       const std::optional<Tensor>& policy,     // [N, C_out]
                       const std::optional<Tensor>& in_policy,  // [N, C_in]
                       int64_t frames, const Window& window, int64_t activation);

// Of what was computed: `grad` has been routed to the frames that computed it.
void gated_input_gradient(Tensor& grad_input,                      // [N, C_in, H, W]
                          const Tensor& grad,                      // [N, C_out, H', W']
                          const Tensor& weight,                    // [C_out, C_in, kh, kw]
                          const std::optional<Tensor>& policy,     // [N, C_out]
                          const std::optional<Tensor>& in_policy,  // [N, C_in]
                          int64_t frames, const Window& window);

}  // namespace adakernels
