#include "cuda/convolution.cuh"

#include <algorithm>
#include <optional>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kWarp = 32, kWarpgroup = 128;
// A row of a tile in shared memory: so many bytes of the sums' numbers, in vectors of 16.
constexpr int kRowBytes = 128, kRowChunks = kRowBytes / kVectorBytes;
// Output channels of a block. Rows of a weight that lies by inputs are as long.
constexpr int kColumns = 64;
constexpr int kWeightBytes = kColumns * kRowBytes;
// Results of a row on their way to memory, so far apart that a warp's pairs fall into all banks.
constexpr int kResultStep = kColumns + 8;

// How much a block does, and how many steps of its sums are on their way. Warps have 16 rows of every 64.
template <int kRows_, int kThreads_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_, kThreads = kThreads_, kStages = kStages_;
  static constexpr int kRowTiles = kRows * kWarpgroup / 64 / kThreads;
  static constexpr int kStageBytes = kRows * kRowBytes + kWeightBytes;
  // Stages, where the results come later, then what is known of rows and of columns.
  static constexpr int kPixelsAt = kStages * kStageBytes;
  static constexpr int kChannelsAt = kPixelsAt + kRows * kVectorBytes;
  static constexpr int kSharedBytes = kChannelsAt + 2 * kColumns * int(sizeof(int32_t));
  static_assert(kRows * kResultStep * int(sizeof(float)) <= kPixelsAt);
};

template <typename T>
struct Task {
  T* output;        // [N', C_out, H', W']
  const T* input;   // [N, H, W, P]
  const T* weight;  // [C_out, taps, I] | [taps, C_in, O]
  const T* bias;    // [C_out] | null
  Domain domain;
  Geometry geometry;
  Frames frames;
  Layout target;
  const int64_t* policy;  // [N', C_out] | null
  int64_t clip_frames;
  int32_t in_channels, in_chunks;  // C_in, P in vectors
  int32_t weight_inner;            // I or O
  int32_t activation;
  uint32_t pixel_tiles, column_tiles;
  // Rows run on from frame to frame where nothing distinguishes those.
  bool merged;
};

// What a block is for: some pixels of a frame, or of that one and those behind it, and some output channels.
struct Part {
  int64_t row;
  int32_t first_pixel, first_column;
  int32_t columns;                   // those to compute; the others are zero
  int32_t in_count, chunks;          // input channels, and vectors of them
  int32_t first_tap, total, steps;   // vectors over all taps from the first one
};

// What is known of a row of the tile: where tap 0 reads, the frame after the part's and the pixel in it, or -1.
struct alignas(kVectorBytes) Pixel {
  int32_t y, x, frame, pixel;
};

template <typename T, typename Tile>
__device__ Part part_of(const Task<T>& task) {
  Part part;
  const uint32_t index = blockIdx.x / task.pixel_tiles;
  const int64_t pixel = int64_t(blockIdx.x % task.pixel_tiles) * Tile::kRows;
  part.first_column = int32_t(index % task.column_tiles) * kColumns;
  part.row = task.merged ? pixel / task.target.pixels : index / task.column_tiles;
  part.first_pixel = int32_t(task.merged ? pixel % task.target.pixels : pixel);
  const Domain& domain = task.domain;
  const int32_t end = domain.output_count != nullptr ? domain.output_count[part.row] : int32_t(task.target.channels);
  part.columns = max(0, min(kColumns, end - part.first_column));
  part.in_count = domain.input_count != nullptr ? domain.input_count[part.row] : task.in_channels;
  part.chunks = (part.in_count + kChunk<T> - 1) / kChunk<T>;
  const Geometry& geometry = task.geometry;
  const int32_t* range = task.frames.taps;
  const int32_t first = range != nullptr ? range[2 * part.row] : 0;
  const int32_t last = range != nullptr ? range[2 * part.row + 1] : geometry.kernel_depth;
  part.first_tap = first * geometry.kernel_height * geometry.kernel_width;
  part.total = (last - first) * geometry.kernel_height * geometry.kernel_width * part.chunks;
  if (part.columns == 0) part.total = 0;
  part.steps = (part.total + kRowChunks - 1) / kRowChunks;
  return part;
}

