// slim_conv for CUDA: a convolution with the part of a weight that is used.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/clip_convolution.cuh"
#include "cuda/launch.cuh"

namespace adakernels {

namespace {

using Numbers = std::vector<int64_t>;

// The first rows of a tensor, of which columns [start, stop) of the next dimension.
Tensor part_of(Tensor tensor, int64_t rows, int64_t start, int64_t stop) {
  tensor = torch::stable::narrow(tensor, 0, 0, rows);
  return torch::stable::narrow(tensor, 1, start, stop - start);
}

// Sizes of the used part.
Numbers used_sizes(const Tensor& weight, int64_t out_channels, const Numbers& segments) {
  Numbers sizes{out_channels, 0};
  for (size_t i = 0; i + 1 < segments.size(); i += 2) sizes[1] += segments[i + 1] - segments[i];
  for (int64_t d = 2; d < weight.dim(); ++d) sizes.push_back(weight.size(d));
  return sizes;
}

// Calls run(part of the whole weight, part of the used one) by segment.
template <typename Run>
void for_segments(const Tensor& weight, const Tensor& used, const Numbers& segments, const Run& run) {
  int64_t at = 0;
  for (size_t i = 0; i + 1 < segments.size(); i += 2) {
    const int64_t next = at + segments[i + 1] - segments[i];
    run(part_of(weight, used.size(0), segments[i], segments[i + 1]), part_of(used, used.size(0), at, next));
    at = next;
  }
}

// A view where it is one segment. [out_channels, sum of the segments, ...]
Tensor used_weight(const Tensor& weight, int64_t out_channels, const Numbers& segments) {
  if (segments.size() == 2) return part_of(weight, out_channels, segments[0], segments[1]);
  Tensor used = torch::stable::new_empty(weight, used_sizes(weight, out_channels, segments));
  for_segments(weight, used, segments, [](const Tensor& from, Tensor to) { torch::stable::copy_(to, from); });
  return used;
}

Tensor slim_conv(Tensor input,                // [N, C, H, W] | [B, C, T, H, W]
                 Tensor weight,               // [C_out, C_in, ...]
                 std::optional<Tensor> bias,  // [C_out]
                 int64_t out_channels, Numbers segments, Numbers stride, Numbers padding, Numbers dilation,
                 int64_t groups, int64_t activation) {
  const ClipConvolution convolution{"slim_conv", used_weight(weight, out_channels, segments), stride, padding, dilation,
                                    groups != 1};
  Tensor output = convolution.empty_output(input);
  convolution.convolve(output, input, bias, activation);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> slim_conv_backward(Tensor grad_output,  // [N, out_channels, ...]
                                                      Tensor input,        // [N, C, H, W] | [B, C, T, H, W]
                                                      Tensor weight,       // [C_out, C_in, ...]
                                                      int64_t out_channels, Numbers segments, Numbers stride,
                                                      Numbers padding, Numbers dilation, int64_t groups,
                                                      bool want_input, bool want_weight, bool want_bias) {
  const ClipConvolution convolution{"slim_conv", used_weight(weight, out_channels, segments), stride, padding, dilation,
                                    groups != 1};
  Tensor grad_input = want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  Tensor grad_weight = torch::stable::new_empty(weight, {0});
  Tensor grad_bias = torch::stable::new_zeros(weight, {want_bias ? weight.size(0) : 0});
  if (want_input) convolution.input_gradient(grad_input, grad_output);
  if (want_weight) {
    Tensor used = torch::stable::new_empty(weight, used_sizes(weight, out_channels, segments));
    convolution.weight_gradient(used, grad_output, input);
    Numbers sizes;
    for (int64_t d = 0; d < weight.dim(); ++d) sizes.push_back(weight.size(d));
    grad_weight = torch::stable::new_zeros(weight, sizes);
    for_segments(grad_weight, used, segments, [](Tensor to, const Tensor& from) { torch::stable::copy_(to, from); });
  }
  if (want_bias) {
    Tensor used = torch::stable::narrow(grad_bias, 0, 0, out_channels);
    convolution.bias_gradient(used, grad_output);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("slim_conv", TORCH_BOX(&slim_conv));
  m.impl("slim_conv_backward", TORCH_BOX(&slim_conv_backward));
}

}  // namespace adakernels
