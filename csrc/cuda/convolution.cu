#include "cuda/convolution.cuh"

#include <algorithm>
#include <optional>

#include "cuda/activation.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace adakernels {

namespace {

constexpr int kWarp = 32, kWarpgroup = 128;
// A row of a tile in shared memory: so many bytes of numbers, in vectors of 16.
constexpr int kRowBytes = 128, kRowChunks = kRowBytes / kVectorBytes;

constexpr int kPartBytes = 64;

// How much a block does, and how many steps of its sums are on their way. Warps have 16 rows of every 64.
template <int kRows_, int kColumns_, int kThreads_, int kStages_>
struct Tile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kThreads = kThreads_, kStages = kStages_;
  static constexpr int kRowTiles = kRows * kWarpgroup / 64 / kThreads;
  static constexpr int kFeatureBytes = kRows * kRowBytes, kStageBytes = kFeatureBytes + kColumns * kRowBytes;
  // Results of a row on their way to memory, so far apart that a warp's pairs fall into all banks.
  static constexpr int kResultStep = kColumns + 8;
  // Stages, where the results come later, then what is known of rows, of columns, of the block and of taps.
  static constexpr int kPixelsAt = kStages * kStageBytes;
  static constexpr int kChannelsAt = kPixelsAt + kRows * kVectorBytes;
  static constexpr int kPartAt = kChannelsAt + 2 * kColumns * int(sizeof(int32_t));
  static constexpr int kTapsAt = kPartAt + kPartBytes;
  static_assert(kRows * Tile::kResultStep * int(sizeof(float)) <= kPixelsAt);
  static_assert(kColumns <= kThreads);
  // Whether there can be so few tiles that several blocks share one.
  static constexpr bool kMaySplit = kRows == 64;
};

template <typename T>
struct Task {
  T* output;        // [N', C_out, H', W']
  const T* input;   // [N, H, W, P]
  const T* weight;  // [C_out, taps, I] | [taps, C_in, O]
  const T* bias;    // [C_out] | null
  Domain domain;
  Geometry geometry;
  Sources sources;
  FrameShape target;
  const int64_t* policy;  // [N', C_out] | null
  int64_t clip_frames;
  int32_t in_channels, in_chunks;  // C_in, P in vectors
  int32_t weight_inner;            // I or O
  int32_t activation;
  uint32_t phase_tiles, pixel_tiles, column_tiles;  // tiles of a phase, of all phases
  // Rows run on from frame to frame where nothing distinguishes those.
  bool merged;
  // Blocks that share the sums of a tile, and where they leave them if there are several.
  uint32_t tiles, splits;
  float* partial;  // [splits, tiles, fours of sums, kThreads, 4] | null
};

// What a block is for: places of a frame, or of that one and those behind it, in one phase, and output channels.
struct Part {
  int64_t row;
  int32_t phase_y, phase_x;
  int32_t first_place, first_column;
  int32_t columns;                            // those to compute; the others are zero
  int32_t depths, taps_y, taps;               // temporal taps that read a frame, taps of the phase
  int32_t in_count, chunks;                   // input channels, and vectors of them
  int32_t total;                              // vectors over all taps
  int32_t first_step, steps;                  // those of the block
};

static_assert(sizeof(Part) <= kPartBytes);

// What is known of a row of the tile: where it reads but for the tap, the frame after the part's and the pixel in it,
// or -1.
struct alignas(kVectorBytes) Pixel {
  int32_t y, x, frame, pixel;
};

// What is known of a tap: its place in the weight, how far it reads from where a row does and in which frame.
struct alignas(kVectorBytes) Tap {
  int32_t index, y, x, frame;
};

// The frame that a temporal tap reads, or -1.
template <typename T>
__device__ int64_t source(const Task<T>& task, int64_t row, int32_t tap) {
  return source_of(task.sources, task.geometry.depth, row, tap);
}

// How many of the temporal taps before `end` read a frame.
template <typename T>
__device__ int32_t depths_before(const Task<T>& task, int64_t row, int32_t end) {
  int32_t count = 0;
  for (int32_t tap = 0; tap < end; ++tap) count += source(task, row, tap) >= 0;
  return count;
}

