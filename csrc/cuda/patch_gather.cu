// patch_gather for CUDA: rows of patches are mixed from four taps with the weights of their patch.
#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
// Rows that a thread computes one below the other, so that it reads each row of taps once.
constexpr int kRows = 4;

// How a row of numbers holds pixels: one number after the other, or `step` numbers of a pixel (channels-last), which
// can be read by vectors or not.
enum class Access { planar, pixels, vectors };

// A frame and a patch as planes of rows of numbers: C planes, or one plane with C numbers per pixel.
struct Geometry {
  int64_t patches, frames;                  // M, N
  uint32_t planes, step;                    // C and 1, or 1 and C
  uint32_t height, width;                   // of the patch
  uint32_t frame_height, frame_width;       // H, W
  __host__ __device__ uint32_t row() const { return width * step; }
  __host__ __device__ uint32_t frame_row() const { return frame_width * step; }
  __host__ __device__ uint32_t patch_size() const { return planes * height * row(); }
  __host__ __device__ uint32_t frame_size() const { return planes * frame_height * frame_row(); }
};

struct Constants {
  const float* origin;         // [M, 2]
  const int64_t* frame_index;  // [M] | null
  const float* mean;           // [C] | null
  const float* std;            // [C] | null
  float unit;                  // what a pixel of 1 is stored as

  __device__ float scale(uint32_t channel) const { return std == nullptr ? 1.f : 1.f / (unit * std[channel]); }
  __device__ float shift(uint32_t channel) const { return mean == nullptr ? 0.f : -mean[channel] / std[channel]; }
  __device__ int64_t frame(int64_t patch, int64_t frames) const {
    return frame_index == nullptr ? patch : min(max(frame_index[patch], int64_t(0)), frames - 1);
  }
};

// Where a patch lies along one dimension: its samples are `fraction` behind the pixels from `first` on.
struct Place {
  uint32_t first;
  float fraction;

  // At the last place the fraction is 0.
  __device__ Place(float origin, uint32_t room) {
    const float inside = origin >= 0.f ? min(origin, float(room)) : 0.f;
    first = min(uint32_t(inside), room);
    fraction = inside - float(first);
  }
  // At the last place the fraction is 1, so that there is a pixel behind every sample.
  __device__ void step_back(uint32_t room) {
    if (room > 0 && first == room) --first, fraction = 1.f;
  }
};

// Whether the patch would stay where it is if its origin moved.
__device__ bool is_stuck(float origin, uint32_t room) { return room == 0 || !(origin >= 0.f && origin <= float(room)); }

__device__ float lerp(float a, float b, float fraction) {
  // What has no weight does not spread, not even NaN.
  return fraction == 0.f ? a : (1.f - fraction) * a + fraction * b;
}

// Taps of kVector numbers of a row and, where has_right, those of the pixels to the right of them.
template <Access kAccess, int kVector, typename T>
__device__ void load_taps(float (&left)[kVector], float (&right)[kVector], const T* at, uint32_t step,
                          bool has_right) {
  if constexpr (kAccess == Access::vectors) {
    const Vector<T, kVector> here = load_vector<kVector>(at), next = load_vector<kVector>(has_right ? at + step : at);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      left[i] = static_cast<float>(here.values[i]);
      right[i] = static_cast<float>(next.values[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) left[i] = static_cast<float>(at[i]);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (kAccess == Access::planar && i + 1 < kVector)
        right[i] = has_right ? left[i + 1] : left[i];
      else
        right[i] = has_right ? static_cast<float>(at[i + step]) : left[i];
    }
  }
}

// The part of a patch that a thread computes: kVector numbers of up to kRows rows of one plane.
struct Task {
  int64_t patch;
  uint32_t plane, row, number;
  bool inside;

