// Gradients of the gates and filters of a reconstruction: sums over pixels and frames of a gradient times what a branch
// reads for it, by clip, branch, channel and tap. A branch is a channel level, or a temporal level and how far behind
// the given frame it makes one.
#include <algorithm>
#include <type_traits>

#include "cuda/depthwise.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reconstruction.cuh"
#include "cuda/tap_sums.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
// Frames are split so that there are about that many blocks.
constexpr int64_t kBlocks = 1024;

// Of channels, or of frames where there is a distance.
struct Branches {
  bool of_channels;
  Gate gate;
  uint32_t channels;

  __host__ __device__ int count() const { return of_channels ? gate.levels : (1 << gate.levels) - 1; }
  __device__ int level(int branch) const {
    if (of_channels) return branch;
    int level = 0;
    while (branch + 1 >= 2 << level) ++level;
    return level;
  }
  __device__ uint32_t distance(int branch) const {
    return of_channels ? 0 : uint32_t(branch + 1 - (1 << level(branch)));
  }
  // Whether a channel of it is made by a filter, and by which one.
  __device__ bool is_made(int branch, uint32_t channel) const {
    return of_channels ? channel >= computed_channels(channels, branch) : distance(branch) > 0;
  }
  __device__ int64_t filter(int branch, uint32_t channel) const {
    return of_channels ? channel : int64_t(distance(branch) - 1) * channels + channel;
  }
  // Those of a level.
  __device__ int first(int level) const { return of_channels ? level : (1 << level) - 1; }
  __device__ int end(int level) const { return of_channels ? level + 1 : (2 << level) - 1; }
};

struct Sums {
  FrameShape shape;
  Gate temporal;
  Branches branches;
  uint32_t clips, splits, channel_blocks;
};

// A block has the channels of its lanes, a branch and some frames of a clip.
template <typename T, int kKernel, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 3)
    filter_sums_kernel(float* partial,  // [splits, B, branches, C, k * k]
                       const T* grad,   // [B, C, T, H, W]
                       const T* given,  // [B, C, T, H, W]
                       Sums task) {
  using Own = SumLanes<kChannelsLast>;
  constexpr int kTaps = kKernel * kKernel;
  const FrameShape& shape = task.shape;
  const Branches& branches = task.branches;
  uint32_t index = blockIdx.x;
  const uint32_t channel = index % task.channel_blocks * Own::kChannelLanes + Own::channel();
  index /= task.channel_blocks;
  const int branch = int(index % uint32_t(branches.count()));
  const uint32_t unit = index;
  index /= uint32_t(branches.count());
  const uint32_t clip = index % task.clips, split = index / task.clips;
  float sums[kTaps][1] = {}, kept[1][1] = {};

  const int level = branches.level(branch), lowest = task.temporal.lowest(clip);
  const uint32_t distance = branches.distance(branch), step = 1u << (branches.of_channels ? lowest : level);
  const bool live = branches.gate.weight(clip, level) > 0.f && lowest < task.temporal.levels;
  if (live && channel < shape.channels) {
    const uint32_t from = branches.of_channels ? channel % computed_channels(shape.channels, level) : channel;
    const Window window{kKernel, kKernel, 1, 1, kKernel / 2, kKernel / 2, 1, 1};
    constexpr bool kWanted[1] = {true};
    for (uint32_t t = distance + split * step; t < shape.frames; t += task.splits * step) {
      const uint32_t row = clip * shape.frames + t;
      const T* grad_frame = grad + shape.at(row) + channel * shape.step_channel;
      const T* read = given + shape.at(row - distance) + from * shape.step_channel;
      if (branches.is_made(branch, channel))
        add_frame<T, 1, kKernel, kChannelsLast>(sums, grad_frame, read, shape, shape, window, kWanted, 0,
                                                shape.height, 0);
      else
        add_frame<T, 1, 1, kChannelsLast>(kept, grad_frame, read, shape, shape, {1, 1, 1, 1, 0, 0, 1, 1}, kWanted, 0,
                                          shape.height, 0);
    }
  }
  sums[kTaps / 2][0] += kept[0][0];
  store_sums<kTaps, 1, kChannelsLast>(partial + (int64_t(unit) * shape.channels + channel) * kTaps, kTaps, sums,
                                      channel < shape.channels, kTaps);
}

// A block has a level of a clip.
template <typename T>
__global__ void __launch_bounds__(kThreads) gate_gradient_kernel(float* grad_gate,    // [B, levels]
                                                                 const float* sums,   // [B, branches, C, k * k]
                                                                 const T* filters,    // [filters, k * k] | null
                                                                 Branches branches, int taps) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // [kThreads]
  const int level = int(blockIdx.x) % branches.gate.levels;
  const int64_t clip = int(blockIdx.x) / branches.gate.levels;
  const uint32_t size = branches.channels * uint32_t(taps);
  float sum = 0.f;
  for (int branch = branches.first(level); branch < branches.end(level); ++branch) {
    const float* from = sums + (clip * branches.count() + branch) * size;
    for (uint32_t i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t channel = i / uint32_t(taps), tap = i % uint32_t(taps);
      if (branches.is_made(branch, channel))
        sum += from[i] * static_cast<float>(filters[branches.filter(branch, channel) * taps + tap]);
      else if (int(tap) == taps / 2)
        sum += from[i];
    }
  }
  shared[threadIdx.x] = sum;
  for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) grad_gate[blockIdx.x] = shared[0];
}