template <typename T, typename Tile>
__device__ Part part_of(const Task<T>& task) {
  Part part;
  const Geometry& geometry = task.geometry;
  const int32_t places = geometry.y.places() * geometry.x.places();
  const uint32_t block = blockIdx.x % task.tiles, split = blockIdx.x / task.tiles;
  const uint32_t index = block / task.pixel_tiles, tile = block % task.pixel_tiles;
  const int64_t place = int64_t(tile % task.phase_tiles) * Tile::kRows;
  const int32_t phase = int32_t(tile / task.phase_tiles);
  part.phase_y = phase / geometry.x.phases(), part.phase_x = phase % geometry.x.phases();
  part.first_column = int32_t(index % task.column_tiles) * Tile::kColumns;
  part.row = task.merged ? place / places : index / task.column_tiles;
  part.first_place = int32_t(task.merged ? place % places : place);
  const Domain& domain = task.domain;
  const int32_t end = domain.output_count != nullptr ? domain.output_count[part.row] : int32_t(task.target.channels);
  part.columns = max(0, min(Tile::kColumns, end - part.first_column));
  part.in_count = domain.input_count != nullptr ? domain.input_count[part.row] : task.in_channels;
  part.chunks = (part.in_count + kChunk<T> - 1) / kChunk<T>;
  part.depths = depths_before(task, part.row, geometry.depth);
  part.taps_y = geometry.y.taps_before(geometry.y.kernel, part.phase_y);
  part.taps = part.depths * part.taps_y * geometry.x.taps_before(geometry.x.kernel, part.phase_x);
  part.total = part.columns == 0 ? 0 : part.taps * part.chunks;
  const uint32_t steps = uint32_t((part.total + kRowChunks - 1) / kRowChunks);
  part.first_step = int32_t(steps * split / task.splits);
  part.steps = int32_t(steps * (split + 1) / task.splits) - part.first_step;
  return part;
}

template <typename T, typename Tile>
__device__ void find_pixels(Pixel* pixels, const Task<T>& task, const Part& part) {
  const auto& [side_y, side_x, depth] = task.geometry;
  const int32_t width = side_x.places(), places = side_y.places() * width;
  for (int row = int(threadIdx.x); row < Tile::kRows; row += Tile::kThreads) {
    const int32_t index = part.first_place + row, frame = task.merged ? index / places : 0;
    const int32_t place = index - frame * places;
    const int32_t y = place / width, x = place % width;
    const int32_t out_y = side_y.output(y, part.phase_y), out_x = side_x.output(x, part.phase_x);
    const bool inside =
        place < places && part.row + frame < task.target.rows && out_y < side_y.out && out_x < side_x.out;
    // Far outside for every tap, were it not for the border.
    pixels[row] = inside ? Pixel{side_y.anchor(y), side_x.anchor(x), frame, out_y * side_x.out + out_x}
                         : Pixel{INT32_MIN / 2, 0, 0, -1};
  }
}

template <typename T, typename Tile>
__device__ void find_taps(Tap* taps, const Task<T>& task, const Part& part) {
  const auto& [side_y, side_x, depth] = task.geometry;
  const int32_t plane = side_y.kernel * side_x.kernel;
  const int32_t taps_x = part.taps / max(1, part.depths * part.taps_y);
  for (int32_t i = int32_t(threadIdx.x); i < depth * plane; i += Tile::kThreads) {
    const int32_t z = i / plane, y = i % plane / side_x.kernel, x = i % side_x.kernel;
    const int64_t frame = source(task, part.row, z);
    if (frame < 0 || !side_y.has_tap(y, part.phase_y) || !side_x.has_tap(x, part.phase_x)) continue;
    const int32_t place =
        (depths_before(task, part.row, z) * part.taps_y + side_y.taps_before(y, part.phase_y)) * taps_x +
        side_x.taps_before(x, part.phase_x);
    taps[place] = {i, side_y.offset(y, part.phase_y), side_x.offset(x, part.phase_x), int32_t(frame)};
  }
}

// Where vector `chunk` of row `row` of a tile is, so that eight rows' same vector and one row's all are in all banks.
__device__ __forceinline__ int place_of(int row, int chunk) {
  return row * kRowBytes + ((chunk ^ (row % kRowChunks)) * kVectorBytes);
}

// Goes through taps and vectors of input channels: a thread has the same place of every step.
struct Walk {
  int32_t tap, chunk, index;

