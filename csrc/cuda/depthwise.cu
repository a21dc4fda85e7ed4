// Depthwise convolution for CUDA. Its time is that of reading and writing: a thread computes a tile of outputs, so that
// it reads a number once for many of them, and leaves out the channels that nobody reads or that are known zeros.
#include "cuda/depthwise.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/activation.cuh"
#include "cuda/domain.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
// Temporal taps whose weights of 5x5 and 32 channels are in the shared memory that every block can have.
constexpr int kMostDepth = 15;

struct Depthwise {
  FrameShape target, source;
  Window window;
  uint32_t multiplier;  // C_out / C_in
  DepthwiseDomain domain;
  int activation;
};

// Where the values of kChannels neighbouring channels of a frame go. Every number of the output is written once: what
// is reused by the frame before.
template <int kChannels>
struct Fate {
  bool kept[kChannels], written[kChannels], handed_on[kChannels];
  bool all_written = true, all_handed_on = true;

  __device__ Fate(const DepthwiseDomain& domain, int64_t row, uint32_t channels, uint32_t channel) {
    const int64_t frame = row % domain.frames;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      kept[i] = true;
      written[i] = domain.count == nullptr || int32_t(channel + i) < domain.count[row];
      handed_on[i] = false;
      if (domain.policy != nullptr) {
        const int64_t* own = domain.policy + row * channels + channel + i;
        kept[i] = *own == kKeep;
        written[i] = !(*own == kReuse && frame > 0);
        handed_on[i] = frame + 1 < domain.frames && own[channels] == kReuse;
      }
      all_written &= written[i];
      all_handed_on &= handed_on[i];
    }
  }

  template <typename T>
  __device__ void store(T* own, int64_t frame_size, const Vector<T, kChannels>& values) const {
    Vector<T, kChannels> here;
#pragma unroll
    for (int i = 0; i < kChannels; ++i) here.values[i] = kept[i] ? values.values[i] : static_cast<T>(0.f);
    put(own, here, written, all_written);
    put(own + frame_size, values, handed_on, all_handed_on);
  }

 private:
  template <typename T>
  __device__ static void put(T* to, const Vector<T, kChannels>& values, const bool (&mask)[kChannels], bool all) {
    if (all) {
      store_vector(to, values);
    } else {
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        if (mask[i]) to[i] = values.values[i];
    }
  }
};

// How the threads of a block lie over channels and tiles of outputs, and the size of a tile.
template <bool kChannelsLast, int kStride>
struct Lanes {
  static constexpr int kRows = kStride == 1 ? 4 : 2;
  static constexpr int kColumns = kChannelsLast ? 4 : 1;
  static constexpr int kChannels = kChannelsLast ? 2 : 1;
  static constexpr uint32_t kChannelLanes = kChannelsLast ? 16 : 8;
  static constexpr uint32_t kTileLanes = kThreads / kChannelLanes;
};

