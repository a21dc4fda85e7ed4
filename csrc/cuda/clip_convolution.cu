#include "cuda/clip_convolution.cuh"

#include "cuda/clip_taps.cuh"
#include "cuda/convolution.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/precision.cuh"
#include "cuda/weight_gradient.cuh"

namespace adakernels {

namespace {

// The last but one or the last of three or two numbers, of y and x.
int64_t number(const std::vector<int64_t>& numbers, int d) { return numbers[numbers.size() - 2 + d]; }
int64_t extent(const Tensor& tensor, int d) { return tensor.size(tensor.dim() - 2 + d); }

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

int32_t depth_of(const Tensor& weight) { return weight.dim() == 5 ? int32_t(weight.size(2)) : 1; }

// None without taps in time.
std::optional<Tensor> sources(const ClipConvolution& c, const Tensor& written, const Tensor& read, bool transposed) {
  if (c.weight.dim() != 5) return std::nullopt;
  return tap_sources(written, read, c.temporal, c.frame_offsets,
                     {c.weight.size(2), c.stride[0], c.padding[0], c.dilation[0], transposed});
}

Geometry geometry(const ClipConvolution& c, const Tensor& read, const Tensor& written, bool transposed) {
  const auto side = [&](int d) {
    return Side{int32_t(extent(read, d)),        int32_t(extent(written, d)),     int32_t(extent(c.weight, d)),
                int32_t(number(c.stride, d)),    int32_t(number(c.padding, d)),   int32_t(number(c.dilation, d)),
                transposed};
  };
  return {side(0), side(1), depth_of(c.weight)};
}

void check(const ClipConvolution& c, const Tensor& input) {
  STD_TORCH_CHECK((c.weight.dim() == 4 || c.weight.dim() == 5) && c.weight.scalar_type() == input.scalar_type() &&
                      c.weight.size(1) == input.size(1),
                  c.op, ": expected a weight [C_out, C_in, ...] of the input's dtype");
}

}  // namespace

Tensor ClipConvolution::empty_output(const Tensor& input) const {
  check(*this, input);
  const bool last = is_channels_last(input, op, frame_offsets ? 4 : weight.dim());
  const auto size = [&](int64_t extent, int64_t kernel, size_t d) {
    return out_size(extent, kernel, stride[d], padding[d], dilation[d]);
  };
  const size_t y = stride.size() - 2;
  const int64_t channels = weight.size(0);
  const int64_t height = size(extent(input, 0), extent(weight, 0), y), width = size(extent(input, 1), extent(weight, 1), y + 1);
  if (input.dim() == 4) return empty_in_format(input, {input.size(0), channels, height, width}, input.scalar_type(), last);
  return empty_in_format(input, {input.size(0), channels, size(input.size(2), weight.size(2), 0), height, width},
                         input.scalar_type(), last);
}

void ClipConvolution::convolve(Tensor& output, const Tensor& input, const std::optional<Tensor>& bias,
                               int64_t activation) const {
  const std::optional<Tensor> from = sources(*this, output, input, false);
  const Tensor constants = bias ? torch::stable::contiguous(*bias) : weight;
  const Epilogue epilogue{bias ? constants.const_data_ptr() : nullptr, int32_t(activation), nullptr, 1};
  adakernels::convolve(output, input, weight, {}, geometry(*this, input, output, false), data_or_null<int32_t>(from),
                       epilogue, multiplies_exactly());
}

void ClipConvolution::input_gradient(Tensor& grad_input, const Tensor& grad) const {
  check(*this, grad_input);
  const std::optional<Tensor> from = sources(*this, grad_input, grad, true);
  adakernels::convolve(grad_input, grad, weight, {}, geometry(*this, grad, grad_input, true),
                       data_or_null<int32_t>(from), {}, multiplies_exactly());
}

void ClipConvolution::weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input) const {
  check(*this, input);
  const std::optional<Tensor> from = sources(*this, grad, input, false);
  const auto pair = [](const std::vector<int64_t>& numbers, int d) { return int(number(numbers, d)); };
  const Window window{int(extent(weight, 0)), int(extent(weight, 1)), pair(stride, 0),   pair(stride, 1),
                      pair(padding, 0),       pair(padding, 1),       pair(dilation, 0), pair(dilation, 1)};
  adakernels::weight_gradient(grad_weight, grad, input, {}, data_or_null<int32_t>(from), window);
}

void clip_bias_gradient(Tensor& grad_bias, const Tensor& grad) {
  // The frames of a clip are one high image.
  bias_gradient(grad_bias, grad.dim() == 5 ? torch::stable::flatten(grad, 2, 3) : grad, std::nullopt, 1);
}

}  // namespace adakernels