  __device__ Walk(const Part& part, int place_in_step) : index(part.first_step * kRowChunks + place_in_step) {
    tap = index / part.chunks;
    chunk = index - tap * part.chunks;
  }
  // Whether the tap is another one.
  __device__ bool step(const Part& part) {
    chunk += kRowChunks;
    index += kRowChunks;
    const int32_t before = tap;
    for (; chunk >= part.chunks; chunk -= part.chunks) ++tap;
    return tap != before;
  }
  __device__ bool inside(const Part& part) const { return index < part.total; }
};

// Copies the features of one step: a thread has one vector of some rows.
template <typename T, typename Tile>
class FeatureLoader {
 public:
  __device__ FeatureLoader(const Task<T>& task, const Part& part, const Pixel* pixels, const Tap* taps)
      : task_(task), part_(part), pixels_(pixels), taps_(taps), walk_(part, int(threadIdx.x) % kRowChunks) {
    const Geometry& geometry = task.geometry;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Pixel& pixel = pixels_[row(i)];
      offsets_[i] = 0;
      if (pixel.pixel >= 0)
        offsets_[i] = ((pixel.frame * geometry.y.in + pixel.y) * geometry.x.in + pixel.x) * task.in_chunks;
    }
    find_tap();
  }

  __device__ void load(unsigned char* to) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const bool inside = inside_ >> i & 1;
      const int64_t offset = offsets_[i] + (tap_offset_ + walk_.chunk);
      copy_async(to + place_of(row(i), int(threadIdx.x) % kRowChunks),
                 inside ? frame_ + offset * kChunk<T> : task_.input, inside);
    }
    if (walk_.step(part_) || !walk_.inside(part_)) find_tap();
  }

 private:
  static constexpr int kStride = Tile::kThreads / kRowChunks, kMine = Tile::kRows / kStride;

  __device__ static int row(int i) { return int(threadIdx.x) / kRowChunks + i * kStride; }

  __device__ void find_tap() {
    inside_ = 0;
    if (!walk_.inside(part_)) return;
    const Side &side_y = task_.geometry.y, &side_x = task_.geometry.x;
    const Tap tap = taps_[walk_.tap];
    frame_ = task_.input + int64_t(tap.frame) * side_y.in * side_x.in * task_.in_chunks * kChunk<T>;
    tap_offset_ = (tap.y * side_x.in + tap.x) * task_.in_chunks;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const Pixel& pixel = pixels_[row(i)];
      const bool inside =
          uint32_t(pixel.y + tap.y) < uint32_t(side_y.in) && uint32_t(pixel.x + tap.x) < uint32_t(side_x.in);
      inside_ |= uint32_t(inside) << i;
    }
  }

  const Task<T>& task_;
  const Part& part_;
  const Pixel* pixels_;
  const Tap* taps_;
  Walk walk_;
  // In vectors.
  int32_t offsets_[kMine], tap_offset_;
  const T* frame_;   // that the tap reads
  uint32_t inside_;  // by row
};

// Copies the weights of one step, a row for each output channel: whole vectors where the inputs are not listed,
// else number by number.
template <typename T, typename Tile>
class OutputRows {
 public:
  __device__ OutputRows(const Task<T>& task, const Part& part, const int32_t* channels, const Tap* taps)
      : task_(task), part_(part), taps_(taps), walk_(part, int(threadIdx.x) % kRowChunks) {
    const int32_t taps_of_all = task.geometry.depth * task.geometry.y.kernel * task.geometry.x.kernel;
    const int32_t size = taps_of_all * (task.weight_inner / kChunk<T>);
#pragma unroll
    for (int i = 0; i < kMine; ++i) rows_[i] = row(i) < part.columns ? channels[row(i)] * size : -1;
  }

  __device__ void load(unsigned char* to) {
    const bool inside = walk_.inside(part_);
    const int32_t tap = inside ? taps_[walk_.tap].index * (task_.weight_inner / kChunk<T>) : 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      unsigned char* target = to + place_of(row(i), int(threadIdx.x) % kRowChunks);
      const bool read = inside && rows_[i] >= 0;
      const T* from = task_.weight + (read ? int64_t(rows_[i] + tap) * kChunk<T> : 0);
      if (task_.domain.inputs == nullptr)
        copy_async(target, from + (read ? walk_.chunk * kChunk<T> : 0), read);
      else
        gather(reinterpret_cast<T*>(target), from, read);
    }
    walk_.step(part_);
  }

 private:
  static constexpr int kStride = Tile::kThreads / kRowChunks, kMine = Tile::kColumns / kStride;

  __device__ static int row(int i) { return int(threadIdx.x) / kRowChunks + i * kStride; }

  __device__ void gather(T* to, const T* from, bool inside) {
    const int32_t* list = task_.domain.inputs + part_.row * task_.in_channels;
    Vector<T, kChunk<T>> vector;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      const int32_t index = walk_.chunk * kChunk<T> + i;
      const bool read = inside && index < part_.in_count;
      if constexpr (sizeof(T) == 4)
        copy_async<4>(to + i, from + (read ? list[index] : 0), read);
      else
        vector.values[i] = read ? from[list[index]] : static_cast<T>(0.f);
    }
    if constexpr (sizeof(T) != 4) store_vector(to, vector);
  }

  const Task<T>& task_;
  const Part& part_;
  const Tap* taps_;
  Walk walk_;
  int32_t rows_[kMine];  // in vectors, or -1
};