// One output per input channel, without dilation. With `gradient` the target is the gradient of an input, and the
// source that of an output: the same convolution with the taps of a frame in the other order.
template <typename T, int kKernel, int kStride, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_kernel(T* target,        // [N, C, H', W']
                     const T* source,  // [N, C, H, W]
                     const T* weight,  // [C, 1, kt, kKernel, kKernel]
                     const T* bias,    // [C] | null
                     Depthwise shape, bool gradient, uint32_t channel_blocks, uint32_t tile_blocks) {
  using Own = Lanes<kChannelsLast, kStride>;
  constexpr int kRows = Own::kRows, kColumns = Own::kColumns, kChannels = Own::kChannels;
  constexpr int kTaps = kKernel * kKernel, kReach = (kColumns - 1) * kStride + kKernel;
  constexpr uint32_t kBlockChannels = Own::kChannelLanes * kChannels;
  const FrameShape &to = shape.target, &from = shape.source;
  const uint32_t tile_block = blockIdx.x % tile_blocks, channel_block = blockIdx.x / tile_blocks % channel_blocks;
  const int64_t row = blockIdx.x / tile_blocks / channel_blocks;
  const uint32_t channel_lane = kChannelsLast ? threadIdx.x % Own::kChannelLanes : threadIdx.x / Own::kTileLanes;
  const uint32_t tile_lane = kChannelsLast ? threadIdx.x / Own::kChannelLanes : threadIdx.x % Own::kTileLanes;
  const uint32_t first_channel = channel_block * kBlockChannels;
  const DepthwiseDomain& domain = shape.domain;
  if (!gradient && domain.count != nullptr && int32_t(first_channel) >= domain.count[row]) return;

  float* weights = reinterpret_cast<float*>(shared_memory());  // [kt, kTaps, kBlockChannels]
  const uint32_t block_channels = min(kBlockChannels, to.channels - first_channel), taps = domain.depth * kTaps;
  for (uint32_t i = threadIdx.x; i < block_channels * taps; i += kThreads) {
    const uint32_t index = i % taps, tap = gradient ? index / kTaps * kTaps + kTaps - 1 - index % kTaps : index;
    weights[tap * kBlockChannels + i / taps] = static_cast<float>(weight[first_channel * taps + i]);
  }
  __syncthreads();

  const uint32_t channel = first_channel + channel_lane * kChannels;
  const uint32_t tiles_x = (to.width + kColumns - 1) / kColumns;
  const uint32_t tile = tile_block * Own::kTileLanes + tile_lane;
  const int out_y = int(tile / tiles_x) * kRows, out_x = int(tile % tiles_x) * kColumns;
  if (channel >= to.channels || out_y >= int(to.height)) return;

  bool read[kChannels], any = false;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    read[i] = is_read(domain, row, to.channels, channel + i, to.channels, channel + i);
    any |= read[i];
  }
  float sums[kRows][kColumns][kChannels] = {};
  const int first_y = out_y * kStride - (gradient ? kKernel - 1 - shape.window.padding_y : shape.window.padding_y);
  const int first_x = out_x * kStride - (gradient ? kKernel - 1 - shape.window.padding_x : shape.window.padding_x);
#pragma unroll 1
  for (int z = 0; z < (any ? domain.depth : 0); ++z) {
    const int64_t source_row = source_of(domain.sources, domain.depth, row, z);
    if (source_row < 0) continue;
    const T* frame = source + from.at(uint32_t(source_row)) + channel * from.step_channel;
    const float* plane = weights + z * kTaps * kBlockChannels + channel_lane * kChannels;
#pragma unroll 1
    for (int r = max(0, -first_y); r < (kRows - 1) * kStride + kKernel; ++r) {
      const int y = first_y + r;
      if (y >= int(from.height)) break;
      const T* line = frame + uint32_t(y) * from.width * from.step_pixel;
      Vector<T, kChannels> values[kReach];
#pragma unroll
      for (int c = 0; c < kReach; ++c) {
        const int x = first_x + c;
        values[c] = x >= 0 && x < int(from.width) ? load_vector<kChannels>(line + uint32_t(x) * from.step_pixel)
                                                  : Vector<T, kChannels>{};
      }
#pragma unroll
      for (int o = 0; o < kRows; ++o) {
        const int ky = r - o * kStride;
        if (ky < 0 || ky >= kKernel) continue;
#pragma unroll
        for (int kx = 0; kx < kKernel; ++kx) {
          const Vector<float, kChannels> w =
              load_vector<kChannels>(plane + (ky * kKernel + kx) * kBlockChannels);
#pragma unroll
          for (int p = 0; p < kColumns; ++p)
#pragma unroll
            for (int i = 0; i < kChannels; ++i)
              sums[o][p][i] += w.values[i] * static_cast<float>(values[p * kStride + kx].values[i]);
        }
      }
    }
  }

  const Fate<kChannels> fate(gradient ? DepthwiseDomain{} : domain, row, to.channels, channel);
  float biases[kChannels];
#pragma unroll
  for (int i = 0; i < kChannels; ++i) biases[i] = bias == nullptr ? 0.f : static_cast<float>(bias[channel + i]);
#pragma unroll
  for (int o = 0; o < kRows; ++o)
