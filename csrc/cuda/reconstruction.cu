// A block makes a patch of all frames of a group: those that the highest level makes from one. First it brings the
// features of the computed ones, with all channels and the border that filters reach into, to shared memory. Then it
// writes every frame of the group from there.
#include "cuda/reconstruction.cuh"

#include <algorithm>
#include <type_traits>

#include "cuda/activation.cuh"
#include "cuda/frame_shape.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 128;

// The part of a frame that a block has. A thread has strips of it: a channel and column of all rows. Neighbours in a
// warp are so in memory.
template <int kSize_, bool kChannelsLast_>
struct Patch {
  static constexpr int kSize = kSize_;
  static constexpr bool kChannelsLast = kChannelsLast_;
  static constexpr int kChannels = kChannelsLast ? 16 : 8, kRows = 8, kColumns = kChannelsLast ? 8 : 16;
  static_assert(kChannels * kColumns == kThreads);
  // With the border.
  static constexpr int kBorder = kSize / 2, kGivenRows = kRows + 2 * kBorder, kGivenColumns = kColumns + 2 * kBorder;
  static constexpr int kGivenStrips = kChannels * kGivenColumns;
  // In shared memory: planes lie so that two halves of a warp meet no bank twice.
  static constexpr int kPlane = (kGivenRows * kGivenColumns + 15) / 32 * 32 + 16;
  static constexpr int kRowStep = kChannelsLast ? kGivenStrips : kGivenColumns;
  static constexpr int kColumnStep = kChannelsLast ? kChannels : 1, kChannelStep = kChannelsLast ? 1 : kPlane;
  static constexpr int kFrame = kChannelsLast ? kGivenRows * kGivenStrips : kChannels * kPlane;

  __device__ static int channel(int strip, int columns) { return kChannelsLast ? strip % kChannels : strip / columns; }
  __device__ static int column(int strip, int columns) { return kChannelsLast ? strip / kChannels : strip % columns; }
};

template <typename T>
struct Task {
  FrameShape shape;           // of all features
  Gates gates;
  const T* temporal_weight;   // [2^(S_t-1) - 1, C, k, k] | null
  const T* channel_weight;    // [C, k, k] | null
  uint32_t group;             // frames
  uint32_t tiles_y, tiles_x, channel_tiles;
  int activation;
};

// What a block has.
struct Part {
  uint32_t clip, frame;  // the first one of the group
  int channel, y, x;

  template <typename T, typename Patch>
  __device__ static Part of(const Task<T>& task, Patch) {
    uint32_t index = blockIdx.x;
    const auto next = [&](uint32_t count) {
      const uint32_t own = index % count;
      index /= count;
      return own;
    };
    const uint32_t groups = (task.shape.frames + task.group - 1) / task.group;
    Part part;
    // Blocks that run together read neighbours in memory.
    if (Patch::kChannelsLast) part.channel = int(next(task.channel_tiles)) * Patch::kChannels;
    part.x = int(next(task.tiles_x)) * Patch::kColumns;
    part.y = int(next(task.tiles_y)) * Patch::kRows;
    if (!Patch::kChannelsLast) part.channel = int(next(task.channel_tiles)) * Patch::kChannels;
    part.frame = next(groups) * task.group;
    part.clip = index;
    return part;
  }
};

// Adds a strip filtered by [kSize, kSize] taps, with kFlipped in the other order. read(row, column) has the strip's own
// values at [kSize / 2, kSize / 2].
template <int kSize, bool kFlipped, int kRows, typename T, typename Read>
__device__ __forceinline__ void add_filtered(float (&sums)[kRows], const T* filter, float weight, const Read& read) {
  float taps[kSize * kSize];
#pragma unroll
  for (int i = 0; i < kSize * kSize; ++i)
    taps[i] = weight * static_cast<float>(filter[kFlipped ? kSize * kSize - 1 - i : i]);
#pragma unroll
  for (int row = 0; row < kRows + kSize - 1; ++row) {
    float values[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) values[i] = read(row, i);
#pragma unroll
    for (int y = 0; y < kSize; ++y) {
      if (row - y < 0 || row - y >= kRows) continue;
#pragma unroll
      for (int i = 0; i < kSize; ++i) sums[row - y] += taps[y * kSize + i] * values[i];
    }
  }
}

// Reads a frame's channel around a strip whose first value is at (y, x); zeros outside.
template <typename T, int kBorder>
struct PlaneReader {
  const T* plane;
  const FrameShape& shape;
  int y, x;