// Copies the weights of one step, a row for each input channel of a tap, of outputs that are not listed: a block of
// rows of 64 columns after the other.
template <typename T>
constexpr int kInputRows = kRowChunks * kChunk<T>;

template <typename T, typename Tile>
class InputRows {
 public:
  __device__ InputRows(const Task<T>& task, const Part& part, const int32_t*, const Tap* taps)
      : task_(task), part_(part), taps_(taps), first_(part.first_step * kRowChunks) {}

  __device__ void load(unsigned char* to) {
    const int vector = int(threadIdx.x) % kVectors;
    const int32_t column = part_.first_column + vector * kChunk<T>;
#pragma unroll
    for (int i = 0; i < kInputRows<T> / kStride; ++i) {
      const int row = int(threadIdx.x) / kVectors + i * kStride;
      const int32_t index = first_ + row / kChunk<T>;
      const int32_t tap = index / part_.chunks, channel = (index - tap * part_.chunks) * kChunk<T> + row % kChunk<T>;
      const bool inside = index < part_.total && channel < part_.in_count && column < task_.weight_inner;
      const T* from = task_.weight;
      if (inside) {
        const int32_t listed = task_.domain.inputs[part_.row * task_.in_channels + channel];
        from += (int64_t(taps_[tap].index) * task_.in_channels + listed) * task_.weight_inner + column;
      }
      unsigned char* block = to + vector / kRowChunks * kInputRows<T> * kRowBytes;
      copy_async(block + place_of(row, vector % kRowChunks), from, inside);
    }
    first_ += kRowChunks;
  }

 private:
  static constexpr int kVectors = Tile::kColumns / kChunk<T>, kStride = Tile::kThreads / kVectors;

  const Task<T>& task_;
  const Part& part_;
  const Tap* taps_;
  int32_t first_;
};

// The first row of the tile that a warp has in its i-th group of 64.
template <typename Tile>
__device__ __forceinline__ int first_row(int i) {
  const int warp = int(threadIdx.x) / kWarp;
  return (warp / 4 * Tile::kRowTiles + i) * 64 + warp % 4 * 16;
}

// Sums of a thread: of rows lane / 4 and that plus 8 of its groups, and of two columns of every eight.
template <typename Tile>
using Sums = float[Tile::kRowTiles][Tile::kColumns / 8][4];

