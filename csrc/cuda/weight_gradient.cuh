// The gradient of a convolution's weight over the domain that the policies leave.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/convolution.cuh"
#include "cuda/frame_shape.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

// Of groups = 1. `grad` has been routed to the frames that computed it. float32 is multiplied as torch asks for.
void gated_weight_gradient(Tensor& grad_weight,                     // [C_out, C_in, kh, kw]
                           const Tensor& grad,                      // [N, C_out, H', W']
                           const Tensor& input,                     // [N, C_in, H, W]
                           const std::optional<Tensor>& policy,     // [N, C_out]
                           const std::optional<Tensor>& in_policy,  // [N, C_in]
                           int64_t frames, const Window& window);

// The same over any domain of a convolution with taps in time as well.
void weight_gradient(Tensor& grad_weight,  // [C_out, C_in, kh, kw] | [C_out, C_in, kt, kh, kw]
                     const Tensor& grad,   // [N', C_out, H', W'] | [B, C_out, T', H', W']
                     const Tensor& input,  // [N, C_in, H, W] | [B, C_in, T, H, W]
                     const Domain& domain, Sources sources, const Window& window);

}  // namespace adakernels