template <typename T, typename Tile>
__device__ void find_pixels(Pixel* pixels, const Task<T>& task, const Part& part) {
  const Geometry& geometry = task.geometry;
  const int32_t size = int32_t(task.target.pixels);
  for (int row = int(threadIdx.x); row < Tile::kRows; row += Tile::kThreads) {
    const int32_t index = part.first_pixel + row, frame = task.merged ? index / size : 0, pixel = index - frame * size;
    const int32_t y = pixel / geometry.out_width, x = pixel % geometry.out_width;
    // Outside for every tap, were it not for the border.
    Pixel found{INT32_MIN / 2, 0, 0, -1};
    if (task.merged ? part.row + frame < task.target.rows : index < size) {
      found = geometry.transposed ? Pixel{y + geometry.padding_y, x + geometry.padding_x, frame, pixel}
                                  : Pixel{y * geometry.stride_y - geometry.padding_y,
                                          x * geometry.stride_x - geometry.padding_x, frame, pixel};
    }
    pixels[row] = found;
  }
}

// Where vector `chunk` of row `row` of a tile is, so that eight rows' same vector and one row's all are in all banks.
__device__ __forceinline__ int place(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % kRowChunks)) * kVectorBytes);
}

// Goes through taps and vectors of input channels: a thread has the same place of every step.
struct Walk {
  int32_t tap, chunk, index;

  __device__ Walk(const Part& part, int place_in_step) : tap(part.first_tap), chunk(place_in_step), index(place_in_step) {
    carry(part);
  }
  // Whether the tap is another one.
  __device__ bool step(const Part& part) {
    chunk += kRowChunks;
    index += kRowChunks;
    return carry(part);
  }
  __device__ bool inside(const Part& part) const { return index < part.total; }

 private:
  __device__ bool carry(const Part& part) {
    const int32_t before = tap;
    for (; chunk >= part.chunks; chunk -= part.chunks) ++tap;
    return tap != before;
  }
};

// Where a tap reads along one side, or -1.
__device__ __forceinline__ int32_t position(int32_t from, int32_t tap, int32_t stride, int32_t dilation, int32_t size,
                                            bool transposed) {
  int32_t at = transposed ? from - tap * dilation : from + tap * dilation;
  if (transposed && stride > 1) {
    if (at < 0 || at % stride != 0) return -1;
    at /= stride;
  }
  return at < size ? at : -1;
}

// Copies the features of one step: a thread has one vector of every kThreads / 8-th row.
template <typename T, typename Tile>
class FeatureLoader {
 public:
  __device__ FeatureLoader(const Task<T>& task, const Part& part, const Pixel* pixels)
      : task_(task), part_(part), pixels_(pixels), walk_(part, int(threadIdx.x) % kRowChunks) {
    find_tap();
  }

  __device__ void load(unsigned char* to) {
    const bool inside = walk_.inside(part_);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const bool read = inside && offsets_[i] >= 0;
      copy_async(to + place(int(threadIdx.x) / kRowChunks + i * kStride, int(threadIdx.x) % kRowChunks),
                 base_ + (read ? int64_t(offsets_[i] + walk_.chunk) * kChunk<T> : 0), read);
    }
    if (walk_.step(part_)) find_tap();
  }

 private:
  static constexpr int kStride = Tile::kThreads / kRowChunks, kMine = Tile::kRows / kStride;

  __device__ void find_tap() {
    const Geometry& geometry = task_.geometry;
    const int32_t plane = geometry.kernel_height * geometry.kernel_width;
    const int32_t depth = walk_.tap / plane, tap = walk_.tap % plane;
    const int32_t tap_y = tap / geometry.kernel_width, tap_x = tap % geometry.kernel_width;
    const int64_t frame_chunks = int64_t(geometry.in_height) * geometry.in_width * task_.in_chunks;
    const int64_t first = task_.frames.first != nullptr ? task_.frames.first[part_.row] : part_.row;
    base_ = task_.input;
    if (walk_.inside(part_)) base_ += (first + int64_t(depth) * task_.frames.step) * frame_chunks * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Pixel pixel = pixels_[int(threadIdx.x) / kRowChunks + i * kStride];
      const int32_t y = position(pixel.y, tap_y, geometry.stride_y, geometry.dilation_y, geometry.in_height,
                                 geometry.transposed);
      const int32_t x = position(pixel.x, tap_x, geometry.stride_x, geometry.dilation_x, geometry.in_width,
                                 geometry.transposed);
      offsets_[i] = -1;
      if (y >= 0 && x >= 0)
        offsets_[i] = ((pixel.frame * geometry.in_height + y) * geometry.in_width + x) * task_.in_chunks;
    }
  }

  const Task<T>& task_;
  const Part& part_;
  const Pixel* pixels_;
  Walk walk_;
  const T* base_;
  int32_t offsets_[kMine];  // in vectors
};