// Adds a step's products by the tensor cores of a warp.
template <typename T, typename Tile, bool kByInput>
__device__ __forceinline__ void add_products(Sums<Tile>& sums, const unsigned char* features,
                                             const unsigned char* weights, int columns) {
  const int lane = int(threadIdx.x) % kWarp;
  // Registers suffice for so many at a time.
#pragma unroll(Tile::kColumns > 64 ? 1 : kRowChunks / 2)
  for (int k = 0; k < kRowChunks; k += 2) {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
      load_matrices(a[i], features + place_of(first_row<Tile>(i) + lane % 16, k + lane / 16));
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; j += 2) {
      if (8 * j >= columns) break;
      uint32_t b[4];
      if constexpr (kByInput)
        load_matrices<true>(b, weights + j / kRowChunks * kInputRows<T> * kRowBytes +
                                   place_of(k * 8 + lane % 16, j % kRowChunks + lane / 16));
      else
        load_matrices(b, weights + place_of(8 * j + lane % 8 + lane / 16 * 8, k + lane / 8 % 2));
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
    const Matrix b(weights + (kByInput ? k * 8 * kRowBytes : k * kVectorBytes),
                   kInputRows<T> * kRowBytes);
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
    return load_vector<4>(reinterpret_cast<const float*>(tile + place_of(row, chunk)));
  };
#pragma unroll 1
  for (int chunk = 0; chunk < kRowChunks; ++chunk) {
    Vector<float, 4> a[2 * Tile::kRowTiles];
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i)
      a[i] = load(features, first_row<Tile>(i / 2) + lane / 4 + i % 2 * 8, chunk);
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j) {
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
      weights.load(stage + Tile::kFeatureBytes);
    }
    commit_copies();
  };
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (int step = 0; step < part.steps; ++step) {
    wait_for_copies<Tile::kStages - 2>();
    const unsigned char* stage = stages + step % Tile::kStages * Tile::kStageBytes;
    const unsigned char* weight_stage = stage + Tile::kFeatureBytes;
    if constexpr (kWarpgroups) {
      fence_for_products();
      wait_for_products<0>();
      __syncthreads();
      constexpr int kWidth = kUnit == Unit::warpgroup ? Tile::kColumns : Tile::kColumns / 2;
      start_products<T, Tile, kByInput, kWidth>(sums, stage, weight_stage);
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

// What is written of a column: a frame's own plane, with the results or with zeros, and the next frame's.
enum Action : int32_t { kOwn = 1, kResult = 2, kNext = 4 };

// A plane that is reused is left to the frame before, so that every number is written once.
template <typename T>
__device__ int32_t action_of(const Task<T>& task, const Part& part, int column, int32_t channel) {
  const int32_t result = column < part.columns ? kResult : 0;
  // What is behind a count without a list is left alone.
  if (task.domain.outputs == nullptr && result == 0) return 0;
  if (task.policy == nullptr) return kOwn | result;
  const int64_t* own = task.policy + part.row * task.target.channels + channel;
  const int64_t frame = part.row % task.clip_frames;
  int32_t action = 0;
  if (*own != kReuse || frame == 0) action = kOwn | (*own == kKeep ? kResult : 0);
  if (frame + 1 < task.clip_frames && own[task.target.channels] == kReuse) action |= kNext;
  return action;
}

// Channels of the part's columns, and what becomes of them. The last ones may be none.
template <typename T, typename Tile>
__device__ void find_channels(int32_t* channels, int32_t* actions, const Task<T>& task, const Part& part) {
  if (int(threadIdx.x) >= Tile::kColumns) return;
  const int column = int(threadIdx.x), index = part.first_column + column;
  channels[column] = actions[column] = 0;
  if (index >= int(task.target.channels)) return;
  const int32_t* list = task.domain.outputs;
  channels[column] = list != nullptr ? list[part.row * task.target.channels + index] : index;
  actions[column] = action_of(task, part, column, channels[column]);
}

// Brings the sums, with bias and activation, into shared memory. [rows, kResultStep]
template <typename T, typename Tile>
__device__ void put_results(float* results, const Sums<Tile>& sums, const Task<T>& task, const int32_t* channels) {
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int j = 0; j < Tile::kColumns / 8; ++j) {
    const int column = 8 * j + 2 * (lane % 4);
    float bias[2] = {};
    if (task.bias != nullptr)
      for (int which = 0; which < 2; ++which) bias[which] = static_cast<float>(task.bias[channels[column + which]]);
#pragma unroll
    for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
      Vector<float, 2> pair;
#pragma unroll
      for (int which = 0; which < 2; ++which)
        pair.values[which] = activated(sums[i / 2][j][i % 2 * 2 + which] + bias[which], task.activation);
      store_vector(results + (first_row<Tile>(i / 2) + lane / 4 + i % 2 * 8) * Tile::kResultStep + column, pair);
    }
  }
}