#pragma unroll
    for (int p = 0; p < kColumns; ++p) {
      if (out_y + o >= int(to.height) || out_x + p >= int(to.width)) continue;
      Vector<T, kChannels> values;
#pragma unroll
      for (int i = 0; i < kChannels; ++i)
        values.values[i] = static_cast<T>(activated((read[i] ? sums[o][p][i] : 0.f) + biases[i], shape.activation));
      const uint32_t pixel = uint32_t(out_y + o) * to.width + uint32_t(out_x + p);
      fate.store(target + to.at(uint32_t(row)) + channel * to.step_channel + pixel * to.step_pixel, to.step_frame,
                 values);
    }
}

// Any window and any number of outputs per input: a thread computes one number. With kGradient the target is the
// gradient of the input.
template <typename T, bool kGradient>
__global__ void __launch_bounds__(kThreads, 3)
    any_depthwise_kernel(T* target,        // [N, C_out, H', W'] | [N, C_in, H, W]
                         const T* source,  // [N, C_in, H, W] | [N, C_out, H', W']
                         const T* weight,  // [C_out, 1, kt, kh, kw]
                         const T* bias,    // [C_out] | null
                         Depthwise shape, uint32_t blocks_per_row) {
  const FrameShape &to = shape.target, &from = shape.source;
  const Window& window = shape.window;
  const DepthwiseDomain& domain = shape.domain;
  const int64_t row = blockIdx.x / blocks_per_row;
  const uint32_t index = blockIdx.x % blocks_per_row * kThreads + threadIdx.x;
  if (index >= to.size()) return;
  const uint32_t channel = to.channels_last() ? index % to.channels : index / to.pixels();
  const uint32_t pixel = to.channels_last() ? index / to.channels : index % to.pixels();
  const int out_y = int(pixel / to.width), out_x = int(pixel % to.width);
  float sum = 0.f;
  for (uint32_t m = 0; m < (kGradient ? shape.multiplier : 1); ++m) {
    const uint32_t other = kGradient ? channel * shape.multiplier + m : channel / shape.multiplier;
    const uint32_t out_channel = kGradient ? other : channel;
    if (!is_read(domain, row, kGradient ? from.channels : to.channels, out_channel,
                 kGradient ? to.channels : from.channels, kGradient ? channel : other))
      continue;
    for (int tap = 0; tap < domain.depth * window.taps(); ++tap) {
      const int64_t source_row = source_of(domain.sources, domain.depth, row, tap / window.taps());
      if (source_row < 0) continue;
      const int place = tap % window.taps();
      const int tap_y = place / window.kernel_x * window.dilation_y;
      const int tap_x = place % window.kernel_x * window.dilation_x;
      int y, x;
      if constexpr (kGradient) {
        y = out_y + window.padding_y - tap_y, x = out_x + window.padding_x - tap_x;
        if (y < 0 || x < 0 || y % window.stride_y != 0 || x % window.stride_x != 0) continue;
        y /= window.stride_y, x /= window.stride_x;
      } else {
        y = out_y * window.stride_y - window.padding_y + tap_y, x = out_x * window.stride_x - window.padding_x + tap_x;
      }
      if (y < 0 || y >= int(from.height) || x < 0 || x >= int(from.width)) continue;
      const T* frame = source + from.at(uint32_t(source_row)) + other * from.step_channel;
      sum += static_cast<float>(weight[int64_t(out_channel) * domain.depth * window.taps() + tap]) *
             static_cast<float>(frame[(uint32_t(y) * from.width + uint32_t(x)) * from.step_pixel]);
    }
  }
  if (bias != nullptr) sum += static_cast<float>(bias[channel]);
  const Fate<1> fate(kGradient ? DepthwiseDomain{} : domain, row, to.channels, channel);
  fate.store(target + to.at(uint32_t(row)) + channel * to.step_channel + pixel * to.step_pixel, to.step_frame,
             Vector<T, 1>{{static_cast<T>(activated(sum, shape.activation))}});
}