// Copies the weights of one step, a row for each output channel: whole vectors where the inputs are not listed,
// else number by number.
template <typename T, typename Tile>
class OutputRows {
 public:
  __device__ OutputRows(const Task<T>& task, const Part& part, const int32_t* channels)
      : task_(task), part_(part), channels_(channels), walk_(part, int(threadIdx.x) % kRowChunks) {}

  __device__ void load(unsigned char* to) {
    const Geometry& geometry = task_.geometry;
    const int32_t taps = geometry.kernel_depth * geometry.kernel_height * geometry.kernel_width;
#pragma unroll
    for (int i = 0; i < kColumns / kStride; ++i) {
      const int row = int(threadIdx.x) / kRowChunks + i * kStride;
      const bool inside = walk_.inside(part_) && row < part_.columns;
      const T* from = task_.weight;
      if (inside) from += (int64_t(channels_[row]) * taps + walk_.tap) * task_.weight_inner;
      unsigned char* target = to + place(row, int(threadIdx.x) % kRowChunks);
      if (task_.domain.inputs == nullptr)
        copy_async(target, from + (inside ? walk_.chunk * kChunk<T> : 0), inside);
      else
        gather(reinterpret_cast<T*>(target), from, inside);
    }
    walk_.step(part_);
  }

 private:
  static constexpr int kStride = Tile::kThreads / kRowChunks;

  __device__ void gather(T* to, const T* from, bool inside) {
    const int32_t* list = task_.domain.inputs + part_.row * task_.in_channels;
    Vector<T, kChunk<T>> vector;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const int32_t index = walk_.chunk * kChunk<T> + i;
      const bool read = inside && index < part_.in_count;
      const T* number = from + (read ? list[index] : 0);
      if constexpr (sizeof(T) == 4)
        copy_async<4>(to + i, number, read);
      else
        vector.values[i] = read ? *number : static_cast<T>(0.f);
    }
    if constexpr (sizeof(T) != 4) store_vector(to, vector);
  }

  const Task<T>& task_;
  const Part& part_;
  const int32_t* channels_;  // of the rows
  Walk walk_;
};

// Copies the weights of one step, a row for each input channel of a tap, of outputs that are not listed.
template <typename T, typename Tile>
class InputRows {
 public:
  __device__ InputRows(const Task<T>& task, const Part& part, const int32_t*) : task_(task), part_(part) {}

  __device__ void load(unsigned char* to) {
    const int32_t column = part_.first_column + int(threadIdx.x) % kRowChunks * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kRowChunks * kChunk<T> / kStride; ++i) {
      const int row = int(threadIdx.x) / kRowChunks + i * kStride;
      const int32_t index = first_ + row / kChunk<T>;
      const int32_t tap = part_.first_tap + index / part_.chunks;
      const int32_t channel = index % part_.chunks * kChunk<T> + row % kChunk<T>;
      const bool inside = index < part_.total && channel < part_.in_count && column < task_.weight_inner;
      const T* from = task_.weight;
      if (inside) {
        const int32_t listed = task_.domain.inputs[part_.row * task_.in_channels + channel];
        from += (int64_t(tap) * task_.in_channels + listed) * task_.weight_inner + column;
      }
      copy_async(to + place(row, int(threadIdx.x) % kRowChunks), from, inside);
    }
    first_ += kRowChunks;
  }

 private:
  static constexpr int kStride = Tile::kThreads / kRowChunks;

  const Task<T>& task_;
  const Part& part_;
  int32_t first_ = 0;
};

