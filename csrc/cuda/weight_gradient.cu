// The gradient of a convolution's weight: for every tap a matrix product, whose sums run over pixels and frames.
//
// Both factors are packed, so that a frame has only the channels of its lists. A block has a tap and a range of output
// and one of input channels. The listed ones of a range lie side by side in a frame, but are others in the next frame,
// so a frame's sums are added to those of the range in shared memory. Where nothing is listed, frames run on.
#include "cuda/weight_gradient.cuh"

#include <algorithm>

#include "cuda/domain.cuh"
#include "cuda/launch.cuh"
#include "cuda/packing.cuh"
#include "cuda/precision.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarps * kWarp;
// Channels of a range, and how many of packed ones they can touch, as these are read in whole vectors.
constexpr int kRange = 64, kRowTiles = 5, kColumnTiles = 9;
// Numbers from a pixel to the next in shared memory, so that eight pixels' vectors are in all banks.
constexpr int kStep = 88;
constexpr int kStages = 3;
// Pixels are split so that there are about that many blocks, with no fewer pixels than this.
constexpr int64_t kBlocks = 1024, kPixelsPerSplit = 256;
constexpr int kSumThreads = 256;

// Pixels of a step.
template <typename T>
constexpr int kPixels = 64 / int(sizeof(T));

// One factor of the product: packed features, and of each frame how many listed channels are below each range.
template <typename T>
struct Factor {
  const T* features;      // [N, H * W, P]
  const int32_t* list;    // [N, C] | null
  const int32_t* bounds;  // [N, ranges + 1] | null
  const int32_t* count;   // [N] | null, of the first channels where there is no list
  uint32_t channels, chunks, ranges;

  // Where those of a range begin and end among the listed ones of a frame.
  __device__ uint32_t bound(int64_t row, uint32_t range) const {
    if (bounds != nullptr) return uint32_t(bounds[row * (ranges + 1) + range]);
    return min(range * kRange, count != nullptr ? uint32_t(count[row]) : channels);
  }
  // Whether frames differ.
  __device__ bool varies() const { return list != nullptr || count != nullptr; }
  __device__ uint32_t channel(int64_t row, uint32_t place) const {
    return list != nullptr ? uint32_t(list[row * channels + place]) : place;
  }
};

template <typename T>
struct Task {
  Factor<T> grad, input;
  Window window;
  uint32_t height, width;          // of the input
  uint32_t out_height, out_width;
  int64_t pixels, pixels_per_split;  // N * H' * W'
  Sources sources;                   // [N, kt] | null
  int depth;                         // kt
};

// The channels of a range that a frame has, as places among its listed ones.
struct Section {
  uint32_t begin, end;  // of the range
  uint32_t first_chunk;
  int chunks;

  template <typename T>
  __device__ Section(const Factor<T>& factor, int64_t row, uint32_t range)
      : begin(factor.bound(row, range)), end(factor.bound(row, range + 1)), first_chunk(begin / kChunk<T>),
        chunks(int((end + kChunk<T> - 1) / kChunk<T> - first_chunk)) {}
  __device__ bool empty() const { return begin >= end; }
};