  __device__ Task(const Geometry& shape, uint32_t blocks_per_patch, int vector) {
    patch = blockIdx.x / blocks_per_patch;
    const uint32_t vectors = shape.row() / vector, strips = (shape.height + kRows - 1) / kRows;
    const uint32_t thread = blockIdx.x % blocks_per_patch * kThreads + threadIdx.x;
    number = thread % vectors * vector;
    row = thread / vectors % strips * kRows;
    plane = thread / vectors / strips;
    inside = plane < shape.planes;
  }
  __device__ uint32_t channel(const Geometry& shape, int i) const {
    return shape.step == 1 ? plane : (number + i) % shape.step;
  }
};

template <typename T, typename Out, int kVector, Access kAccess>
__global__ void __launch_bounds__(kThreads) gather_kernel(Out* output,     // [M, C, P_h, P_w]
                                                          const T* input,  // [N, C, H, W]
                                                          Constants constants, Geometry shape,
                                                          uint32_t blocks_per_patch) {
  const Task task(shape, blocks_per_patch, kVector);
  if (!task.inside) return;
  const Place y(constants.origin[2 * task.patch], shape.frame_height - shape.height);
  const Place x(constants.origin[2 * task.patch + 1], shape.frame_width - shape.width);
  float scale[kVector], shift[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const uint32_t channel = task.channel(shape, i);
    scale[i] = constants.scale(channel);
    shift[i] = constants.shift(channel);
  }
  const T* from = input + constants.frame(task.patch, shape.frames) * shape.frame_size() +
                  (task.plane * shape.frame_height + y.first + task.row) * shape.frame_row() + x.first * shape.step +
                  task.number;
  Out* to = output + task.patch * shape.patch_size() + (task.plane * shape.height + task.row) * shape.row() +
            task.number;
  const auto mix_row = [&](float(&mixed)[kVector], const T* at) {
    float left[kVector], right[kVector];
    load_taps<kAccess>(left, right, at, shape.step, x.fraction != 0.f);
#pragma unroll
    for (int i = 0; i < kVector; ++i) mixed[i] = lerp(left[i], right[i], x.fraction);
  };
  float upper[kVector], lower[kVector] = {};
  mix_row(upper, from);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (task.row + r == shape.height) break;
    // The row below is the next sample's own, whose weight may be all there is.
    if (y.fraction != 0.f || task.row + r + 1 < shape.height) mix_row(lower, from += shape.frame_row());
    Vector<Out, kVector> values;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      values.values[i] = static_cast<Out>(lerp(upper[i], lower[i], y.fraction) * scale[i] + shift[i]);
      upper[i] = lower[i];
    }
    store_vector(to, values);
    to += shape.row();
  }
}

// Adds up the two sums of all threads of a block, in a fixed order. The result is thread 0's.
__device__ void sum_over_block(float (&sums)[2]) {
  float* shared = reinterpret_cast<float*>(shared_memory());  // [kThreads / kWarp, 2]
#pragma unroll
  for (int which = 0; which < 2; ++which) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2)
      sums[which] += __shfl_xor_sync(~0u, sums[which], distance);
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp * 2 + which] = sums[which];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int which = 0; which < 2; ++which) {
    sums[which] = 0.f;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) sums[which] += shared[2 * warp + which];
  }
}

