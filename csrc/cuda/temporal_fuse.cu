// temporal_fuse for CUDA: every plane is a weighted sum of its frame's and a neighbouring frame's plane.
#include "cuda/temporal_fuse.cuh"

#include <algorithm>
#include <tuple>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensors.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kPixelsPerThread = 4;
// A dot product of two planes is split so that enough blocks exist however few planes there are.
constexpr int64_t kPixelsPerSplit = 2048;

struct Clip {
  int64_t rows;       // N
  int64_t frames;     // T
  uint32_t channels;  // C
  uint32_t pixels;    // H * W
};

enum class Which { keep = 0, reuse = 1 };

// Weight of the frame itself or of its neighbour, from a policy of either form. policy: [N, C] int64 | [N, C, 3] T
template <typename T, bool kSoft>
__device__ float weight(const void* policy, int64_t plane, Which which) {
  if constexpr (kSoft)
    return static_cast<float>(static_cast<const T*>(policy)[3 * plane + int(which)]);
  else
    return static_cast<const int64_t*>(policy)[plane] == int(which) ? 1.f : 0.f;
}

// to[i] += weights[i] * from[i], where nothing is read that only zeros belong to.
template <typename T, int kVector>
__device__ void add_weighted(float (&to)[kVector], const float (&weights)[kVector], const T* from) {
  bool any = false;
#pragma unroll
  for (int i = 0; i < kVector; ++i) any |= weights[i] != 0.f;
  if (!any) return;
  const Vector<T, kVector> vector = load_vector<kVector>(from);
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    if (weights[i] != 0.f) to[i] += weights[i] * static_cast<float>(vector.values[i]);
}

// The mixing (neighbour -1) and its gradient (neighbour +1, where the weight is the next frame's).
// A thread has kVector values of one frame, in channels-last at each of kPixelsPerThread pixels.
template <typename T, int kVector, bool kSoft, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    mix_kernel(T* target,           // [N, C, H, W]
               const T* source,     // [N, C, H, W]
               const void* policy,  // [N, C] | [N, C, 3]
               Clip clip, int neighbour, uint32_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row, frame = row % clip.frames;
  const uint32_t thread = blockIdx.x % blocks_per_row * kThreads + threadIdx.x;
  const uint32_t row_size = clip.channels * clip.pixels;
  uint32_t offset, channel, pixel = 0;
  if constexpr (kChannelsLast) {
    const uint32_t vectors = clip.channels / kVector;
    channel = thread % vectors * kVector;
    pixel = thread / vectors * kPixelsPerThread;
    if (pixel >= clip.pixels) return;
    offset = pixel * clip.channels + channel;
  } else {
    offset = thread * kVector;
    if (offset >= row_size) return;
    channel = offset / clip.pixels;
    pixel = offset % clip.pixels;
  }

  const bool has_neighbour = frame + neighbour >= 0 && frame + neighbour < clip.frames;
  const int64_t weights_row = neighbour < 0 ? row : row + 1;
  float keep[kVector], reuse[kVector];
  const auto set_weights = [&](int i, uint32_t c) {
    keep[i] = weight<T, kSoft>(policy, row * clip.channels + c, Which::keep);
    reuse[i] = has_neighbour ? weight<T, kSoft>(policy, weights_row * clip.channels + c, Which::reuse) : 0.f;
  };
  // Most vectors of contiguous frames are of one channel.
  if (!kChannelsLast && pixel + kVector <= clip.pixels) {
    set_weights(0, channel);
#pragma unroll
    for (int i = 1; i < kVector; ++i) keep[i] = keep[0], reuse[i] = reuse[0];
  } else {
    uint32_t c = channel, p = pixel;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      set_weights(i, c);
      if (kChannelsLast || ++p == clip.pixels) ++c, p = 0;
    }
  }

  const int count = kChannelsLast ? min(kPixelsPerThread, int(clip.pixels - pixel)) : 1;