// The first row of the tile that a warp has in its i-th group of 64.
template <typename Tile>
__device__ __forceinline__ int first_row(int i) {
  const int warp = int(threadIdx.x) / kWarp;
  return (warp / 4 * Tile::kRowTiles + i) * 64 + warp % 4 * 16;
}

// Sums of a thread: of rows lane / 4 and that plus 8 of its groups, and of two columns of every eight.
template <typename Tile>
using Sums = float[Tile::kRowTiles][kColumns / 8][4];

// Adds a step's products by the tensor cores of a warp.
template <typename T, typename Tile, bool kByInput>
__device__ __forceinline__ void add_products(Sums<Tile>& sums, const unsigned char* features,
                                             const unsigned char* weights, int columns) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int k = 0; k < kRowChunks; k += 2) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
      load_matrices(a[i], features + place(first_row<Tile>(i) + lane % 16, k + lane / 16));
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      if (8 * j >= columns) break;
      uint32_t b[4];
      if constexpr (kByInput)
        load_matrices<true>(b, weights + place(k * 8 + lane % 16, j + lane / 16));
      else
        load_matrices(b, weights + place(8 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
      const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        multiply_add<T>(sums[i][j], a[i], left);
        multiply_add<T>(sums[i][j + 1], a[i], right);
      }
    }
  }
}

// Begins a step's products by the tensor cores of a warpgroup.
template <typename T, typename Tile, bool kByInput, int kWidth>
__device__ __forceinline__ void start_products(Sums<Tile>& sums, const unsigned char* features,
                                               const unsigned char* weights) {
  begin_products();
  const int group = int(threadIdx.x) / kWarpgroup * Tile::kRowTiles;
#pragma unroll
  for (int k = 0; k < kRowChunks; k += 2) {
    const Matrix b(weights + (kByInput ? k * 8 * kRowBytes : k * kVectorBytes));
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      const Matrix a(features + (group + i) * 64 * kRowBytes + k * kVectorBytes);
      multiply_add_warpgroup<T, kByInput, kWidth>(sums[i], a, b);
    }
  }
  commit_products();
}

// Adds a step's products of float32 numbers one after the other.
template <typename Tile>
__device__ __forceinline__ void add_exact_products(Sums<Tile>& sums, const unsigned char* features,
                                                   const unsigned char* weights, int columns) {
  const int lane = int(threadIdx.x) % kWarp;
  const auto load = [](const unsigned char* tile, int row, int chunk) {
    return load_vector<4>(reinterpret_cast<const float*>(tile + place(row, chunk)));
  };
#pragma unroll 1
  for (int chunk = 0; chunk < kRowChunks; ++chunk) {
    Vector<float, 4> a[2 * Tile::kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i)
      a[i] = load(features, first_row<Tile>(i / 2) + lane / 4 + i % 2 * 8, chunk);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      if (8 * j >= columns) break;
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        const Vector<float, 4> b = load(weights, 8 * j + 2 * (lane % 4) + which, chunk);
#pragma unroll
        for (int i = 0; i < 2 * Tile::kRowTiles; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i / 2][j][2 * (i % 2) + which] += a[i].values[k] * b.values[k];
      }
    }
  }
}

// Who multiplies: threads exactly, else the tensor cores of a warp or of a warpgroup, which can do half the columns.
enum class Unit { thread, warp, warpgroup, half_warpgroup };

