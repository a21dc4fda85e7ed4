#include "cuda/gated_convolution.cuh"

#include "cuda/convolution.cuh"
#include "cuda/domain.cuh"
#include "cuda/precision.cuh"

namespace adakernels {

void gated_convolution(Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const std::optional<Tensor>& policy, const std::optional<Tensor>& in_policy, int64_t frames,
                       const Window& window, int64_t activation) {
  const DomainLists lists = build_domain(policy, in_policy, frames);
  const Tensor constants = bias ? torch::stable::contiguous(*bias) : weight;
  const Epilogue epilogue{bias ? constants.const_data_ptr() : nullptr, int32_t(activation),
                          policy ? data<int64_t>(*policy) : nullptr, frames};
  convolve(output, input, weight, lists.domain(), geometry_of(input, output, window, 1, false), nullptr, epilogue,
           multiplies_exactly());
}

// The lists change places: those of the outputs are what is summed over, and inputs that are known to be zero have
// no gradient.
void gated_input_gradient(Tensor& grad_input, const Tensor& grad, const Tensor& weight,
                          const std::optional<Tensor>& policy, const std::optional<Tensor>& in_policy, int64_t frames,
                          const Window& window) {
  const DomainLists lists = build_domain(policy, in_policy, frames);
  const auto [outputs, output_count, inputs, input_count] = lists.domain();
  convolve(grad_input, grad, weight, {inputs, input_count, outputs, output_count},
           geometry_of(grad, grad_input, window, 1, true), nullptr, {}, multiplies_exactly());
}

}  // namespace adakernels
