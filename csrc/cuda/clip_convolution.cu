#include "cuda/clip_convolution.cuh"

#include "cuda/clip_taps.cuh"
#include "cuda/convolution.cuh"
#include "cuda/depthwise.cuh"
#include "cuda/precision.cuh"
#include "cuda/weight_gradient.cuh"

namespace adakernels {

namespace {

int32_t depth_of(const Tensor& weight) { return weight.dim() == 5 ? int32_t(weight.size(2)) : 1; }

Window window(const ClipConvolution& c) { return window_of(c.weight, c.stride, c.padding, c.dilation); }

Gates gates(const ClipConvolution& c, int64_t clips) {
  return {gate_of(c.temporal_gate, clips, c.op), gate_of(c.channel_gate, clips, c.op)};
}

// None without taps in time.
std::optional<ClipTaps> taps(const ClipConvolution& c, const Tensor& written, const Tensor& read, bool transposed) {
  if (c.weight.dim() != 5) return std::nullopt;
  return clip_taps(c.op, written, read, c.temporal, c.frame_offsets, gates(c, written.size(0)),
                   {c.weight.size(2), c.stride[0], c.padding[0], c.dilation[0], transposed});
}

Sources sources(const std::optional<ClipTaps>& taps) { return taps ? data<int32_t>(taps->sources) : nullptr; }

const int32_t* count(const std::optional<ClipTaps>& taps) {
  return taps ? data_or_null<int32_t>(taps->count) : nullptr;
}

DepthwiseDomain depthwise_domain(const ClipConvolution& c, const std::optional<ClipTaps>& taps) {
  DepthwiseDomain domain;
  domain.count = count(taps), domain.sources = sources(taps), domain.depth = depth_of(c.weight);
  return domain;
}

void check(const ClipConvolution& c, const Tensor& input) {
  STD_TORCH_CHECK((c.weight.dim() == 4 || c.weight.dim() == 5) && c.weight.scalar_type() == input.scalar_type(), c.op,
                  ": expected a weight [C_out, C_in/groups, ...] of the input's dtype");
  const int64_t channels = input.size(1);
  const bool whole = !c.depthwise || c.weight.size(0) % channels == 0;
  STD_TORCH_CHECK(c.weight.size(1) == (c.depthwise ? 1 : channels) && whole, c.op,
                  ": expected groups 1 or C_in = ", channels, " and a weight for as many channels");
}

}  // namespace

Tensor ClipConvolution::empty_output(const Tensor& input) const {
  check(*this, input);
  const bool last = is_channels_last(input, op, frame_offsets ? 4 : weight.dim());
  const Window w = window(*this);
  const int64_t rank = input.dim(), channels = weight.size(0);
  const int64_t height = w.out_height(input.size(rank - 2)), width = w.out_width(input.size(rank - 1));
  if (rank == 4) return empty_in_format(input, {input.size(0), channels, height, width}, input.scalar_type(), last);
  const int64_t frames = out_size(input.size(2), weight.size(2), stride[0], padding[0], dilation[0]);
  return empty_in_format(input, {input.size(0), channels, frames, height, width}, input.scalar_type(), last);
}

void ClipConvolution::convolve(Tensor& output, const Tensor& input, const std::optional<Tensor>& bias,
                               int64_t activation) const {
  const std::optional<ClipTaps> from = taps(*this, output, input, false);
  std::optional<Tensor> constants;
  if (bias) constants = torch::stable::contiguous(*bias);
  if (depthwise)
    return depthwise_convolution(output, input, torch::stable::contiguous(weight), constants,
                                 depthwise_domain(*this, from), window(*this), activation);
  const Epilogue epilogue{constants ? constants->const_data_ptr() : nullptr, int32_t(activation), nullptr, 1};
  adakernels::convolve(output, input, weight, {nullptr, count(from), nullptr, nullptr},
                       geometry_of(input, output, window(*this), depth_of(weight), false), sources(from), epilogue,
                       multiplies_exactly());
}

void ClipConvolution::input_gradient(Tensor& grad_input, const Tensor& grad) const {
  check(*this, grad_input);
  const std::optional<ClipTaps> from = taps(*this, grad_input, grad, true);
  if (depthwise)
    return depthwise_input_gradient(grad_input, grad, torch::stable::contiguous(weight), depthwise_domain(*this, from),
                                    window(*this));
  adakernels::convolve(grad_input, grad, weight, {nullptr, nullptr, nullptr, count(from)},
                       geometry_of(grad, grad_input, window(*this), depth_of(weight), true), sources(from), {},
                       multiplies_exactly());
}

void ClipConvolution::weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input) const {
  check(*this, input);
  const std::optional<ClipTaps> from = taps(*this, grad, input, false);
  if (depthwise)
    return depthwise_weight_gradient(grad_weight, grad, input, depthwise_domain(*this, from), window(*this));
  adakernels::weight_gradient(grad_weight, grad, input, {nullptr, count(from), nullptr, nullptr}, sources(from),
                              window(*this));
}

void ClipConvolution::bias_gradient(Tensor& grad_bias, const Tensor& grad) const {
  std::optional<ClipTaps> from;
  // Only what is computed tells frames apart.
  if (temporal_gate || channel_gate) from = taps(*this, grad, grad, false);
  DepthwiseDomain domain;
  domain.count = count(from);
  adakernels::bias_gradient(grad_bias, grad, domain);
}

std::tuple<Tensor, Tensor, Tensor> empty_gradients(const Tensor& input, const Tensor& weight, bool want_input,
                                                   bool want_weight, bool want_bias) {
  // In the order of the dimensions whatever that of the weight is.
  std::vector<int64_t> sizes{0};
  if (want_weight) {
    sizes.clear();
    for (int64_t d = 0; d < weight.dim(); ++d) sizes.push_back(weight.size(d));
  }
  return {want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0}),
          torch::stable::new_empty(weight, sizes), torch::stable::new_empty(weight, {want_bias ? weight.size(0) : 0})};
}

}  // namespace adakernels
