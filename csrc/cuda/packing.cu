#include "cuda/packing.cuh"

#include <algorithm>

#include "cuda/frame_shape.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kThreads = 256;

// A tensor itself, or a copy where its taps are not evenly spaced.
Tensor with_even_taps(const Tensor& weight) {
  int64_t step = 0, taps = 1;
  for (int64_t d = weight.dim() - 1; d > 1; --d) {
    if (weight.size(d) == 1) continue;
    if (taps > 1 && weight.stride(d) != step * taps) return torch::stable::contiguous(weight);
    if (taps == 1) step = weight.stride(d);
    taps *= weight.size(d);
  }
  return weight;
}

// From one tap to the next.
int64_t tap_step(const Tensor& weight) {
  for (int64_t d = weight.dim() - 1; d > 1; --d)
    if (weight.size(d) > 1) return weight.stride(d);
  return 0;
}

// A thread has a vector of one pixel. Neighbours in the block are so in the input.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_features_kernel(T* packed,             // [N, pixels, P]
                         const T* input,        // [N, C, pixels]
                         const int32_t* list,   // [N, C] | null
                         const int32_t* count,  // [N] | null
                         FrameShape shape, uint32_t blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const uint32_t channels = shape.channels, pixels = shape.pixels();
  const uint32_t thread = blockIdx.x % blocks_per_row * kThreads + threadIdx.x;
  const uint32_t chunks = (channels + kChunk<T> - 1) / kChunk<T>;
  if (thread >= chunks * pixels) return;
  const bool planar = shape.step_pixel == 1;
  const uint32_t chunk = planar ? thread / pixels : thread % chunks;
  const uint32_t pixel = planar ? thread % pixels : thread / chunks;
  const uint32_t end = count != nullptr ? uint32_t(count[row]) : channels;
  if (chunk * kChunk<T> >= end) return;
  const T* frame = input + shape.at(uint32_t(row));
  Vector<T, kChunk<T>> vector;
#pragma unroll
  for (uint32_t i = 0; i < kChunk<T>; ++i) {
    const uint32_t place = chunk * kChunk<T> + i;
    vector.values[i] = static_cast<T>(0.f);
    if (place >= end) continue;
    const uint32_t channel = list != nullptr ? uint32_t(list[row * channels + place]) : place;
    vector.values[i] = frame[channel * shape.step_channel + pixel * shape.step_pixel];
  }
  store_vector(packed + ((row * pixels + pixel) * chunks + chunk) * kChunk<T>, vector);
}

// A thread has a number of `to`, whose last dimension is filled up with zeros.
template <typename T>
__global__ void __launch_bounds__(kThreads) pack_weight_kernel(T* to,          // [A, B, C']
                                                               const T* from,  // [A, B, C], in any order
                                                               int64_t size, uint32_t middle, uint32_t inner,
                                                               uint32_t inner_end, int64_t step_outer,
                                                               int64_t step_middle, int64_t step_inner) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (thread >= size) return;
  const uint32_t c = uint32_t(thread % inner);
  const int64_t b = thread / inner % middle, a = thread / inner / middle;
  to[thread] = c < inner_end ? from[a * step_outer + b * step_middle + c * step_inner] : static_cast<T>(0.f);
}

}  // namespace

bool is_packed(const Tensor& input) {
  return has_format(input, true) && is_aligned(input) &&
         input.size(1) * int64_t(input.element_size()) % kVectorBytes == 0;
}

Tensor pack_features(const Tensor& input, const int32_t* list, const int32_t* count) {
  const FrameShape shape = frame_shape(input, "convolution");
  const int64_t width = kVectorBytes / int64_t(input.element_size()), chunks = ceil_div(shape.channels, width);
  STD_TORCH_CHECK(chunks * width * shape.pixels() <= INT32_MAX,
                  "convolution: expected at most 2^31 - 1 values per frame");
  Tensor packed = torch::stable::new_empty(input, {int64_t(shape.rows), int64_t(shape.pixels()), chunks * width});
  const int64_t blocks = ceil_div(chunks * shape.pixels(), kThreads);
  const Stream stream(input);
  for_float_type(input, "convolution", [&](auto zero) {
    using T = decltype(zero);
    stream.launch(&pack_features_kernel<T>, blocks * shape.rows, kThreads, 0, mutable_data<T>(packed),
                  data<T>(input), list, count, shape, uint32_t(blocks));
  });
  return packed;
}

Tensor pack_weight(const Tensor& given, WeightOrder order, bool transposed) {
  const Tensor weight = with_even_taps(given);
  const int64_t outputs = weight.size(transposed ? 1 : 0), inputs = weight.size(transposed ? 0 : 1);
  const int64_t taps = weight.numel() / std::max<int64_t>(outputs * inputs, 1);
  const int64_t width = kVectorBytes / int64_t(weight.element_size());
  const bool by_output = order == WeightOrder::by_output;
  const int64_t inner = by_output ? inputs : outputs, filled = ceil_div(inner, width) * width;
  const int64_t step_tap = tap_step(weight);
  const int64_t step_output = weight.stride(transposed ? 1 : 0), step_input = weight.stride(transposed ? 0 : 1);
  if (by_output && step_input == 1 && filled == inner && (taps == 1 || step_tap == inner) &&
      (outputs == 1 || step_output == taps * inner) && is_aligned(weight))
    return weight;
  Tensor packed = torch::stable::new_empty(
      weight, {by_output ? outputs : taps, by_output ? taps : inputs, filled});
  const Stream stream(weight);
  for_float_type(weight, "convolution", [&](auto zero) {
    using T = decltype(zero);
    stream.launch(&pack_weight_kernel<T>, ceil_div(packed.numel(), kThreads), kThreads, 0, mutable_data<T>(packed),
                  data<T>(weight), packed.numel(), uint32_t(packed.size(1)), uint32_t(filled), uint32_t(inner),
                  by_output ? step_output : step_tap, by_output ? step_tap : step_input,
                  by_output ? step_input : step_output);
  });
  return packed;
}

}  // namespace adakernels