// A thread has a tap of a filter.
template <typename T>
__global__ void __launch_bounds__(kThreads) filter_gradient_kernel(T* grad_filters,    // [filters, k * k]
                                                                   const float* sums,  // [B, branches, C, k * k]
                                                                   Branches branches, int taps, int64_t clips,
                                                                   int64_t size) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= size) return;
  const int64_t filter = index / taps, tap = index % taps;
  const uint32_t channel = uint32_t(filter % branches.channels);
  float sum = 0.f;
  for (int64_t clip = 0; clip < clips; ++clip)
    for (int branch = 0; branch < branches.count(); ++branch) {
      const float weight = branches.gate.weight(clip, branches.level(branch));
      if (!(weight > 0.f) || !branches.is_made(branch, channel) || branches.filter(branch, channel) != filter) continue;
      sum += weight * sums[((clip * branches.count() + branch) * branches.channels + channel) * taps + tap];
    }
  grad_filters[index] = static_cast<T>(sum);
}

// grad and given: [B, C, T, H, W]
std::tuple<Tensor, Tensor> gradients(const Tensor& grad, const Tensor& given, const Gate& temporal,
                                     const Branches& branches, const Tensor& gate,
                                     const std::optional<Tensor>& filters, int size) {
  const FrameShape shape = frame_shape(given, "dynamic_conv3d");
  const int64_t clips = given.size(0), taps = size * size;
  const bool last = shape.channels_last() && frame_shape(grad, "dynamic_conv3d").channels_last();
  Tensor grad_gate = torch::stable::empty_like(gate);
  Tensor grad_filters =
      filters ? torch::stable::empty_like(*filters) : torch::stable::new_empty(given, {0});
  Tensor sums = torch::stable::new_empty(given, {clips, branches.count(), given.size(1), taps}, ScalarType::Float);
  const Stream stream(given);
  for_float_type(given, "dynamic_conv3d", [&](auto zero) {
    using T = decltype(zero);
    const auto add_up = [&](auto kernel, auto channels_last) {
      using Own = SumLanes<channels_last()>;
      static_assert(Own::kThreads == kThreads);
      const int64_t channel_blocks = ceil_div(shape.channels, Own::kChannelLanes);
      const int64_t blocks = channel_blocks * branches.count() * clips;
      const int64_t splits =
          std::clamp<int64_t>(kBlocks / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(shape.frames, 1));
      Tensor partial = torch::stable::new_empty(given, {splits, sums.numel()}, ScalarType::Float);
      const Sums task{shape, temporal, branches, uint32_t(clips), uint32_t(splits), uint32_t(channel_blocks)};
      stream.launch(&filter_sums_kernel<T, kernel(), channels_last()>, splits * blocks, kThreads,
                    Own::shared_bytes(kernel() * kernel()), mutable_data<float>(partial), data<T>(grad), data<T>(given),
                    task);
      sum_splits(sums, partial);
    };
    const auto with_size = [&](auto kernel) {
      last ? add_up(kernel, std::true_type()) : add_up(kernel, std::false_type());
    };
    size == 3 ? with_size(std::integral_constant<int, 3>()) : with_size(std::integral_constant<int, 1>());
    stream.launch(&gate_gradient_kernel<T>, grad_gate.numel(), kThreads, kThreads * int(sizeof(float)),
                  mutable_data<float>(grad_gate), data<float>(sums), data_or_null<T>(filters), branches, int(taps));
    if (filters)
      stream.launch(&filter_gradient_kernel<T>, ceil_div(grad_filters.numel(), kThreads), kThreads, 0,
                    mutable_data<T>(grad_filters), data<float>(sums), branches, int(taps), clips, grad_filters.numel());
  });
  return {grad_gate, grad_filters};
}

}  // namespace

std::tuple<Tensor, Tensor> Reconstruction::temporal_gradients(const Tensor& grad, const Tensor& computed) const {
  const Gates of = gates(computed);
  return gradients(grad, features(computed), of.temporal, {false, of.temporal, uint32_t(computed.size(1))},
                   *temporal_gate, temporal_weight, size());
}

std::tuple<Tensor, Tensor> Reconstruction::channel_gradients(const Tensor& grad, const Tensor& computed) const {
  const Gates of = gates(computed);
  return gradients(grad, computed, of.temporal, {true, of.channel, uint32_t(computed.size(1))}, *channel_gate,
                   channel_weight, size());
}

}  // namespace adakernels