template <typename T, typename Out, int kVector, Access kAccess>
__global__ void __launch_bounds__(kThreads) grad_origin_kernel(float* partial,   // [M, blocks_per_patch, 2]
                                                               const Out* grad,  // [M, C, P_h, P_w]
                                                               const T* input,   // [N, C, H, W]
                                                               Constants constants, Geometry shape,
                                                               uint32_t blocks_per_patch) {
  const Task task(shape, blocks_per_patch, kVector);
  float sums[2] = {};
  if (task.inside) {
    const uint32_t room_y = shape.frame_height - shape.height, room_x = shape.frame_width - shape.width;
    Place y(constants.origin[2 * task.patch], room_y), x(constants.origin[2 * task.patch + 1], room_x);
    y.step_back(room_y);
    x.step_back(room_x);
    float scale[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) scale[i] = constants.scale(task.channel(shape, i));
    // Where there is no room there is no row below or pixel to the right: the tap itself stands for it.
    const uint32_t down = room_y > 0 ? shape.frame_row() : 0;
    const T* from = input + constants.frame(task.patch, shape.frames) * shape.frame_size() +
                    (task.plane * shape.frame_height + y.first + task.row) * shape.frame_row() +
                    x.first * shape.step + task.number;
    const Out* gradient = grad + task.patch * shape.patch_size() +
                          (task.plane * shape.height + task.row) * shape.row() + task.number;
    float left[kVector], right[kVector], lower_left[kVector], lower_right[kVector];
    load_taps<kAccess>(left, right, from, shape.step, room_x > 0);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (task.row + r == shape.height) break;
      const bool last = task.row + r + 1 == shape.height && down == 0;
      if (!last) from += shape.frame_row();
      load_taps<kAccess>(lower_left, lower_right, from, shape.step, room_x > 0);
      const Vector<Out, kVector> g = load_vector<kVector>(gradient);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float weight = static_cast<float>(g.values[i]) * scale[i];
        const float below_left = down > 0 ? lower_left[i] : left[i], below_right = down > 0 ? lower_right[i] : right[i];
        sums[0] += weight * lerp(below_left - left[i], below_right - right[i], x.fraction);
        sums[1] += weight * lerp(right[i] - left[i], below_right - below_left, y.fraction);
        left[i] = lower_left[i];
        right[i] = lower_right[i];
      }
      gradient += shape.row();
    }
  }
  sum_over_block(sums);
  if (threadIdx.x == 0) {
    partial[2 * int64_t(blockIdx.x)] = sums[0];
    partial[2 * int64_t(blockIdx.x) + 1] = sums[1];
  }
}

// Adds up the blocks of each patch; a block has one patch.
__global__ void __launch_bounds__(kThreads) sum_blocks_kernel(float* gradient,       // [M, 2]
                                                              const float* partial,  // [M, blocks_per_patch, 2]
                                                              Constants constants, Geometry shape,
                                                              uint32_t blocks_per_patch) {
  const int64_t patch = blockIdx.x;
  float sums[2] = {};
  for (uint32_t i = threadIdx.x; i < blocks_per_patch; i += kThreads)
    for (int which = 0; which < 2; ++which) sums[which] += partial[2 * (patch * blocks_per_patch + i) + which];
  sum_over_block(sums);
  if (threadIdx.x != 0) return;
  const float* origin = constants.origin + 2 * patch;
  gradient[2 * patch] = is_stuck(origin[0], shape.frame_height - shape.height) ? 0.f : sums[0];
  gradient[2 * patch + 1] = is_stuck(origin[1], shape.frame_width - shape.width) ? 0.f : sums[1];
}

// to[i] += weight * the gradients at column number + i of a patch's row, where the patch has such a column.
template <int kVector, typename T>
__device__ void add_row(float (&to)[kVector], const T* row, int64_t number, uint32_t length, float weight) {
  if (weight == 0.f) return;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (number + i >= 0 && number + i < length) to[i] += weight * static_cast<float>(row[number + i]);
}