#pragma unroll
  for (int step = 0; step < (kChannelsLast ? kPixelsPerThread : 1); ++step) {
    if (step == count) break;
    const int64_t at = row * row_size + offset + step * clip.channels;
    float sum[kVector] = {};
    add_weighted(sum, keep, source + at);
    add_weighted(sum, reuse, source + (at + int64_t(neighbour) * row_size));
    Vector<T, kVector> mixed;
#pragma unroll
    for (int i = 0; i < kVector; ++i) mixed.values[i] = static_cast<T>(sum[i]);
    store_vector(target + at, mixed);
  }
}

// sums[0] += gradient . the frame's features, sums[1] += gradient . the previous frame's, if it has one.
template <int kVector, typename T>
__device__ void add_products(float (&sums)[2][kVector], const T* gradient, const T* features, int64_t row_size,
                             bool has_previous) {
  const Vector<T, kVector> g = load_vector<kVector>(gradient), x = load_vector<kVector>(features);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[0][i] += static_cast<float>(g.values[i]) * static_cast<float>(x.values[i]);
  if (!has_previous) return;
  const Vector<T, kVector> h = load_vector<kVector>(features - row_size);
#pragma unroll
  for (int i = 0; i < kVector; ++i) sums[1][i] += static_cast<float>(g.values[i]) * static_cast<float>(h.values[i]);
}

// Dot products of contiguous planes: a warp has one plane in one split.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    dot_planar_kernel(float* partial,     // [splits, N, C, 2]
                      const T* gradient,  // [N, C, H, W]
                      const T* input,     // [N, C, H, W]
                      Clip clip, int64_t splits) {
  const int64_t planes = clip.rows * clip.channels;
  const int64_t task = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (task >= planes * splits) return;
  const int64_t plane = task % planes, split = task / planes, row_size = int64_t(clip.channels) * clip.pixels;
  const bool has_previous = plane / clip.channels % clip.frames != 0;
  const int64_t end = min((split + 1) * kPixelsPerSplit, int64_t(clip.pixels));
  const uint32_t lane = threadIdx.x % kWarp;
  float sums[2][kVector] = {};
  for (int64_t pixel = split * kPixelsPerSplit + lane * kVector; pixel < end; pixel += kWarp * kVector) {
    const int64_t at = plane * clip.pixels + pixel;
    add_products(sums, gradient + at, input + at, row_size, has_previous);
  }
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += sums[which][i];
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) partial[2 * task + which] = sum;
  }
}

// Dot products of channels-last planes: a block has lanes * kVector channels of one row in one split.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    dot_channels_last_kernel(float* partial,     // [splits, N, C, 2]
                             const T* gradient,  // [N, C, H, W]
                             const T* input,     // [N, C, H, W]
                             Clip clip, uint32_t lanes, uint32_t tiles) {
  const int64_t row = blockIdx.x / tiles % clip.rows, split = blockIdx.x / tiles / clip.rows;
  const uint32_t tile = blockIdx.x % tiles, lane = threadIdx.x % lanes, group = threadIdx.x / lanes;
  const uint32_t channel = (tile * lanes + lane) * kVector, groups = kThreads / lanes;
  const int64_t row_size = int64_t(clip.channels) * clip.pixels;
  const int64_t end = min((split + 1) * kPixelsPerSplit, int64_t(clip.pixels));
  float sums[2][kVector] = {};
  if (channel < clip.channels) {
    for (int64_t pixel = split * kPixelsPerSplit + group; pixel < end; pixel += groups) {
      const int64_t at = row * row_size + pixel * clip.channels + channel;
      add_products(sums, gradient + at, input + at, row_size, row % clip.frames != 0);
    }
  }
  // [groups, lanes, kVector, 2]
  float* shared = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int i = 0; i < kVector; ++i)
    for (int which = 0; which < 2; ++which) shared[(threadIdx.x * kVector + i) * 2 + which] = sums[which][i];
  __syncthreads();
  const uint32_t width = lanes * kVector * 2, first = tile * width;
  for (uint32_t i = threadIdx.x; i < width && first + i < 2 * clip.channels; i += kThreads) {
    float sum = 0.f;
    for (uint32_t g = 0; g < groups; ++g) sum += shared[g * width + i];
    partial[(split * clip.rows + row) * clip.channels * 2 + first + i] = sum;
  }
}

