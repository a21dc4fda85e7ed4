// sliced_conv3d for CUDA: flags and clips become the frames that the taps of the convolution core read.
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/clip_taps.cuh"
#include "cuda/convolution.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/precision.cuh"
#include "cuda/weight_gradient.cuh"

namespace adakernels {

namespace {

// What an operator is given for time, y and x.
using Triple = std::vector<int64_t>;

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

// A 3D convolution, or, transposed, the gradient of its input.
struct Convolution {
  const Tensor& weight;  // [C_out, C_in, kt, kh, kw]
  const Triple &stride, &padding, &dilation;

  TemporalSide time(bool transposed) const {
    return {weight.size(2), stride[0], padding[0], dilation[0], transposed};
  }
  Geometry geometry(const Tensor& read, const Tensor& written, bool transposed) const {
    const auto side = [&](int d) {
      const int64_t from_end = 3 - d;
      return Side{int32_t(read.size(read.dim() - from_end)), int32_t(written.size(written.dim() - from_end)),
                  int32_t(weight.size(d + 2)), int32_t(stride[d]), int32_t(padding[d]), int32_t(dilation[d]), transposed};
    };
    return {side(1), side(2), int32_t(weight.size(2))};
  }
  Window window() const {
    return {int(weight.size(3)), int(weight.size(4)), int(stride[1]),   int(stride[2]),
            int(padding[1]),     int(padding[2]),     int(dilation[1]), int(dilation[2])};
  }
  int64_t size(const Tensor& input, int d) const {
    return out_size(input.size(input.dim() - 3 + d), weight.size(d + 2), stride[d], padding[d], dilation[d]);
  }
  Tensor empty_output(const Tensor& input, bool packed) const {
    const bool last = is_channels_last(input, "sliced_conv3d", packed ? 4 : 5);
    const int64_t channels = weight.size(0);
    if (packed)
      return empty_in_format(input, {input.size(0), channels, size(input, 1), size(input, 2)}, input.scalar_type(), last);
    return empty_in_format(input, {input.size(0), channels, size(input, 0), size(input, 1), size(input, 2)},
                           input.scalar_type(), last);
  }
};

void check_groups(int64_t groups, const Tensor& input, const Tensor& weight) {
  STD_TORCH_CHECK(weight.dim() == 5 && weight.scalar_type() == input.scalar_type(),
                  "sliced_conv3d: expected a weight of 5 dimensions and of the input's dtype");
  STD_TORCH_CHECK(groups == 1 && weight.size(1) == input.size(1), "sliced_conv3d: expected groups 1, got ", groups);
}

Tensor sliced_conv3d(Tensor input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
                     Tensor weight,                        // [C_out, C_in, kt, kh, kw]
                     std::optional<Tensor> bias,           // [C_out]
                     std::optional<Tensor> temporal,       // [B]
                     std::optional<Tensor> frame_offsets,  // [B + 1]
                     Triple stride, Triple padding, Triple dilation, int64_t groups, int64_t activation) {
  check_groups(groups, input, weight);
  const Convolution convolution{weight, stride, padding, dilation};
  Tensor output = convolution.empty_output(input, frame_offsets.has_value());
  const Tensor sources = tap_sources(output, input, temporal, frame_offsets, convolution.time(false));
  if (bias) bias = torch::stable::contiguous(*bias);
  const Epilogue epilogue{bias ? bias->const_data_ptr() : nullptr, int32_t(activation), nullptr, 1};
  convolve(output, input, weight, {}, convolution.geometry(input, output, false), data<int32_t>(sources), epilogue,
           multiplies_exactly());
  return output;
}

std::tuple<Tensor, Tensor, Tensor> sliced_conv3d_backward(
    Tensor grad_output,                   // [B, C_out, T', H', W'] | [sum T, C_out, H', W']
    Tensor input,                         // [B, C_in, T, H, W] | [sum T, C_in, H, W]
    Tensor weight,                        // [C_out, C_in, kt, kh, kw]
    std::optional<Tensor> temporal,       // [B]
    std::optional<Tensor> frame_offsets,  // [B + 1]
    Triple stride, Triple padding, Triple dilation, int64_t groups, bool want_input, bool want_weight,
    bool want_bias) {
  check_groups(groups, input, weight);
  const Convolution convolution{weight, stride, padding, dilation};
  Tensor grad_input = want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  const auto [o, i, t, y, x] = std::tuple(weight.size(0), weight.size(1), weight.size(2), weight.size(3), weight.size(4));
  Tensor grad_weight = want_weight ? torch::stable::new_empty(weight, {o, i, t, y, x})
                                   : torch::stable::new_empty(weight, {0});
  Tensor grad_bias = torch::stable::new_empty(weight, {want_bias ? o : 0});
  if (want_input) {
    const Tensor sources = tap_sources(input, grad_output, temporal, frame_offsets, convolution.time(true));
    convolve(grad_input, grad_output, weight, {}, convolution.geometry(grad_output, input, true),
             data<int32_t>(sources), {}, multiplies_exactly());
  }
  if (want_weight) {
    const Tensor sources = tap_sources(grad_output, input, temporal, frame_offsets, convolution.time(false));
    weight_gradient(grad_weight, grad_output, input, {}, data<int32_t>(sources), convolution.window());
  }
  // For the bias the frames of a clip are one high image.
  if (want_bias)
    bias_gradient(grad_bias, frame_offsets ? grad_output : torch::stable::flatten(grad_output, 2, 3), std::nullopt, 1);
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("sliced_conv3d", TORCH_BOX(&sliced_conv3d));
  m.impl("sliced_conv3d_backward", TORCH_BOX(&sliced_conv3d_backward));
}

}  // namespace adakernels