// Stores the results as the columns' actions say, side by side in memory by neighbours in the block.
template <typename T, typename Tile>
__device__ void store_results(const Task<T>& task, const Part& part, const float* results, const Pixel* pixels,
                              const int32_t* channels, const int32_t* actions) {
  const FrameShape& target = task.target;
  T* frame = task.output + target.at(uint32_t(part.row));
  for (int index = int(threadIdx.x); index < Tile::kRows * Tile::kColumns; index += Tile::kThreads) {
    const bool planar = target.step_pixel == 1;
    const int row = planar ? index % Tile::kRows : index / Tile::kColumns;
    const int column = planar ? index / Tile::kRows : index % Tile::kColumns;
    const Pixel pixel = pixels[row];
    if (pixel.pixel < 0) continue;
    const float value = results[row * Tile::kResultStep + column];
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
  constexpr int kVectors = Tile::kColumns / kChunk<T>;
  const FrameShape& target = task.target;
  T* frame = task.output + target.at(uint32_t(part.row));
  const int column = int(threadIdx.x) % kVectors * kChunk<T>;
  if (part.first_column + column >= int(target.channels)) return;
  if (actions[column] == 0) return;
  for (int row = int(threadIdx.x) / kVectors; row < Tile::kRows; row += Tile::kThreads / kVectors) {
    const Pixel pixel = pixels[row];
    if (pixel.pixel < 0) continue;
    Vector<T, kChunk<T>> vector;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i)
      vector.values[i] =
          static_cast<T>(actions[column + i] & kResult ? results[row * Tile::kResultStep + column + i] : 0.f);
    store_vector(frame + pixel.frame * target.step_frame + pixel.pixel * target.step_pixel + part.first_column + column,
                 vector);
  }
}

// What a block leaves of its sums for whoever adds those of all splits. Neighbours in the block are so in memory.
template <typename Tile, typename Run>
__device__ void for_quads(Sums<Tile>& sums, float* of_tile, const Run& run) {
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < Tile::kColumns / 8; ++j)
      run(sums[i][j], of_tile + ((i * (Tile::kColumns / 8) + j) * Tile::kThreads + int(threadIdx.x)) * 4);
}

template <typename T, typename Tile>
__device__ void store_partial(const Task<T>& task, Sums<Tile>& sums) {
  float* of_tile = task.partial + int64_t(blockIdx.x) * Tile::kRows * Tile::kColumns;
  for_quads<Tile>(sums, of_tile, [](const float(&quad)[4], float* to) {
    store_vector(to, Vector<float, 4>{{quad[0], quad[1], quad[2], quad[3]}});
  });
}

// Adds the splits in their order.
template <typename T, typename Tile>
__device__ void add_partial(const Task<T>& task, Sums<Tile>& sums) {
  for (uint32_t split = 0; split < task.splits; ++split) {
    float* of_tile = task.partial + (int64_t(split) * task.tiles + blockIdx.x) * Tile::kRows * Tile::kColumns;
    for_quads<Tile>(sums, of_tile, [](float(&quad)[4], const float* from) {
      const Vector<float, 4> vector = load_vector<4>(from);
#pragma unroll
      for (int i = 0; i < 4; ++i) quad[i] += vector.values[i];
    });
  }
}

template <typename T, typename Tile>
__device__ void store(const Task<T>& task, const Part& part, const Sums<Tile>& sums, unsigned char* memory,
                      bool whole_vectors) {
  const Pixel* pixels = reinterpret_cast<const Pixel*>(memory + Tile::kPixelsAt);
  const int32_t* channels = reinterpret_cast<const int32_t*>(memory + Tile::kChannelsAt);
  const int32_t* actions = channels + Tile::kColumns;
  float* results = reinterpret_cast<float*>(memory);
  put_results<T, Tile>(results, sums, task, channels);
  __syncthreads();
  if (whole_vectors)
    store_vectors<T, Tile>(task, part, results, pixels, actions);
  else
    store_results<T, Tile>(task, part, results, pixels, channels, actions);
}

// Brings what is known of the block, its rows and its columns into shared memory.
template <typename T, typename Tile>
__device__ const Part& begin(const Task<T>& task, unsigned char* memory) {
  // There it takes no registers.
  Part& part = *reinterpret_cast<Part*>(memory + Tile::kPartAt);
  if (threadIdx.x == 0) part = part_of<T, Tile>(task);
  __syncthreads();
  int32_t* channels = reinterpret_cast<int32_t*>(memory + Tile::kChannelsAt);
  find_pixels<T, Tile>(reinterpret_cast<Pixel*>(memory + Tile::kPixelsAt), task, part);
  find_channels<T, Tile>(channels, channels + Tile::kColumns, task, part);
  return part;
}