__global__ void __launch_bounds__(kSumThreads) bounds_kernel(int32_t* bounds,       // [N, ranges + 1]
                                                             const int32_t* list,   // [N, C]
                                                             const int32_t* count,  // [N]
                                                             int64_t rows, uint32_t channels, uint32_t ranges) {
  const int64_t index = int64_t(blockIdx.x) * kSumThreads + threadIdx.x;
  if (index >= rows * (ranges + 1)) return;
  const int64_t row = index / (ranges + 1);
  const int32_t first = int32_t(index % (ranges + 1)) * kRange;
  int32_t low = 0, high = count[row];
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (list[row * channels + middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  bounds[index] = low;
}

// Begins to copy the vectors of kPixels pixels of both factors from pixel `first` on; those from `end` on are zeros.
// The input's are of frame `source_row`, or, if that is -1, of the gradient's.
template <typename T>
__device__ __forceinline__ void load(T* stage, const Task<T>& task, const Section& outputs, const Section& inputs,
                                     int tap_y, int tap_x, int64_t first, int64_t end, int64_t source_row) {
  constexpr int kLanes = 8;
  const uint32_t size = task.out_height * task.out_width;
#pragma unroll
  for (int i = 0; i < kPixels<T> * kLanes / kThreads; ++i) {
    const int k = int(threadIdx.x) / kLanes + i * (kThreads / kLanes);
    const int64_t at = first + k;
    const bool inside = at < end;
    const int64_t row = source_row >= 0 ? source_row : at / size;
    const uint32_t pixel = uint32_t(at % size);
    const int y = int(pixel / task.out_width) * task.window.stride_y + tap_y;
    const int x = int(pixel % task.out_width) * task.window.stride_x + tap_x;
    const bool read = inside && y >= 0 && y < int(task.height) && x >= 0 && x < int(task.width);
    const T* grad = task.grad.features + (inside ? (at * task.grad.chunks + outputs.first_chunk) * kChunk<T> : 0);
    const T* input = task.input.features;
    if (read)
      input += (((row * task.height + y) * task.width + x) * task.input.chunks + inputs.first_chunk) * kChunk<T>;
    for (int chunk = int(threadIdx.x) % kLanes; chunk < outputs.chunks; chunk += kLanes)
      copy_async(stage + k * kStep + chunk * kChunk<T>, inside ? grad + chunk * kChunk<T> : grad, inside);
    for (int chunk = int(threadIdx.x) % kLanes; chunk < inputs.chunks; chunk += kLanes)
      copy_async(stage + (kPixels<T> + k) * kStep + chunk * kChunk<T>, read ? input + chunk * kChunk<T> : input, read);
  }
}

// Sums of a thread: of rows lane / 4 and that plus 8 of every 16 outputs, and of two inputs of its warp's eights.
constexpr int kColumnTilesOfWarp = (kColumnTiles + kWarps - 1) / kWarps;
using Sums = float[kRowTiles][kColumnTilesOfWarp][4];

// Adds the products of a step. Tiles past the last one are left out.
template <typename T, bool kExact>
__device__ __forceinline__ void add_products(Sums& sums, const T* grad, const T* input, int rows, int columns) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  if constexpr (sizeof(T) == 2) {
    uint32_t b[kColumnTilesOfWarp][4];
#pragma unroll
    for (int j = 0; j < kColumnTilesOfWarp; ++j)
      if (8 * (warp + j * kWarps) < columns)
        load_matrices<true>(b[j], input + lane * kStep + 8 * (warp + j * kWarps));
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      if (16 * i >= rows) break;
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t a[4];
        load_matrices<true>(a, grad + (16 * k + lane / 16 * 8 + lane % 8) * kStep + 16 * i + lane / 8 % 2 * 8);
#pragma unroll
        for (int j = 0; j < kColumnTilesOfWarp; ++j) {
          const uint32_t pair[2] = {b[j][2 * k], b[j][2 * k + 1]};
          if (8 * (warp + j * kWarps) < columns) multiply_add<T>(sums[i][j], a, pair);
        }
      }
    }
  } else if constexpr (!kExact) {
    const auto number = [](const T* from) { return __float_as_uint(*from); };
#pragma unroll
    for (int k = 0; k < kPixels<T>; k += 8) {
      const T* left = grad + (k + lane % 4) * kStep + lane / 4;
      const T* right = input + (k + lane % 4) * kStep + lane / 4;
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (16 * i >= rows) break;
        const uint32_t a[4] = {number(left + 16 * i), number(left + 16 * i + 8), number(left + 4 * kStep + 16 * i),
                               number(left + 4 * kStep + 16 * i + 8)};
#pragma unroll
        for (int j = 0; j < kColumnTilesOfWarp; ++j) {
          const int column = 8 * (warp + j * kWarps);
          if (column >= columns) break;
          const uint32_t b[2] = {number(right + column), number(right + 4 * kStep + column)};
          multiply_add<T>(sums[i][j], a, b);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < kPixels<T>; ++k) {
      Vector<T, 2> b[kColumnTilesOfWarp];
#pragma unroll
      for (int j = 0; j < kColumnTilesOfWarp; ++j)
        if (8 * (warp + j * kWarps) < columns)
          b[j] = load_vector<2>(input + k * kStep + 8 * (warp + j * kWarps) + 2 * (lane % 4));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        if (16 * i >= rows) break;
        const T* a = grad + k * kStep + 16 * i + lane / 4;
        const T upper = a[0], lower = a[8];
#pragma unroll
        for (int j = 0; j < kColumnTilesOfWarp; ++j) {
          if (8 * (warp + j * kWarps) >= columns) break;
#pragma unroll
          for (int which = 0; which < 2; ++which) {
            sums[i][j][which] += upper * b[j].values[which];
            sums[i][j][2 + which] += lower * b[j].values[which];
          }
        }
      }
    }
  }
}

