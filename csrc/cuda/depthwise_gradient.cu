// Gradients of a depthwise convolution's weight and of a bias: sums over pixels and frames, in a fixed order.
#include <algorithm>
#include <type_traits>

#include "cuda/depthwise.cuh"
#include "cuda/domain.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
constexpr uint32_t kWarp = 32;
// Lines of the output are split so that there are about that many blocks.
constexpr int64_t kBlocks = 1024;
// Taps of a block where the size of the kernel is not known to the compiler.
constexpr int kTapsPerBlock = 8;

struct DepthwiseSums {
  FrameShape out, in;
  Window window;
  int64_t rows, frames;
  uint32_t multiplier;       // C_out / C_in
  const int64_t* policy;     // [N, C_out] | null
  const int64_t* in_policy;  // [N, C_in] | null
  int64_t lines_per_split;   // of rows * H' lines
  uint32_t splits, tap_blocks;
};

// A block has the channels of its lanes, some lines of the output and, with kKernel = 0, some taps. A thread sums over
// pixels: in channels-last over every eighth, else over every 32nd. With kKernel = 1 and no input it is the sum of the
// gradient.
template <typename T, int kChannels, int kKernel, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    depthwise_weight_kernel(float* partial,  // [splits, C_out, taps]
                            const T* grad,   // [N, C_out, H', W']
                            const T* input,  // [N, C_in, H, W] | null
                            DepthwiseSums shape, uint32_t channel_blocks) {
  constexpr int kTaps = kKernel == 0 ? kTapsPerBlock : kKernel * kKernel;
  constexpr uint32_t kChannelLanes = kChannelsLast ? kWarp : kThreads / kWarp, kGroups = kThreads / kChannelLanes;
  const FrameShape &out = shape.out, &in = shape.in;
  const Window& window = shape.window;
  const uint32_t tap_block = blockIdx.x % shape.tap_blocks, channel_block = blockIdx.x / shape.tap_blocks % channel_blocks;
  const int64_t split = blockIdx.x / shape.tap_blocks / channel_blocks;
  const uint32_t channel_lane = kChannelsLast ? threadIdx.x % kWarp : threadIdx.x / kWarp;
  const uint32_t group = kChannelsLast ? threadIdx.x / kWarp : threadIdx.x % kWarp;
  const uint32_t channel = (channel_block * kChannelLanes + channel_lane) * kChannels;
  const uint32_t first_tap = tap_block * kTaps;
  const int taps = window.taps();
  float sums[kTaps][kChannels] = {};

  if (channel < out.channels) {
    const uint32_t in_channel = channel / shape.multiplier;
    const int64_t first_line = split * shape.lines_per_split;
    const int64_t last_line = min(first_line + shape.lines_per_split, shape.rows * out.height);
    for (int64_t line = first_line; line < last_line;) {
      const int64_t row = line / out.height;
      const int64_t end = min(last_line, (row + 1) * out.height);
      bool read[kChannels], any = false;
#pragma unroll
      for (int i = 0; i < kChannels; ++i) {
        read[i] = (shape.policy == nullptr || is_needed(shape.policy, row, shape.frames, out.channels, channel + i)) &&
                  (shape.in_policy == nullptr || is_live(shape.in_policy, row, in.channels, in_channel + i));
        any |= read[i];
      }
      const uint32_t first_y = uint32_t(line - row * out.height), count = uint32_t(end - line) * out.width;
      line = end;
      if (!any) continue;
      const T* grad_frame = grad + row * out.size() + channel * out.channel_step;
      const T* in_frame = input + row * in.size() + in_channel * in.channel_step;
      for (uint32_t pixel = group; pixel < count; pixel += kGroups) {
        const uint32_t out_y = first_y + pixel / out.width, out_x = pixel % out.width;
        const Vector<T, kChannels> values =
            load_vector<kChannels>(grad_frame + (out_y * out.width + out_x) * out.pixel_step);
        float g[kChannels];
#pragma unroll
        for (int i = 0; i < kChannels; ++i) g[i] = read[i] ? static_cast<float>(values.values[i]) : 0.f;
        if constexpr (kKernel == 1) {
#pragma unroll
          for (int i = 0; i < kChannels; ++i) sums[0][i] += g[i];
          continue;
        }
        const int in_y = int(out_y) * window.stride_y - window.padding_y;
        const int in_x = int(out_x) * window.stride_x - window.padding_x;
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
          const int tap = int(first_tap) + i;
          const int y = in_y + (kKernel == 0 ? tap / window.kernel_x : i / kKernel) * window.dilation_y;
          const int x = in_x + (kKernel == 0 ? tap % window.kernel_x : i % kKernel) * window.dilation_x;
          if (y < 0 || y >= int(in.height) || x < 0 || x >= int(in.width) || (kKernel == 0 && tap >= taps)) continue;
          const Vector<T, kChannels> from =
              load_vector<kChannels>(in_frame + (uint32_t(y) * in.width + uint32_t(x)) * in.pixel_step);
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            if (read[c]) sums[i][c] += g[c] * static_cast<float>(from.values[c]);
        }
      }
    }
  }

  float* to = partial + (split * out.channels + channel) * taps + first_tap;
  if constexpr (kChannelsLast) {
    float* shared = reinterpret_cast<float*>(shared_memory());  // [kGroups, kTaps, kWarp]
    for (int i = 0; i < kChannels; ++i) {
      __syncthreads();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) shared[(group * kTaps + tap) * kWarp + channel_lane] = sums[tap][i];
      __syncthreads();
      for (uint32_t tap = group; tap < kTaps; tap += kGroups) {
        float sum = 0.f;
        for (uint32_t g = 0; g < kGroups; ++g) sum += shared[(g * kTaps + tap) * kWarp + channel_lane];
        if (channel < out.channels && int(first_tap + tap) < taps) to[i * taps + tap] = sum;
      }
    }
  } else {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      float sum = sums[tap][0];
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (group == 0 && channel < out.channels && int(first_tap) + tap < taps) to[tap] = sum;
    }
  }
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
void gradient(Tensor& to, const Tensor& grad, const Tensor* input, const std::optional<Tensor>& policy,
              const std::optional<Tensor>& in_policy, int64_t frames, const Window& w) {
  const char* name = "gated_conv2d";
  const FrameShape out = frame_shape(grad, name), in = input == nullptr ? out : frame_shape(*input, name);
  const uint32_t multiplier = in.channels == 0 ? 1 : out.channels / in.channels;
  const bool last = out.channels_last() && in.channels_last();
  const int64_t lines = grad.size(0) * out.height;
  const Stream stream(grad);
  for_float_type(grad, name, [&](auto zero) {
    using T = decltype(zero);
    const auto launch = [&](auto kernel, auto channels, auto channels_last) {
      constexpr int kTaps = kernel() == 0 ? kTapsPerBlock : kernel() * kernel();
      const int64_t lanes = channels_last() ? kWarp : kThreads / kWarp;
      const int64_t channel_blocks = ceil_div(out.channels, lanes * channels()), tap_blocks = ceil_div(w.taps(), kTaps);
      const int64_t wanted = std::clamp<int64_t>(kBlocks / (channel_blocks * tap_blocks), 1, std::max<int64_t>(lines, 1));
      const int64_t lines_per_split = std::max<int64_t>(ceil_div(lines, wanted), 1);
      const int64_t splits = std::max<int64_t>(ceil_div(lines, lines_per_split), 1);
      Tensor partial = torch::stable::new_empty(grad, {splits, int64_t(out.channels), w.taps()}, ScalarType::Float);
      const DepthwiseSums shape{out, in, w, grad.size(0), frames, multiplier,
                                data_or_null<int64_t>(policy),
                                data_or_null<int64_t>(in_policy),
                                lines_per_split, uint32_t(splits), uint32_t(tap_blocks)};
      const int groups = kThreads / int(kWarp);
      stream.launch(&depthwise_weight_kernel<T, channels(), kernel(), channels_last()>,
                    splits * channel_blocks * tap_blocks, kThreads,
                    channels_last() ? groups * kTaps * int(kWarp * sizeof(float)) : 0, mutable_data<float>(partial),
                    data<T>(grad), input == nullptr ? nullptr : data<T>(*input), shape, uint32_t(channel_blocks));
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

void depthwise_weight_gradient(Tensor& grad_weight,                     // [C_out, 1, kh, kw]
                               const Tensor& grad,                      // [N, C_out, H', W']
                               const Tensor& input,                     // [N, C_in, H, W]
                               const std::optional<Tensor>& policy,     // [N, C_out]
                               const std::optional<Tensor>& in_policy,  // [N, C_in]
                               int64_t frames, const Window& window) {
  gradient(grad_weight, grad, &input, policy, in_policy, frames, window);
}

void bias_gradient(Tensor& grad_bias,                    // [C_out]
                   const Tensor& grad,                   // [N, C_out, H', W']
                   const std::optional<Tensor>& policy,  // [N, C_out]
                   int64_t frames) {
  gradient(grad_bias, grad, nullptr, policy, std::nullopt, frames, {1, 1, 1, 1, 0, 0, 1, 1});
}

void sum_splits(Tensor& to, const Tensor& partial) {
  for_float_type(to, "gated_conv2d", [&](auto zero) {
    using T = decltype(zero);
    Stream(to).launch(&sum_splits_kernel<T>, ceil_div(to.numel(), kThreads), kThreads, 0, mutable_data<T>(to),
                      data<float>(partial), to.numel(), partial.size(0));
  });
}

}  // namespace adakernels