// A block has a part of the output. Where none of its channels is to be computed, it only writes zeros, if anything.
template <typename T, typename Tile, bool kExact, bool kByInput>
__global__ void __launch_bounds__(Tile::kThreads, 2) convolution_kernel(Task<T> task, bool whole_vectors) {
  unsigned char* memory = shared_memory();
  const Part& part = begin<T, Tile>(task, memory);
  if (part.columns == 0 && (task.domain.outputs == nullptr || task.splits > 1)) return;
  const Pixel* pixels = reinterpret_cast<const Pixel*>(memory + Tile::kPixelsAt);
  const int32_t* channels = reinterpret_cast<const int32_t*>(memory + Tile::kChannelsAt);
  Tap* taps = reinterpret_cast<Tap*>(memory + Tile::kTapsAt);
  if (part.steps > 0) find_taps<T, Tile>(taps, task, part);
  __syncthreads();

  Sums<Tile> sums = {};
  if (part.steps > 0) {
    FeatureLoader<T, Tile> features(task, part, pixels, taps);
    std::conditional_t<kByInput, InputRows<T, Tile>, OutputRows<T, Tile>> weights(task, part, channels, taps);
    if constexpr (!kExact) {
      if (!has_warpgroup_products())
        accumulate<T, Tile, kByInput, Unit::warp>(sums, memory, part, features, weights);
      else if (part.columns > Tile::kColumns / 2)
        accumulate<T, Tile, kByInput, Unit::warpgroup>(sums, memory, part, features, weights);
      else
        accumulate<T, Tile, kByInput, Unit::half_warpgroup>(sums, memory, part, features, weights);
    } else {
      accumulate<T, Tile, kByInput, Unit::thread>(sums, memory, part, features, weights);
    }
  }
  if constexpr (Tile::kMaySplit)
    if (task.splits > 1) return store_partial<T, Tile>(task, sums);
  store<T, Tile>(task, part, sums, memory, whole_vectors);
}

// A block finishes a tile whose sums were split.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2) split_convolution_kernel(Task<T> task, bool whole_vectors) {
  unsigned char* memory = shared_memory();
  const Part& part = begin<T, Tile>(task, memory);
  if (part.columns == 0 && task.domain.outputs == nullptr) return;
  __syncthreads();
  Sums<Tile> sums = {};
  if (part.columns > 0) add_partial<T, Tile>(task, sums);
  store<T, Tile>(task, part, sums, memory, whole_vectors);
}

// Of 64 columns for tensors of few channels and where large tiles would be too few.
using LargeTile = Tile<128, 128, 256, 3>;
using NarrowTile = Tile<128, 64, 128, 3>;
using SmallTile = Tile<64, 64, 128, 4>;

template <typename T, bool kExact, bool kByInput>
void launch(const Tensor& output, Task<T>& task, bool whole_vectors) {
  const Stream stream(output);
  const FrameShape& target = task.target;
  const auto& [side_y, side_x, depth] = task.geometry;
  const int64_t phases = side_y.phases() * side_x.phases();
  const int64_t places = int64_t(side_y.places()) * side_x.places() * (task.merged ? target.rows : 1);
  const int64_t rows = task.merged ? 1 : target.rows;
  const auto blocks = [&](auto tile) {
    using Tile = decltype(tile);
    return ceil_div(places, Tile::kRows) * phases * ceil_div(target.channels, Tile::kColumns) * rows;
  };
  // Large tiles read less. They have to be enough for all multiprocessors, and not much emptier than small ones.
  const auto fits = [&](auto tile) {
    using Tile = decltype(tile);
    const int64_t area = Tile::kRows * Tile::kColumns, small_area = SmallTile::kRows * SmallTile::kColumns;
    return blocks(tile) >= stream.multiprocessors() && 9 * area * blocks(tile) <= 10 * small_area * blocks(SmallTile());
  };
  const auto run = [&](auto tile) {
    using Tile = decltype(tile);
    task.phase_tiles = uint32_t(ceil_div(places, Tile::kRows));
    task.pixel_tiles = uint32_t(task.phase_tiles * phases);
    task.column_tiles = uint32_t(ceil_div(target.channels, Tile::kColumns));
    const int taps = depth * side_y.kernel * side_x.kernel;
    task.tiles = uint32_t(blocks(tile));
    task.splits = 1;
    std::optional<Tensor> partial;
    if constexpr (Tile::kMaySplit) {
      const int64_t steps = ceil_div(ceil_div(taps, phases) * task.in_chunks, kRowChunks);
      task.splits = uint32_t(splits_of_sums(task.tiles, steps, stream.multiprocessors()));
      if (task.splits > 1) {
        partial = torch::stable::new_empty(output, {int64_t(task.splits) * task.tiles, Tile::kRows * Tile::kColumns},
                                           ScalarType::Float);
        task.partial = mutable_data<float>(*partial);
      }
    }
    stream.launch(&convolution_kernel<T, Tile, kExact, kByInput>, blocks(tile) * task.splits, Tile::kThreads,
                  Tile::kTapsAt + taps * int(sizeof(Tap)), task, whole_vectors);
    if constexpr (Tile::kMaySplit)
      if (task.splits > 1)
        stream.launch(&split_convolution_kernel<T, Tile>, blocks(tile), Tile::kThreads, Tile::kTapsAt, task,
                      whole_vectors);
  };
  if constexpr (sizeof(T) == 2)
    if (fits(LargeTile())) return run(LargeTile());
  fits(NarrowTile()) ? run(NarrowTile()) : run(SmallTile());
}

}  // namespace