// A thread has kVector numbers of a row of a frame and adds up what its patches give, in the order of the patches.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) grad_input_kernel(T* output,      // [N, C, H, W]
                                                              const T* grad,  // [M, C, P_h, P_w]
                                                              Constants constants, Geometry shape,
                                                              uint32_t blocks_per_frame) {
  const int64_t frame = blockIdx.x / blocks_per_frame;
  const uint32_t vectors = shape.frame_row() / kVector;
  const uint32_t thread = blockIdx.x % blocks_per_frame * kThreads + threadIdx.x;
  const uint32_t number = thread % vectors * kVector, row = thread / vectors % shape.frame_height;
  const uint32_t plane = thread / vectors / shape.frame_height;
  float sums[kVector] = {};

  const auto add_patch = [&](int64_t patch) {
    const Place y(constants.origin[2 * patch], shape.frame_height - shape.height);
    const Place x(constants.origin[2 * patch + 1], shape.frame_width - shape.width);
    const T* from = grad + patch * shape.patch_size() + int64_t(plane) * shape.height * shape.row();
    const int64_t first = int64_t(number) - int64_t(x.first) * shape.step;
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      const int64_t r = int64_t(row) - y.first - below;
      const float weight = below ? y.fraction : 1.f - y.fraction;
      if (r < 0 || r >= shape.height || weight == 0.f) continue;
      add_row(sums, from + r * shape.row(), first, shape.row(), weight * (1.f - x.fraction));
      add_row(sums, from + r * shape.row(), first - shape.step, shape.row(), weight * x.fraction);
    }
  };
  if (constants.frame_index == nullptr) {
    if (plane < shape.planes) add_patch(frame);
  } else {
    // Which of the next kThreads patches are of this frame, a bit for each.
    unsigned* matches = reinterpret_cast<unsigned*>(shared_memory());  // [kThreads / kWarp]
    for (int64_t first = 0; first < shape.patches; first += kThreads) {
      const int64_t mine = first + threadIdx.x;
      const unsigned votes = __ballot_sync(~0u, mine < shape.patches && constants.frame_index[mine] == frame);
      if (threadIdx.x % kWarp == 0) matches[threadIdx.x / kWarp] = votes;
      __syncthreads();
      for (int warp = 0; warp < kThreads / kWarp; ++warp)
        for (unsigned left = matches[warp]; left != 0; left &= left - 1)
          if (plane < shape.planes) add_patch(first + warp * kWarp + __ffs(int(left)) - 1);
      __syncthreads();
    }
  }
  if (plane >= shape.planes) return;
  Vector<T, kVector> values;
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    values.values[i] =
        static_cast<T>(sums[i] * constants.scale(shape.step == 1 ? plane : (number + i) % shape.step));
  store_vector(output + frame * shape.frame_size() + (plane * shape.frame_height + row) * shape.frame_row() + number,
               values);
}

// frames: N, C, H, W
Geometry geometry(int64_t patches, const int64_t (&frames)[4], int64_t height, int64_t width, bool channels_last) {
  STD_TORCH_CHECK(height >= 1 && width >= 1 && height <= frames[2] && width <= frames[3],
                  "patch_gather: expected a size within the frame");
  STD_TORCH_CHECK(frames[1] * frames[2] * frames[3] <= INT32_MAX,
                  "patch_gather: expected at most 2^31 - 1 values per frame");
  const uint32_t channels = uint32_t(frames[1]);
  return {patches,         frames[0],        channels_last ? 1 : channels, channels_last ? channels : 1,
          uint32_t(height), uint32_t(width), uint32_t(frames[2]),          uint32_t(frames[3])};
}

Constants constants_of(const Tensor& origin, const std::optional<Tensor>& frame_index,
                       const std::optional<Tensor>& mean, const std::optional<Tensor>& std, int64_t frames,
                       int64_t channels, bool bytes) {
  STD_TORCH_CHECK(origin.dim() == 2 && origin.size(1) == 2 && origin.scalar_type() == ScalarType::Float &&
                      origin.is_contiguous(),
                  "patch_gather: expected a contiguous float32 origin of shape [M, 2]");
  if (frame_index.has_value()) {
    STD_TORCH_CHECK(frame_index->dim() == 1 && frame_index->size(0) == origin.size(0) &&
                        frame_index->scalar_type() == ScalarType::Long && frame_index->is_contiguous() &&
                        (frames > 0 || origin.size(0) == 0),
                    "patch_gather: expected a contiguous int64 frame_index of shape [M], and a frame");
  } else {
    STD_TORCH_CHECK(origin.size(0) == frames, "patch_gather: expected an origin for each frame, or a frame_index");
  }
  for (const auto* constant : {&mean, &std})
    STD_TORCH_CHECK(!constant->has_value() ||
                        ((*constant)->dim() == 1 && (*constant)->size(0) == channels &&
                         (*constant)->scalar_type() == ScalarType::Float && (*constant)->is_contiguous()),
                    "patch_gather: expected contiguous float32 mean and std of shape [C]");
  STD_TORCH_CHECK(std.has_value() || !mean.has_value(), "patch_gather: expected no mean without std");
  return {data<float>(origin), frame_index.has_value() ? data<int64_t>(*frame_index) : nullptr,
          mean.has_value() ? data<float>(*mean) : nullptr, std.has_value() ? data<float>(*std) : nullptr,
          bytes ? 255.f : 1.f};
}