template <typename T, bool kExact>
__global__ void __launch_bounds__(kThreads, 3)
    weight_gradient_kernel(float* partial,  // [splits, taps, C_out, C_in]
                           Task<T> task) {
  constexpr int kStageSize = 2 * kPixels<T> * kStep;
  T* stages = reinterpret_cast<T*>(shared_memory());                  // [kStages, 2, kPixels, kStep]
  float* total = reinterpret_cast<float*>(stages + kStages * kStageSize);  // [kRange, kRange]
  uint32_t index = blockIdx.x;
  const uint32_t in_range = index % task.input.ranges;
  index /= task.input.ranges;
  const uint32_t out_range = index % task.grad.ranges;
  index /= task.grad.ranges;
  const int taps = task.depth * task.window.taps(), tap = int(index) % taps, split = int(index) / taps;
  const int tap_z = tap / task.window.taps();
  const int tap_y = tap % task.window.taps() / task.window.kernel_x * task.window.dilation_y - task.window.padding_y;
  const int tap_x = tap % task.window.kernel_x * task.window.dilation_x - task.window.padding_x;
  const int64_t size = int64_t(task.out_height) * task.out_width;
  const int64_t end = min(task.pixels, (split + 1) * task.pixels_per_split);
  // Where frames differ, sums are those of one frame after the other.
  const bool apart = task.grad.varies() || task.input.varies() || task.sources != nullptr;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  for (int i = int(threadIdx.x); i < kRange * kRange; i += kThreads) total[i] = 0.f;

  for (int64_t begin = split * task.pixels_per_split; begin < end;) {
    const int64_t row = begin / size, stop = apart ? min(end, (row + 1) * size) : end;
    const int64_t source_row = task.sources != nullptr ? task.sources[row * task.depth + tap_z] : apart ? row : -1;
    const Section outputs(task.grad, row, out_range), inputs(task.input, row, in_range);
    const int64_t first = begin;
    begin = stop;
    if (outputs.empty() || inputs.empty() || (apart && source_row < 0)) continue;
    const int rows = outputs.chunks * kChunk<T>, columns = inputs.chunks * kChunk<T>;
    const int steps = int((stop - first + kPixels<T> - 1) / kPixels<T>);
    Sums sums = {};
    const auto load_step = [&](int step) {
      if (step < steps)
        load(stages + step % kStages * kStageSize, task, outputs, inputs, tap_y, tap_x, first + step * kPixels<T>, stop,
             source_row);
      commit_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) load_step(step);
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      __syncthreads();
      load_step(step + kStages - 1);
      const T* stage = stages + step % kStages * kStageSize;
      add_products<T, kExact>(sums, stage, stage + kPixels<T> * kStep, rows, columns);
    }
    wait_for_copies<0>();
    // The next frame's copies go where these products are read.
    __syncthreads();

#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const uint32_t place = outputs.first_chunk * kChunk<T> + 8 * i + lane / 4;
      if (place < outputs.begin || place >= outputs.end) continue;
      float* to = total + (task.grad.channel(row, place) - out_range * kRange) * kRange;
#pragma unroll
      for (int j = 0; j < 2 * kColumnTilesOfWarp; ++j) {
        const uint32_t other =
            inputs.first_chunk * kChunk<T> + 8 * (warp + j / 2 * kWarps) + 2 * (lane % 4) + j % 2;
        if (other < inputs.begin || other >= inputs.end) continue;
        to[task.input.channel(row, other) - in_range * kRange] += sums[i / 2][j / 2][i % 2 * 2 + j % 2];
      }
    }
  }

  __syncthreads();
  float* to = partial + (int64_t(split) * taps + tap) * task.grad.channels * task.input.channels;
  for (int i = int(threadIdx.x); i < kRange * kRange; i += kThreads) {
    const uint32_t output = out_range * kRange + i / kRange, input = in_range * kRange + i % kRange;
    if (output < task.grad.channels && input < task.input.channels)
      to[int64_t(output) * task.input.channels + input] = total[i];
  }
}

// Adds up the splits in their order.
template <typename T>
__global__ void __launch_bounds__(kSumThreads) sum_weight_kernel(T* grad_weight,        // [C_out, C_in, taps]
                                                                 const float* partial,  // [splits, taps, C_out, C_in]
                                                                 int64_t channels, int taps, int splits) {
  const int64_t index = int64_t(blockIdx.x) * kSumThreads + threadIdx.x, size = channels * taps;
  if (index >= size) return;
  float sum = 0.f;
  for (int split = 0; split < splits; ++split)
    sum += partial[split * size + index % taps * channels + index / taps];
  grad_weight[index] = static_cast<T>(sum);
}