  __device__ float operator()(int row, int column) const {
    const int at_y = y + row - kBorder, at_x = x + column - kBorder;
    if (at_y < 0 || at_y >= int(shape.height) || at_x < 0 || at_x >= int(shape.width)) return 0.f;
    return static_cast<float>(plane[(uint32_t(at_y) * shape.width + uint32_t(at_x)) * shape.step_pixel]);
  }
};

// The channels' sum: what the live channel levels make of one frame. Only those computed are read.
template <int kSize, typename T, int kRows>
__device__ __forceinline__ void add_channels(float (&sums)[kRows], const Task<T>& task, const T* frame, uint32_t clip,
                                             uint32_t channel, int y, int x) {
  constexpr int kBorder = kSize / 2;
  for (int level = 0; level < task.gates.channel.levels; ++level) {
    const float weight = task.gates.channel.weight(clip, level);
    if (!(weight > 0.f)) continue;
    const uint32_t given = computed_channels(task.shape.channels, level);
    const PlaneReader<T, kBorder> read{frame + channel % given * task.shape.step_channel, task.shape, y, x};
    if (channel < given) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) sums[row] += weight * read(row + kBorder, kBorder);
    } else {
      add_filtered<kSize, false>(sums, task.channel_weight + channel * kSize * kSize, weight, read);
    }
  }
}

template <typename T, int kRows>
__device__ __forceinline__ void store_strip(T* plane, const FrameShape& shape, const float (&values)[kRows], int y,
                                            int x, int activation) {
#pragma unroll
  for (int row = 0; row < kRows; ++row)
    if (y + row < int(shape.height) && x < int(shape.width))
      plane[(uint32_t(y + row) * shape.width + uint32_t(x)) * shape.step_pixel] =
          static_cast<T>(activated(values[row], activation));
}

template <typename T, typename Patch>
__global__ void __launch_bounds__(kThreads, 3) reconstruction_kernel(T* output,          // [B, C, T, H, W]
                                                                     const T* computed,  // [B, C, T, H, W]
                                                                     Task<T> task) {
  constexpr int kSize = Patch::kSize, kBorder = Patch::kBorder;
  float* features = reinterpret_cast<float*>(shared_memory());  // by computed frame of the group, as the patch says
  const FrameShape& shape = task.shape;
  const Gate& gate = task.gates.temporal;
  const Part part = Part::of(task, Patch());
  const uint32_t first = part.clip * shape.frames + part.frame, end = min(task.group, shape.frames - part.frame);
  // Of frames that are computed; past the group where none is.
  const uint32_t step = 1u << gate.lowest(part.clip);
  for (uint32_t t = 0; t < end && step <= task.group; t += step) {
    const T* frame = computed + shape.at(first + t);
    for (int strip = int(threadIdx.x); strip < Patch::kGivenStrips; strip += kThreads) {
      const int own_channel = Patch::channel(strip, Patch::kGivenColumns);
      const int column = Patch::column(strip, Patch::kGivenColumns);
      const int channel = part.channel + own_channel, y = part.y - kBorder, x = part.x + column - kBorder;
      float sums[Patch::kGivenRows] = {};
      if (channel < int(shape.channels) && x >= 0 && x < int(shape.width))
        add_channels<kSize>(sums, task, frame, part.clip, uint32_t(channel), y, x);
      float* to = features + t / step * Patch::kFrame + own_channel * Patch::kChannelStep + column * Patch::kColumnStep;
#pragma unroll
      for (int row = 0; row < Patch::kGivenRows; ++row)
        to[row * Patch::kRowStep] = y + row >= 0 && y + row < int(shape.height) ? sums[row] : 0.f;
    }
  }
  __syncthreads();

  const int own_channel = Patch::channel(int(threadIdx.x), Patch::kColumns);
  const int column = Patch::column(int(threadIdx.x), Patch::kColumns);
  const uint32_t channel = uint32_t(part.channel + own_channel);
  if (channel >= shape.channels) return;
  const float* own = features + own_channel * Patch::kChannelStep + column * Patch::kColumnStep;
  for (uint32_t t = 0; t < end; ++t) {
    float sums[Patch::kRows] = {};
    for (int level = 0; level < gate.levels; ++level) {
      const float weight = gate.weight(part.clip, level);
      if (!(weight > 0.f)) continue;
      // How far this frame is from the one that it is made from.
      const uint32_t distance = t % (1u << level);
      const float* from = own + (t - distance) / step * Patch::kFrame;
      if (distance == 0) {
#pragma unroll
        for (int row = 0; row < Patch::kRows; ++row)
          sums[row] += weight * from[(row + kBorder) * Patch::kRowStep + kBorder * Patch::kColumnStep];
      } else {
        const T* filter = task.temporal_weight + (int64_t(distance - 1) * shape.channels + channel) * kSize * kSize;
        add_filtered<kSize, false>(sums, filter, weight, [&](int row, int i) {
          return from[row * Patch::kRowStep + i * Patch::kColumnStep];
        });
      }
    }
    store_strip(output + shape.at(first + t) + channel * shape.step_channel, shape, sums, part.y, part.x + column,
                task.activation);
  }
}