// Calls run(T(), Out()) with the types of an input's and an output's elements.
template <typename Run>
void for_pixel_type(const Tensor& input, const Run& run) {
  if (input.scalar_type() == ScalarType::Byte) return run(uint8_t(), float());
  for_float_type(input, "patch_gather: input", [&](auto zero) { run(zero, zero); });
}

// Calls run(width, access) with the widest store of a row of `patch` that fits, as integral constants.
template <typename Out, typename Run>
void for_access(const Tensor& patch, const Tensor& frame, const Geometry& shape, const Run& run) {
  constexpr int kVector = kVectorBytes / sizeof(Out);
  using Wide = std::integral_constant<int, kVector>;
  using Narrow = std::integral_constant<int, 1>;
  using Planar = std::integral_constant<Access, Access::planar>;
  using Pixels = std::integral_constant<Access, Access::pixels>;
  using Vectors = std::integral_constant<Access, Access::vectors>;
  const bool wide = shape.row() % kVector == 0 && is_aligned(patch);
  if (shape.step == 1)
    wide ? run(Wide(), Planar()) : run(Narrow(), Planar());
  else if (wide && shape.step % kVector == 0 && is_aligned(frame))
    run(Wide(), Vectors());
  else
    wide ? run(Wide(), Pixels()) : run(Narrow(), Pixels());
}

int64_t blocks_of_patch(const Geometry& shape, int vector) {
  return ceil_div(int64_t(shape.planes) * ceil_div(shape.height, kRows) * (shape.row() / vector), kThreads);
}

Tensor patch_gather(const Tensor& input,   // [N, C, H, W]
                    const Tensor& origin,  // [M, 2]
                    std::vector<int64_t> size,
                    std::optional<Tensor> frame_index,  // [M]
                    std::optional<Tensor> mean,         // [C]
                    std::optional<Tensor> std) {        // [C]
  const bool channels_last = is_channels_last(input, "patch_gather: input");
  const bool bytes = input.scalar_type() == ScalarType::Byte;
  const int64_t frames[4] = {input.size(0), input.size(1), input.size(2), input.size(3)};
  STD_TORCH_CHECK(size.size() == 2, "patch_gather: expected two sizes of a patch");
  const Geometry shape = geometry(origin.size(0), frames, size[0], size[1], channels_last);
  const Constants constants = constants_of(origin, frame_index, mean, std, frames[0], frames[1], bytes);
  Tensor output = empty_in_format(input, {origin.size(0), frames[1], size[0], size[1]},
                                  bytes ? ScalarType::Float : input.scalar_type(), channels_last);
  if (output.numel() == 0) return output;
  const Stream stream(input);
  for_pixel_type(input, [&](auto pixel, auto number) {
    using T = decltype(pixel);
    using Out = decltype(number);
    for_access<Out>(output, input, shape, [&](auto width, auto access) {
      const int64_t blocks = blocks_of_patch(shape, width);
      stream.launch(&gather_kernel<T, Out, width, access>, blocks * shape.patches, kThreads, 0,
                    mutable_data<Out>(output), data<T>(input), constants, shape, uint32_t(blocks));
    });
  });
  return output;
}