// The sums over all steps. Copies run kStages - 1 steps ahead, products of a warpgroup while the next ones begin.
template <typename T, typename Tile, bool kByInput, Unit kUnit, typename Weights>
__device__ __forceinline__ void accumulate(Sums<Tile>& sums, unsigned char* stages, const Part& part,
                                           FeatureLoader<T, Tile>& features, Weights& weights) {
  constexpr bool kWarpgroups = kUnit == Unit::warpgroup || kUnit == Unit::half_warpgroup;
  const auto load = [&](int step) {
    if (step < part.steps) {
      unsigned char* stage = stages + step % Tile::kStages * Tile::kStageBytes;
      features.load(stage);
      weights.load(stage + Tile::kRows * kRowBytes);
    }
    commit_copies();
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < part.steps; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    const unsigned char* stage = stages + step % Tile::kStages * Tile::kStageBytes;
    const unsigned char* weight_stage = stage + Tile::kRows * kRowBytes;
    if constexpr (kWarpgroups) {
      fence_for_products();
      wait_for_products<0>();
      __syncthreads();
      start_products<T, Tile, kByInput, kUnit == Unit::warpgroup ? 64 : 32>(sums, stage, weight_stage);
      load(step + Tile::kStages - 1);
    } else {
      __syncthreads();
      load(step + Tile::kStages - 1);
      if constexpr (kUnit == Unit::thread)
        add_exact_products<Tile>(sums, stage, weight_stage, part.columns);
      else
        add_products<T, Tile, kByInput>(sums, stage, weight_stage, part.columns);
    }
  }
  if constexpr (kWarpgroups) wait_for_products<0>();
  wait_for_copies<0>();
  __syncthreads();
}

// By the index of the activation: none, relu, relu6, silu. NaN stays NaN.
__device__ __forceinline__ float activate(float value, int32_t activation) {
  if (activation == 3) return value / (1.f + expf(-value));
  if (activation != 0 && value < 0.f) return 0.f;
  return activation == 2 && value > 6.f ? 6.f : value;
}

// What is written of a column: a frame's own plane, with the results or with zeros, and the next frame's.
enum Action : int32_t { kOwn = 1, kResult = 2, kNext = 4 };

// A plane that is reused is left to the frame before, so that every number is written once.
template <typename T>
__device__ int32_t action_of(const Task<T>& task, const Part& part, int column, int32_t channel) {
  const int32_t result = column < part.columns ? kResult : 0;
  if (task.policy == nullptr) return kOwn | result;
  const int64_t* own = task.policy + part.row * task.target.channels + channel;
  const int64_t frame = part.row % task.clip_frames;
  int32_t action = 0;
  if (*own != kReuse || frame == 0) action = kOwn | (*own == kKeep ? kResult : 0);
  if (frame + 1 < task.clip_frames && own[task.target.channels] == kReuse) action |= kNext;
  return action;
}

// Channels of the part's columns, and what becomes of them. The last ones may be none.
template <typename T>
__device__ void find_channels(int32_t* channels, int32_t* actions, const Task<T>& task, const Part& part) {
  if (int(threadIdx.x) >= kColumns) return;
  const int column = int(threadIdx.x), index = part.first_column + column;
  channels[column] = actions[column] = 0;
  if (index >= task.target.channels) return;
  const int32_t* list = task.domain.outputs;
  channels[column] = list != nullptr ? list[part.row * task.target.channels + index] : index;
  actions[column] = action_of(task, part, column, channels[column]);
}

// Brings the sums, with bias and activation, into shared memory. [rows, kResultStep]
template <typename T, typename Tile>
__device__ void put_results(float* results, const Sums<Tile>& sums, const Task<T>& task, const int32_t* channels) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    const int column = 8 * j + 2 * (lane % 4);
    float bias[2] = {};
    if (task.bias != nullptr)
      for (int which = 0; which < 2; ++which) bias[which] = static_cast<float>(task.bias[channels[column + which]]);
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
      Vector<float, 2> pair;
#pragma unroll
      for (int which = 0; which < 2; ++which)
        pair.values[which] = activate(sums[i / 2][j][i % 2 * 2 + which] + bias[which], task.activation);
      store_vector(results + (first_row<Tile>(i / 2) + lane / 4 + i % 2 * 8) * kResultStep + column, pair);
    }
  }
}