// One of the steps alone: all channels of a computed frame, or what the gradients of all frames, or of all channels,
// give back to those that they are made from.
enum class Step { channels, frames_gradient, channels_gradient };

// A group is one frame here, of which nothing is written unless it is computed.
template <typename T, typename Patch, Step kStep>
__global__ void __launch_bounds__(kThreads, 3) one_step_kernel(T* target,        // [B, C, T, H, W]
                                                               const T* source,  // [B, C, T, H, W]
                                                               Task<T> task) {
  constexpr int kSize = Patch::kSize, kBorder = Patch::kBorder;
  const FrameShape& shape = task.shape;
  const Part part = Part::of(task, Patch());
  const int32_t lowest = task.gates.temporal.lowest(part.clip);
  if (lowest == task.gates.temporal.levels || part.frame % (1u << lowest) != 0) return;
  const uint32_t channel = uint32_t(part.channel + Patch::channel(int(threadIdx.x), Patch::kColumns));
  const int x = part.x + Patch::column(int(threadIdx.x), Patch::kColumns);
  if (channel >= shape.channels || x >= int(shape.width)) return;
  const uint32_t row = part.clip * shape.frames + part.frame;
  float sums[Patch::kRows] = {};
  if constexpr (kStep == Step::channels) {
    add_channels<kSize>(sums, task, source + shape.at(row), part.clip, channel, part.y, x);
  } else {
    const Gate& gate = kStep == Step::frames_gradient ? task.gates.temporal : task.gates.channel;
    for (int level = 0; level < gate.levels; ++level) {
      const float weight = gate.weight(part.clip, level);
      if (!(weight > 0.f)) continue;
      const uint32_t given = computed_channels(shape.channels, level);
      // Frames behind this one, or channels so many times `given` behind this one.
      uint32_t made = 0;
      if constexpr (kStep == Step::frames_gradient)
        made = part.frame % (1u << level) == 0 ? min(1u << level, shape.frames - part.frame) : 0;
      else
        made = channel < given ? (shape.channels - channel + given - 1) / given : 0;
      for (uint32_t i = 0; i < made; ++i) {
        const uint32_t other = kStep == Step::frames_gradient ? channel : channel + i * given;
        const uint32_t from = kStep == Step::frames_gradient ? row + i : row;
        const PlaneReader<T, kBorder> read{source + shape.at(from) + other * shape.step_channel, shape, part.y, x};
        if (i == 0) {
#pragma unroll
          for (int r = 0; r < Patch::kRows; ++r) sums[r] += weight * read(r + kBorder, kBorder);
        } else {
          const T* filter = kStep == Step::frames_gradient
                                ? task.temporal_weight + (int64_t(i - 1) * shape.channels + channel) * kSize * kSize
                                : task.channel_weight + other * kSize * kSize;
          add_filtered<kSize, true>(sums, filter, weight, read);
        }
      }
    }
  }
  store_strip(target + shape.at(row) + channel * shape.step_channel, shape, sums, part.y, x, 0);
}

// Calls run(T(), Patch()) with those of the features and the filters.
template <typename Run>
void for_patch(const Reconstruction& made, const Tensor& features, const Run& run) {
  const bool last = is_channels_last(features, "dynamic_conv3d", 5);
  for_float_type(features, "dynamic_conv3d", [&](auto zero) {
    const auto with_size = [&](auto size) {
      last ? run(zero, Patch<size(), true>()) : run(zero, Patch<size(), false>());
    };
    made.size() == 3 ? with_size(std::integral_constant<int, 3>()) : with_size(std::integral_constant<int, 1>());
  });
}

template <typename T, typename Patch>
Task<T> task_of(const Reconstruction& made, const Tensor& features, uint32_t group, int64_t activation, Patch) {
  const FrameShape shape = frame_shape(features, "dynamic_conv3d");
  return {shape,
          made.gates(features),
          data_or_null<T>(made.temporal_weight),
          data_or_null<T>(made.channel_weight),
          group,
          uint32_t(ceil_div(shape.height, Patch::kRows)),
          uint32_t(ceil_div(shape.width, Patch::kColumns)),
          uint32_t(ceil_div(shape.channels, Patch::kChannels)),
          int(activation)};
}

