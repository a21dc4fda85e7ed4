// The way of a gradient from what was mixed to what was computed.
#pragma once

#include <cstdint>
#include <optional>

#include "cuda/tensors.cuh"

namespace adakernels {

// The gradient of the mixed features, brought to the frames that computed them: that of a kept channel stays, that of a
// reused one belongs to the frame before. `grad` itself without a policy.
Tensor computed_gradient(const Tensor& grad,                   // [N, C, H, W]
                         const std::optional<Tensor>& policy,  // [N, C]
                         int64_t frames);

}  // namespace adakernels