// Stores the results as the columns' actions say, side by side in memory by neighbours in the block.
template <typename T, typename Tile>
__device__ void store_results(const Task<T>& task, const Part& part, const float* results, const Pixel* pixels,
                              const int32_t* channels, const int32_t* actions) {
  const Layout& target = task.target;
  T* frame = task.output + part.row / target.frames * target.step_clip + part.row % target.frames * target.step_frame;
  for (int index = int(threadIdx.x); index < Tile::kRows * kColumns; index += Tile::kThreads) {
    const bool planar = target.step_pixel == 1;
    const int row = planar ? index % Tile::kRows : index / kColumns;
    const int column = planar ? index / Tile::kRows : index % kColumns;
    const Pixel pixel = pixels[row];
    if (pixel.pixel < 0) continue;
    const float value = results[row * kResultStep + column];
    T* to = frame + pixel.frame * target.step_frame + pixel.pixel * target.step_pixel +
            channels[column] * target.step_channel;
    const int32_t action = actions[column];
    if (action & kOwn) *to = static_cast<T>(action & kResult ? value : 0.f);
    if (action & kNext) to[target.step_frame] = static_cast<T>(value);
  }
}

// The same of whole vectors, where all channels lie in their order and belong to their own frame.
template <typename T, typename Tile>
__device__ void store_vectors(const Task<T>& task, const Part& part, const float* results, const Pixel* pixels,
                              const int32_t* actions) {
  constexpr int kVectors = kColumns / kChunk<T>;
  const Layout& target = task.target;
  T* frame = task.output + part.row / target.frames * target.step_clip + part.row % target.frames * target.step_frame;
  const int column = int(threadIdx.x) % kVectors * kChunk<T>;
  if (part.first_column + column >= target.channels) return;
  for (int row = int(threadIdx.x) / kVectors; row < Tile::kRows; row += Tile::kThreads / kVectors) {
    const Pixel pixel = pixels[row];
    if (pixel.pixel < 0) continue;
    Vector<T, kChunk<T>> vector;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i)
      vector.values[i] =
          static_cast<T>(actions[column + i] & kResult ? results[row * kResultStep + column + i] : 0.f);
    store_vector(frame + pixel.frame * target.step_frame + pixel.pixel * target.step_pixel + part.first_column + column,
                 vector);
  }
}

// A block has a part of the output. Where none of its channels is to be computed, it only writes zeros.
template <typename T, typename Tile, bool kExact, bool kByInput>
__global__ void __launch_bounds__(Tile::kThreads, 2) convolution_kernel(Task<T> task, bool whole_vectors) {
  unsigned char* memory = shared_memory();
  Pixel* pixels = reinterpret_cast<Pixel*>(memory + Tile::kPixelsAt);
  int32_t* channels = reinterpret_cast<int32_t*>(memory + Tile::kChannelsAt);
  int32_t* actions = channels + kColumns;
  const Part part = part_of<T, Tile>(task);
  find_pixels<T, Tile>(pixels, task, part);
  find_channels(channels, actions, task, part);
  __syncthreads();

  Sums<Tile> sums = {};
  if (part.steps > 0) {
    FeatureLoader<T, Tile> features(task, part, pixels);
    std::conditional_t<kByInput, InputRows<T, Tile>, OutputRows<T, Tile>> weights(task, part, channels);
    if constexpr (!kExact) {
      if (!has_warpgroup_products())
        accumulate<T, Tile, kByInput, Unit::warp>(sums, memory, part, features, weights);
      else if (part.columns > 32)
        accumulate<T, Tile, kByInput, Unit::warpgroup>(sums, memory, part, features, weights);
      else
        accumulate<T, Tile, kByInput, Unit::half_warpgroup>(sums, memory, part, features, weights);
    } else {
      accumulate<T, Tile, kByInput, Unit::thread>(sums, memory, part, features, weights);
    }
  }
  float* results = reinterpret_cast<float*>(memory);
  put_results<T, Tile>(results, sums, task, channels);
  __syncthreads();
  if (whole_vectors)
    store_vectors<T, Tile>(task, part, results, pixels, actions);
  else
    store_results<T, Tile>(task, part, results, pixels, channels, actions);
}

using LargeTile = Tile<128, 128, 3>;
using SmallTile = Tile<64, 128, 4>;
// Blocks that are at work at once on a GPU of this generation, two on each of its multiprocessors.
constexpr int64_t kBlocksAtOnce = 2 * 132;