// Adds up the splits in their order.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_splits_kernel(T* grad_policy,        // [N, C, 3]
                                                              const float* partial,  // [splits, N, C, 2]
                                                              int64_t planes, int64_t splits) {
  const int64_t plane = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (plane >= planes) return;
  float keep = 0.f, reuse = 0.f;
  for (int64_t split = 0; split < splits; ++split) {
    keep += partial[2 * (split * planes + plane)];
    reuse += partial[2 * (split * planes + plane) + 1];
  }
  grad_policy[3 * plane] = static_cast<T>(keep);
  grad_policy[3 * plane + 1] = static_cast<T>(reuse);
  grad_policy[3 * plane + 2] = static_cast<T>(0.f);
}

Clip clip_of(const Tensor& input, int64_t frames) {
  STD_TORCH_CHECK(frames > 0 && input.size(0) % frames == 0, "temporal_fuse: expected frames to divide N");
  STD_TORCH_CHECK(input.numel() / std::max<int64_t>(input.size(0), 1) <= INT32_MAX,
                  "temporal_fuse: expected at most 2^31 - 1 values per frame");
  return {input.size(0), frames, uint32_t(input.size(1)), uint32_t(input.size(2) * input.size(3))};
}

// Whether it is soft; throws unless it is a contiguous int64 [N, C] or [N, C, 3] of the input's dtype.
bool check_policy(const Tensor& policy, const Tensor& input) {
  const bool soft = policy.dim() == 3;
  STD_TORCH_CHECK((soft || policy.dim() == 2) && policy.is_contiguous() && policy.size(0) == input.size(0) &&
                      policy.size(1) == input.size(1) && (!soft || policy.size(2) == 3) &&
                      policy.scalar_type() == (soft ? input.scalar_type() : ScalarType::Long),
                  "temporal_fuse: expected a contiguous policy, int64 [N, C] or [N, C, 3] of the input's dtype");
  return soft;
}

void mix(Tensor& target, const Tensor& source, const Tensor& policy, const Clip& clip, int neighbour) {
  const bool channels_last = is_channels_last(source, "temporal_fuse"), soft = check_policy(policy, source);
  const Stream stream(source);
  for_float_type(source, "temporal_fuse", [&](auto zero) {
    using T = decltype(zero);
    const int64_t inner = channels_last ? clip.channels : int64_t(clip.channels) * clip.pixels;
    const bool whole = inner % (kVectorBytes / sizeof(T)) == 0 && is_aligned(source) && is_aligned(target);
    for_vector_size<T>(whole, [&](auto width) {
      constexpr int kVector = width;
      const int64_t threads = channels_last ? clip.channels / kVector * ceil_div(clip.pixels, kPixelsPerThread)
                                            : int64_t(clip.channels) * clip.pixels / kVector;
      const int64_t blocks = ceil_div(threads, kThreads);
      const auto launch = [&](auto kernel) {
        stream.launch(kernel, blocks * clip.rows, kThreads, 0, mutable_data<T>(target), data<T>(source),
                      policy.const_data_ptr(), clip, neighbour, uint32_t(blocks));
      };
      if (channels_last)
        soft ? launch(&mix_kernel<T, kVector, true, true>) : launch(&mix_kernel<T, kVector, false, true>);
      else
        soft ? launch(&mix_kernel<T, kVector, true, false>) : launch(&mix_kernel<T, kVector, false, false>);
    });
  });
}