Tensor patch_gather_grad_origin(const Tensor& grad,                 // [M, C, P_h, P_w]
                                const Tensor& input,                // [N, C, H, W]
                                const Tensor& origin,               // [M, 2]
                                std::optional<Tensor> frame_index,  // [M]
                                std::optional<Tensor> std) {        // [C]
  const bool channels_last = is_channels_last(input, "patch_gather: input");
  const bool bytes = input.scalar_type() == ScalarType::Byte;
  const int64_t frames[4] = {input.size(0), input.size(1), input.size(2), input.size(3)};
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == origin.size(0) && grad.size(1) == frames[1] &&
                      grad.scalar_type() == (bytes ? ScalarType::Float : input.scalar_type()),
                  "patch_gather: expected a gradient of the output's shape and dtype");
  STD_TORCH_CHECK(has_format(grad, channels_last), "patch_gather: expected a gradient in the input's format");
  const Geometry shape = geometry(origin.size(0), frames, grad.size(2), grad.size(3), channels_last);
  const Constants constants = constants_of(origin, frame_index, std::nullopt, std, frames[0], frames[1], bytes);
  Tensor gradient = torch::stable::new_zeros(origin, {origin.size(0), 2});
  if (grad.numel() == 0) return gradient;
  const Stream stream(input);
  for_pixel_type(input, [&](auto pixel, auto number) {
    using T = decltype(pixel);
    using Out = decltype(number);
    for_access<Out>(grad, input, shape, [&](auto width, auto access) {
      const int64_t blocks = blocks_of_patch(shape, width);
      Tensor partial = torch::stable::new_empty(origin, {shape.patches, blocks, 2});
      constexpr int kSharedBytes = kThreads / kWarp * 2 * int(sizeof(float));
      stream.launch(&grad_origin_kernel<T, Out, width, access>, blocks * shape.patches, kThreads, kSharedBytes,
                    mutable_data<float>(partial), data<Out>(grad), data<T>(input), constants, shape,
                    uint32_t(blocks));
      stream.launch(&sum_blocks_kernel, shape.patches, kThreads, kSharedBytes, mutable_data<float>(gradient),
                    data<float>(partial), constants, shape, uint32_t(blocks));
    });
  });
  return gradient;
}

Tensor patch_gather_grad_input(const Tensor& grad,                 // [M, C, P_h, P_w]
                               const Tensor& origin,               // [M, 2]
                               std::optional<Tensor> frame_index,  // [M]
                               std::optional<Tensor> std,          // [C]
                               std::vector<int64_t> input_shape) {
  const bool channels_last = is_channels_last(grad, "patch_gather: gradient");
  STD_TORCH_CHECK(input_shape.size() == 4, "patch_gather: expected an input of 4 dimensions");
  const int64_t frames[4] = {input_shape[0], input_shape[1], input_shape[2], input_shape[3]};
  STD_TORCH_CHECK(grad.size(0) == origin.size(0) && grad.size(1) == frames[1],
                  "patch_gather: expected a gradient of the output's shape");
  const Geometry shape = geometry(origin.size(0), frames, grad.size(2), grad.size(3), channels_last);
  const Constants constants = constants_of(origin, frame_index, std::nullopt, std, frames[0], frames[1], false);
  Tensor gradient =
      empty_in_format(grad, {frames[0], frames[1], frames[2], frames[3]}, grad.scalar_type(), channels_last);
  if (shape.patches == 0) return torch::stable::zero_(gradient);
  if (gradient.numel() == 0) return gradient;
  const Stream stream(grad);
  for_float_type(grad, "patch_gather: gradient", [&](auto zero) {
    using T = decltype(zero);
    const bool wide = shape.frame_row() % (kVectorBytes / sizeof(T)) == 0 && is_aligned(gradient);
    for_vector_size<T>(wide, [&](auto width) {
      const int64_t threads = int64_t(shape.frame_size()) / width;
      const int64_t blocks = ceil_div(threads, kThreads);
      stream.launch(&grad_input_kernel<T, width>, blocks * shape.frames, kThreads,
                    kThreads / kWarp * int(sizeof(unsigned)), mutable_data<T>(gradient), data<T>(grad), constants,
                    shape, uint32_t(blocks));
    });
  });
  return gradient;
}

}  // namespace

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("patch_gather", TORCH_BOX(&patch_gather));
  m.impl("patch_gather_grad_origin", TORCH_BOX(&patch_gather_grad_origin));
  m.impl("patch_gather_grad_input", TORCH_BOX(&patch_gather_grad_input));
}

}  // namespace adakernels