template <typename T>
int64_t blocks(const Task<T>& task) {
  const int64_t groups = task.shape.rows / task.shape.frames * ceil_div(task.shape.frames, task.group);
  return groups * task.tiles_y * task.tiles_x * task.channel_tiles;
}

template <Step kStep>
Tensor one_step(const Reconstruction& made, const Tensor& source) {
  Tensor target = torch::stable::empty_like(source);
  if (target.numel() == 0) return target;
  for_patch(made, source, [&](auto zero, auto patch) {
    using T = decltype(zero);
    const Task<T> task = task_of<T>(made, source, 1, 0, patch);
    Stream(source).launch(&one_step_kernel<T, decltype(patch), kStep>, blocks(task), kThreads, 0,
                          mutable_data<T>(target), data<T>(source), task);
  });
  return target;
}

}  // namespace

Reconstruction::Reconstruction(const Tensor& features, const std::optional<Tensor>& gate_of_frames,
                               const std::optional<Tensor>& gate_of_channels,
                               const std::optional<Tensor>& weight_of_frames,
                               const std::optional<Tensor>& weight_of_channels)
    : temporal_gate(gate_of_frames), channel_gate(gate_of_channels) {
  const char* op = "dynamic_conv3d";
  STD_TORCH_CHECK(features.dim() == 5, op, ": expected features [B, C, T, H, W]");
  const int64_t channels = features.size(1);
  const auto levels = [&](const std::optional<Tensor>& gate) {
    const int64_t count = gate_of(gate, features.size(0), op).levels;
    STD_TORCH_CHECK(count >= 1 && count <= 3, op, ": expected 1 to 3 levels, got ", count);
    return count;
  };
  const auto check = [&](const Tensor& filters, int64_t rank) {
    const int64_t k = filters.size(rank - 1);
    STD_TORCH_CHECK(filters.dim() == rank && filters.scalar_type() == features.scalar_type() &&
                        filters.size(rank - 3) == channels && filters.size(rank - 2) == k && (k == 1 || k == 3),
                    op, ": expected filters [..., C, k, k] of the input's dtype, k = 1 or 3");
  };
  const int64_t made_frames = (int64_t(1) << (levels(temporal_gate) - 1)) - 1;
  const bool made_channels = levels(channel_gate) > 1;
  if (weight_of_frames && temporal_gate) {
    check(*weight_of_frames, 4);
    STD_TORCH_CHECK(weight_of_frames->size(0) == made_frames, op, ": expected temporal_weight for ", made_frames,
                    " frames");
    temporal_weight = torch::stable::contiguous(*weight_of_frames);
  }
  if (weight_of_channels && channel_gate) {
    check(*weight_of_channels, 3);
    channel_weight = torch::stable::contiguous(*weight_of_channels);
  }
  STD_TORCH_CHECK((temporal_weight || made_frames == 0) && (channel_weight || !made_channels), op,
                  ": expected filters for more than one level");
  STD_TORCH_CHECK(!temporal_weight || !channel_weight || temporal_weight->size(3) == channel_weight->size(2), op,
                  ": expected filters of one size");
}

Gates Reconstruction::gates(const Tensor& features) const {
  const int64_t clips = features.size(0);
  return {gate_of(temporal_gate, clips, "dynamic_conv3d"), gate_of(channel_gate, clips, "dynamic_conv3d")};
}

int Reconstruction::size() const {
  if (temporal_weight) return int(temporal_weight->size(3));
  return channel_weight ? int(channel_weight->size(2)) : 1;
}

Tensor Reconstruction::output(const Tensor& computed, int64_t activation) const {
  Tensor output = torch::stable::empty_like(computed);
  if (output.numel() == 0) return output;
  for_patch(*this, computed, [&](auto zero, auto patch) {
    using T = decltype(zero);
    using Patch = decltype(patch);
    const uint32_t group = 1u << (gates(computed).temporal.levels - 1);
    const Task<T> task = task_of<T>(*this, computed, group, activation, patch);
    Stream(computed).launch(&reconstruction_kernel<T, Patch>, blocks(task), kThreads,
                            int(group) * Patch::kFrame * int(sizeof(float)), mutable_data<T>(output), data<T>(computed),
                            task);
  });
  return output;
}

Tensor Reconstruction::features(const Tensor& computed) const {
  return channel_gate ? one_step<Step::channels>(*this, computed) : computed;
}

Tensor Reconstruction::feature_gradient(const Tensor& grad) const {
  return temporal_gate ? one_step<Step::frames_gradient>(*this, grad) : grad;
}

Tensor Reconstruction::computed_gradient(const Tensor& grad) const {
  return channel_gate ? one_step<Step::channels_gradient>(*this, grad) : grad;
}

}  // namespace adakernels