Tensor temporal_fuse(const Tensor& input,   // [N, C, H, W]
                     const Tensor& policy,  // [N, C] | [N, C, 3]
                     int64_t frames) {
  const Clip clip = clip_of(input, frames);
  Tensor output = torch::stable::empty_like(input);
  mix(output, input, policy, clip, -1);
  return output;
}

Tensor policy_gradient(const Tensor& grad_output,  // [N, C, H, W]
                       const Tensor& input,        // [N, C, H, W]
                       const Tensor& policy,       // [N, C, 3]
                       const Clip& clip) {
  STD_TORCH_CHECK(check_policy(policy, input), "temporal_fuse: only a policy of shape [N, C, 3] has a gradient");
  Tensor gradient = torch::stable::empty_like(policy);
  const int64_t planes = clip.rows * clip.channels, splits = ceil_div(clip.pixels, kPixelsPerSplit);
  Tensor partial = torch::stable::new_empty(input, {splits, clip.rows, clip.channels, 2}, ScalarType::Float);
  const bool channels_last = is_channels_last(input, "temporal_fuse");
  const Stream stream(input);
  for_float_type(input, "temporal_fuse", [&](auto zero) {
    using T = decltype(zero);
    const uint32_t inner = channels_last ? clip.channels : clip.pixels;
    const bool whole = inner % (kVectorBytes / sizeof(T)) == 0 && is_aligned(grad_output) && is_aligned(input);
    for_vector_size<T>(whole, [&](auto width) {
      constexpr int kVector = width;
      float* to = mutable_data<float>(partial);
      if (channels_last) {
        uint32_t lanes = 1;
        while (lanes < kWarp && lanes * kVector < clip.channels) lanes *= 2;
        const uint32_t tiles = uint32_t(ceil_div(clip.channels, lanes * kVector));
        stream.launch(&dot_channels_last_kernel<T, kVector>, splits * clip.rows * tiles, kThreads,
                      kThreads * kVector * 2 * int(sizeof(float)), to, data<T>(grad_output), data<T>(input), clip,
                      lanes, tiles);
      } else {
        stream.launch(&dot_planar_kernel<T, kVector>, ceil_div(planes * splits, kThreads / kWarp), kThreads, 0, to,
                      data<T>(grad_output), data<T>(input), clip, splits);
      }
    });
    stream.launch(&sum_splits_kernel<T>, ceil_div(planes, kThreads), kThreads, 0, mutable_data<T>(gradient),
                  data<float>(partial), planes, splits);
  });
  return gradient;
}

std::tuple<Tensor, Tensor> temporal_fuse_backward(const Tensor& grad_output,  // [N, C, H, W]
                                                  const Tensor& input,        // [N, C, H, W]
                                                  const Tensor& policy,       // [N, C] | [N, C, 3]
                                                  int64_t frames, bool want_input, bool want_policy) {
  const Clip clip = clip_of(input, frames);
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type() &&
                      is_channels_last(grad_output, "temporal_fuse") == is_channels_last(input, "temporal_fuse"),
                  "temporal_fuse: expected a gradient of the input's dtype and memory format");
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_output.size(d) == input.size(d), "temporal_fuse: expected a gradient of the input's shape");
  Tensor grad_input =
      want_input ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0});
  if (want_input) mix(grad_input, grad_output, policy, clip, 1);
  return {grad_input,
          want_policy ? policy_gradient(grad_output, input, policy, clip) : torch::stable::new_empty(policy, {0})};
}

}  // namespace

Tensor computed_gradient(const Tensor& grad, const std::optional<Tensor>& policy, int64_t frames) {
  if (!policy) return grad;
  Tensor routed = torch::stable::empty_like(grad);
  mix(routed, grad, *policy, clip_of(grad, frames), 1);
  return routed;
}

ADAKERNELS_CUDA_OPERATORS(m) {
  m.impl("temporal_fuse", TORCH_BOX(&temporal_fuse));
  m.impl("temporal_fuse_backward", TORCH_BOX(&temporal_fuse_backward));
}

}  // namespace adakernels