// Calls run(std::integral_constant<int, kernel>(), std::integral_constant<int, stride>()) for the windows that have a
// kernel of their own; whether it did.
template <typename Run>
bool for_window(const Depthwise& shape, bool gradient, const Run& run) {
  const Window& w = shape.window;
  const bool square = w.kernel_y == w.kernel_x && w.stride_y == w.stride_x;
  if (shape.multiplier != 1 || shape.domain.depth > kMostDepth || !square || w.dilation_y != 1 || w.dilation_x != 1)
    return false;
  const auto with = [&](auto kernel) {
    if (w.stride_y == 1) return run(kernel, std::integral_constant<int, 1>()), true;
    if (w.stride_y == 2 && !gradient) return run(kernel, std::integral_constant<int, 2>()), true;
    return false;
  };
  if (w.kernel_y == 3) return with(std::integral_constant<int, 3>());
  if (w.kernel_y == 5) return with(std::integral_constant<int, 5>());
  return false;
}

template <bool kGradient>
void convolve(Tensor& target, const Tensor& source, const Tensor& weight, const std::optional<Tensor>& bias,
              const DepthwiseDomain& domain, uint32_t multiplier, const Window& window, int64_t activation) {
  const char* name = "depthwise convolution";
  if (target.numel() == 0) return;
  const Depthwise shape{frame_shape(target, name), frame_shape(source, name), window, multiplier, domain,
                        int(activation)};
  STD_TORCH_CHECK(weight.is_contiguous() && (!bias || bias->is_contiguous()), name, ": expected contiguous parameters");
  const int64_t rows = shape.target.rows;
  const Stream stream(target);
  for_float_type(target, name, [&](auto zero) {
    using T = decltype(zero);
    const T* of_bias = data_or_null<T>(bias);
    const bool last = shape.target.channels_last() && shape.source.channels_last();
    const bool pairs =
        shape.target.channels % 2 == 0 && is_aligned(target, 2 * sizeof(T)) && is_aligned(source, 2 * sizeof(T));
    const bool specialised = (pairs || !last) && for_window(shape, kGradient, [&](auto kernel, auto stride) {
      const auto launch = [&](auto channels_last) {
        using Own = Lanes<channels_last(), stride()>;
        constexpr int kBlockChannels = Own::kChannelLanes * Own::kChannels;
        const int64_t channel_blocks = ceil_div(shape.target.channels, kBlockChannels);
        const int64_t tiles = ceil_div(shape.target.height, Own::kRows) * ceil_div(shape.target.width, Own::kColumns);
        const int64_t tile_blocks = ceil_div(tiles, Own::kTileLanes);
        stream.launch(&depthwise_kernel<T, kernel(), stride(), channels_last()>, rows * channel_blocks * tile_blocks,
                      kThreads, int(kBlockChannels * domain.depth * kernel() * kernel() * sizeof(float)),
                      mutable_data<T>(target), data<T>(source), data<T>(weight), of_bias, shape, kGradient,
                      uint32_t(channel_blocks), uint32_t(tile_blocks));
      };
      last ? launch(std::true_type()) : launch(std::false_type());
    });
    if (specialised) return;
    const int64_t blocks = ceil_div(shape.target.size(), kThreads);
    stream.launch(&any_depthwise_kernel<T, kGradient>, rows * blocks, kThreads, 0, mutable_data<T>(target),
                  data<T>(source), data<T>(weight), of_bias, shape, uint32_t(blocks));
  });
}

}  // namespace

void depthwise_convolution(Tensor& output, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                           const DepthwiseDomain& domain, const Window& window, int64_t activation) {
  convolve<false>(output, input, weight, bias, domain, uint32_t(output.size(1) / input.size(1)), window, activation);
}

void depthwise_input_gradient(Tensor& grad_input, const Tensor& grad, const Tensor& weight,
                              const DepthwiseDomain& domain, const Window& window) {
  const uint32_t multiplier = uint32_t(grad.size(1) / grad_input.size(1));
  convolve<true>(grad_input, grad, weight, std::nullopt, domain, multiplier, window, 0);
}

}  // namespace adakernels
