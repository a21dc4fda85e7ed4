// Gradients of a depthwise convolution's weight and of a bias: sums over pixels and frames, in a fixed order.
#include <algorithm>
#include <type_traits>

#include "cuda/depthwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tap_sums.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
// Lines of the output are split so that there are about that many blocks.
constexpr int64_t kBlocks = 1024;

struct DepthwiseSums {
  FrameShape out, in;
  Window window;
  DepthwiseDomain domain;
  uint32_t multiplier;      // C_out / C_in
  int64_t lines_per_split;  // of rows * H' lines
  uint32_t channel_blocks, tap_blocks;
};

// A block has the channels of its lanes, a temporal tap, some lines of the output and, with kKernel = 0, some taps.
template <typename T, int kChannels, int kKernel, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_weight_kernel(float* partial,  // [splits, C_out, kt, taps]
                            const T* grad,   // [N', C_out, H', W']
                            const T* input,  // [N, C_in, H, W] | null
                            DepthwiseSums shape) {
  using Own = SumLanes<kChannelsLast>;
  static_assert(Own::kThreads == kThreads);
  const FrameShape &out = shape.out, &in = shape.in;
  const DepthwiseDomain& domain = shape.domain;
  uint32_t index = blockIdx.x;
  const uint32_t first_tap = index % shape.tap_blocks * kTapsOf<kKernel>;
  index /= shape.tap_blocks;
  const uint32_t channel = (index % shape.channel_blocks * Own::kChannelLanes + Own::channel()) * kChannels;
  index /= shape.channel_blocks;
  const int32_t tap_z = int32_t(index % uint32_t(domain.depth));
  const int64_t split = index / uint32_t(domain.depth);
  float sums[kTapsOf<kKernel>][kChannels] = {};

  if (channel < out.channels) {
    const uint32_t in_channel = channel / shape.multiplier;
    const int64_t first_line = split * shape.lines_per_split;
    const int64_t last_line = min(first_line + shape.lines_per_split, int64_t(out.rows) * out.height);
    for (int64_t line = first_line; line < last_line;) {
      const int64_t row = line / out.height;
      const int64_t end = min(last_line, (row + 1) * out.height);
      const uint32_t first_y = uint32_t(line - row * out.height), lines = uint32_t(end - line);
      line = end;
      bool read[kChannels], any = false;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        read[i] = is_read(domain, row, out.channels, channel + i, in.channels, in_channel + i);
        any |= read[i];
      }
      const int64_t source_row = source_of(domain.sources, domain.depth, row, tap_z);
      if (!any || source_row < 0) continue;
      add_frame<T, kChannels, kKernel, kChannelsLast>(
          sums, grad + out.at(uint32_t(row)) + channel * out.step_channel,
          input == nullptr ? nullptr : input + in.at(uint32_t(source_row)) + in_channel * in.step_channel, out, in,
          shape.window, read, first_y, lines, first_tap);
    }
  }
  const int taps = shape.window.taps();
  const int64_t channel_step = int64_t(domain.depth) * taps;
  store_sums<kTapsOf<kKernel>, kChannels, kChannelsLast>(
      partial + (split * out.channels + channel) * channel_step + tap_z * taps + first_tap, channel_step, sums,
      channel < out.channels, taps - int(first_tap));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(T* to,                 // [size]
                                                              const float* partial,  // [splits, size]
                                                              int64_t size, int64_t splits) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size) return;
  float sum = 0.f;
  for (int64_t split = 0; split < splits; ++split) sum += partial[split * size + i];
  to[i] = static_cast<T>(sum);
}

// Of a weight, or of a bias where there is no input.
void gradient(Tensor& to, const Tensor& grad, const Tensor* input, const DepthwiseDomain& domain, const Window& w) {
  const char* name = "depthwise convolution";
  const FrameShape out = frame_shape(grad, name), in = input == nullptr ? out : frame_shape(*input, name);
  const uint32_t multiplier = in.channels == 0 ? 1 : out.channels / in.channels;
  const bool last = out.channels_last() && in.channels_last();
  const int64_t lines = int64_t(out.rows) * out.height;
  const Stream stream(grad);
  for_float_type(grad, name, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto kernel, auto channels, auto channels_last) {
      using Own = SumLanes<channels_last()>;
      constexpr int kTaps = kTapsOf<kernel()>;
      const int64_t channel_blocks = ceil_div(out.channels, Own::kChannelLanes * channels());
      const int64_t tap_blocks = ceil_div(w.taps(), kTaps), blocks = channel_blocks * tap_blocks * domain.depth;
      const int64_t wanted =
          std::clamp<int64_t>(kBlocks / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(lines, 1));
      const int64_t lines_per_split = std::max<int64_t>(ceil_div(lines, wanted), 1);
      const int64_t splits = std::max<int64_t>(ceil_div(lines, lines_per_split), 1);
      Tensor partial = torch::stable::new_empty(grad, {splits, int64_t(out.channels), int64_t(domain.depth) * w.taps()},
                                                ScalarType::Float);
      const DepthwiseSums shape{out,        in,  w, domain, multiplier, lines_per_split, uint32_t(channel_blocks),
                                uint32_t(tap_blocks)};
      stream.launch(&depthwise_weight_kernel<T, channels(), kernel(), channels_last()>, splits * blocks, kThreads,
                    Own::shared_bytes(kTaps), mutable_data<float>(partial), data<T>(grad),
                    input == nullptr ? nullptr : data<T>(*input), shape);
      sum_splits(to, partial);
    };
    constexpr std::integral_constant<int, 0> any;
    constexpr std::integral_constant<int, 1> one;
    const auto with_layout = [&](auto kernel, auto channels) {
      last ? launch(kernel, channels, std::true_type()) : launch(kernel, one, std::false_type());
    };
    const bool pairs = multiplier == 1 && out.channels % 2 == 0 && is_aligned(grad, 2 * sizeof(T)) &&
                       (input == nullptr || is_aligned(*input, 2 * sizeof(T)));
    const bool square = w.kernel_y == w.kernel_x && (pairs || !last);
    if (input == nullptr)
      with_layout(one, one);
    else if (square && w.kernel_y == 3)
      with_layout(std::integral_constant<int, 3>(), std::integral_constant<int, 2>());
    else if (square && w.kernel_y == 5)
      with_layout(std::integral_constant<int, 5>(), std::integral_constant<int, 2>());
    else
      with_layout(any, one);
  });
}

}  // namespace

void depthwise_weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input,
                               const DepthwiseDomain& domain, const Window& window) {
  gradient(grad_weight, grad, &input, domain, window);
}

void bias_gradient(Tensor& grad_bias, const Tensor& grad, const DepthwiseDomain& domain) {
  DepthwiseDomain frames = domain;
  frames.in_policy = nullptr, frames.sources = nullptr, frames.depth = 1;
  gradient(grad_bias, grad, nullptr, frames, {1, 1, 1, 1, 0, 0, 1, 1});
}

void sum_splits(Tensor& to, const Tensor& partial) {
  for_float_type(to, "sum", [&](auto zero) {
    using T = decltype(zero);
    Stream(to).launch(&sum_splits_kernel<T>, ceil_div(to.numel(), kThreads), kThreads, 0, mutable_data<T>(to),
                      data<float>(partial), to.numel(), partial.size(0));
  });
}

}  // namespace adakernels