int64_t splits_of_sums(int64_t tiles, int64_t steps, int64_t multiprocessors) {
  // As many as run at a time, with steps enough to pay for the sums' way through memory.
  constexpr int64_t kBlocksAtATime = 2, kLeastSteps = 8, kMostSplits = 8;
  const int64_t wanted = kBlocksAtATime * multiprocessors / std::max<int64_t>(tiles, 1);
  return std::clamp<int64_t>(std::min(wanted, steps / kLeastSteps), 1, kMostSplits);
}

Geometry geometry_of(const Tensor& read, const Tensor& written, const Window& window, int32_t depth, bool transposed) {
  const auto size = [](const Tensor& frames, int64_t from_end) {
    return int32_t(frames.size(frames.dim() - from_end));
  };
  const Window& w = window;
  return {Side{size(read, 2), size(written, 2), w.kernel_y, w.stride_y, w.padding_y, w.dilation_y, transposed},
          Side{size(read, 1), size(written, 1), w.kernel_x, w.stride_x, w.padding_x, w.dilation_x, transposed}, depth};
}

void convolve(Tensor& output, const Tensor& input, const Tensor& weight, const Domain& domain, const Geometry& geometry,
              Sources sources, const Epilogue& epilogue, bool exact) {
  if (output.numel() == 0) return;
  const FrameShape target = frame_shape(output, "convolution"), source = frame_shape(input, "convolution");
  const bool packed = domain.inputs == nullptr && is_packed(input);
  const Tensor features = packed ? input : pack_features(input, domain.inputs, domain.input_count);
  for_float_type(input, "convolution", [&](auto zero) {
    using T = decltype(zero);
    const bool by_input = sizeof(T) == 2 && domain.inputs != nullptr && domain.outputs == nullptr;
    const Tensor ordered =
        pack_weight(weight, by_input ? WeightOrder::by_input : WeightOrder::by_output, geometry.y.transposed);
    const bool same = domain.output_count == nullptr && domain.input_count == nullptr && sources == nullptr &&
                      epilogue.policy == nullptr;
    const int64_t in_chunks = ceil_div(source.channels, kChunk<T>);
    Task<T> task{mutable_data<T>(output), data<T>(features), data<T>(ordered), static_cast<const T*>(epilogue.bias),
                 domain, geometry, sources, target, epilogue.policy, epilogue.frames, int32_t(source.channels),
                 int32_t(in_chunks), 0, epilogue.activation, 0, 0, 0, false, 0, 1, nullptr};
    const int64_t filled = ceil_div(by_input ? target.channels : source.channels, kChunk<T>) * kChunk<T>;
    task.weight_inner = int32_t(filled);
    // Offsets of a block's pixels and their number are of 32 bits.
    task.merged = same && target.is_even() && source.rows == target.rows &&
                  (LargeTile::kRows + 1) * in_chunks * source.pixels() <= INT32_MAX;
    const bool whole_vectors = domain.outputs == nullptr && epilogue.policy == nullptr && target.step_channel == 1 &&
                               target.channels % kChunk<T> == 0 && is_aligned(output);
    if constexpr (sizeof(T) == 2) {
      by_input ? launch<T, false, true>(output, task, whole_vectors)
               : launch<T, false, false>(output, task, whole_vectors);
    } else {
      exact ? launch<T, true, false>(output, task, whole_vectors)
            : launch<T, false, false>(output, task, whole_vectors);
    }
  });
}

STABLE_TORCH_LIBRARY_FRAGMENT(adakernels_cuda, m) {
  m.def("splits_of_sums(int tiles, int steps, int multiprocessors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(adakernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("splits_of_sums", TORCH_BOX(&splits_of_sums));
}

}  // namespace adakernels