// Of features [N, C, H, W], packed by a list where there is one. `bounds` keeps the memory.
template <typename T>
Factor<T> factor_of(const Tensor& packed, int64_t channels, const int32_t* list, const int32_t* count,
                    std::optional<Tensor>& bounds) {
  const uint32_t ranges = uint32_t(ceil_div(channels, kRange));
  const uint32_t chunks = uint32_t(ceil_div(channels, kChunk<T>));
  Factor<T> factor{data<T>(packed), list, nullptr, count, uint32_t(channels), chunks, ranges};
  if (list == nullptr) return factor;
  const int64_t rows = packed.size(0), threads = rows * (ranges + 1);
  bounds = torch::stable::new_empty(packed, {rows, int64_t(ranges) + 1}, ScalarType::Int);
  Stream(packed).launch(&bounds_kernel, ceil_div(threads, kSumThreads), kSumThreads, 0,
                        mutable_data<int32_t>(*bounds), list, count, rows, uint32_t(channels), ranges);
  factor.bounds = data<int32_t>(*bounds);
  return factor;
}

}  // namespace

void gated_weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input,
                           const std::optional<Tensor>& policy, const std::optional<Tensor>& in_policy, int64_t frames,
                           const Window& window) {
  const DomainLists lists = build_domain(policy, in_policy, frames);
  weight_gradient(grad_weight, grad, input, lists.domain(), nullptr, window);
}

void weight_gradient(Tensor& grad_weight, const Tensor& grad, const Tensor& input, const Domain& domain,
                     Sources sources, const Window& window) {
  const auto pack = [](const Tensor& features, const int32_t* list, const int32_t* count) {
    return list == nullptr && is_packed(features) ? features : pack_features(features, list, count);
  };
  const Tensor packed_grad = pack(grad, domain.outputs, domain.output_count);
  const Tensor packed_input = pack(input, domain.inputs, domain.input_count);
  const int depth = grad_weight.dim() == 5 ? int(grad_weight.size(2)) : 1;
  const Stream stream(grad);
  for_float_type(grad, "weight gradient", [&](auto zero) {
    using T = decltype(zero);
    std::optional<Tensor> grad_bounds, input_bounds;
    const Task<T> task{factor_of<T>(packed_grad, grad.size(1), domain.outputs, domain.output_count, grad_bounds),
                       factor_of<T>(packed_input, input.size(1), domain.inputs, domain.input_count, input_bounds),
                       window,
                       uint32_t(input.size(input.dim() - 2)),
                       uint32_t(input.size(input.dim() - 1)),
                       uint32_t(grad.size(grad.dim() - 2)),
                       uint32_t(grad.size(grad.dim() - 1)),
                       grad.numel() / std::max<int64_t>(grad.size(1), 1),
                       0,
                       sources,
                       depth};
    const int64_t taps = depth * window.taps(), channels = grad.size(1) * input.size(1);
    const int64_t blocks = taps * task.grad.ranges * task.input.ranges;
    const int64_t wanted = std::max<int64_t>(kBlocks / blocks, 1);
    Task<T> split = task;
    split.pixels_per_split = std::max(ceil_div(task.pixels, wanted), kPixelsPerSplit);
    const int64_t splits = std::max<int64_t>(ceil_div(task.pixels, split.pixels_per_split), 1);
    Tensor partial = torch::stable::new_empty(grad, {splits, taps, channels}, ScalarType::Float);
    const int shared_bytes = kStages * 2 * kPixels<T> * kStep * int(sizeof(T)) + kRange * kRange * int(sizeof(float));
    const auto launch = [&](auto kernel) {
      stream.launch(kernel, splits * blocks, kThreads, shared_bytes, mutable_data<float>(partial), split);
    };
    if constexpr (sizeof(T) == 2)
      launch(&weight_gradient_kernel<T, false>);
    else
      launch(multiplies_exactly() ? &weight_gradient_kernel<T, true> : &weight_gradient_kernel<T, false>);
    stream.launch(&sum_weight_kernel<T>, ceil_div(channels * taps, kSumThreads), kSumThreads, 0,
                  mutable_data<T>(grad_weight), data<float>(partial), channels, int(taps), int(splits));
  });
}

}  // namespace adakernels