// Large tiles read less, small ones leave less of themselves empty and give more blocks.
bool takes_large_tiles(int64_t pixels, int64_t rows, int64_t column_tiles) {
  const int64_t large = ceil_div(pixels, LargeTile::kRows), small = ceil_div(pixels, SmallTile::kRows);
  return small % 2 == 0 ? large * rows * column_tiles >= kBlocksAtOnce
                        : 16 * large * LargeTile::kRows <= 17 * small * SmallTile::kRows &&
                              large * rows * column_tiles >= kBlocksAtOnce;
}

template <typename T, bool kExact, bool kByInput>
void launch(const Stream& stream, Task<T>& task, bool whole_vectors) {
  const Layout& target = task.target;
  const int64_t pixels = task.merged ? target.pixels * target.rows : target.pixels;
  const int64_t rows = task.merged ? 1 : target.rows, column_tiles = ceil_div(target.channels, kColumns);
  const auto run = [&](auto tile) {
    using Tile = decltype(tile);
    task.pixel_tiles = uint32_t(ceil_div(pixels, Tile::kRows));
    task.column_tiles = uint32_t(column_tiles);
    stream.launch(&convolution_kernel<T, Tile, kExact, kByInput>, task.pixel_tiles * column_tiles * rows, Tile::kThreads,
                  Tile::kSharedBytes, task, whole_vectors);
  };
  takes_large_tiles(pixels, rows, column_tiles) ? run(LargeTile()) : run(SmallTile());
}

}  // namespace

void convolve(Tensor& output, const Tensor& input, const Tensor& weight, const Domain& domain, const Geometry& geometry,
              const Frames& frames, const Epilogue& epilogue, bool exact) {
  if (output.numel() == 0) return;
  const Layout target = layout_of(output), source = layout_of(input);
  STD_TORCH_CHECK(target.channels * target.pixels <= INT32_MAX && source.channels * source.pixels <= INT32_MAX,
                  "convolution: expected at most 2^31 - 1 values per frame");
  const bool packed = domain.inputs == nullptr && is_packed(input);
  const Tensor features = packed ? input : pack_features(input, domain.inputs, domain.input_count);
  const Stream stream(output);
  for_float_type(input, "convolution", [&](auto zero) {
    using T = decltype(zero);
    const bool by_input = sizeof(T) == 2 && domain.inputs != nullptr && domain.outputs == nullptr;
    const Tensor ordered =
        pack_weight(weight, by_input ? WeightOrder::by_input : WeightOrder::by_output, geometry.transposed);
    const bool same = domain.output_count == nullptr && domain.input_count == nullptr && frames.first == nullptr &&
                      frames.taps == nullptr && epilogue.policy == nullptr;
    const int64_t in_chunks = ceil_div(source.channels, kChunk<T>);
    Task<T> task{mutable_data<T>(output), data<T>(features), data<T>(ordered), static_cast<const T*>(epilogue.bias),
                 domain, geometry, frames, target, epilogue.policy, epilogue.frames, int32_t(source.channels),
                 int32_t(in_chunks), 0, epilogue.activation, 0, 0, false};
    const int64_t filled = ceil_div(by_input ? target.channels : source.channels, kChunk<T>) * kChunk<T>;
    task.weight_inner = int32_t(filled);
    // Offsets of a block's pixels and their number are of 32 bits.
    task.merged = same && target.is_even() && source.rows == target.rows &&
                  (LargeTile::kRows + 1) * in_chunks * source.pixels <= INT32_MAX;
    const bool whole_vectors = domain.outputs == nullptr && epilogue.policy == nullptr && target.step_channel == 1 &&
                               target.channels % kChunk<T> == 0 && is_aligned(output);
    if constexpr (sizeof(T) == 2) {
      by_input ? launch<T, false, true>(stream, task, whole_vectors)
               : launch<T, false, false>(stream, task, whole_vectors);
    } else {
      exact ? launch<T, true, false>(stream, task, whole_vectors) : launch<T, false, false>(stream, task, whole_vectors);
    }
  });
}

}  // namespace adakernels
