// The depthwise convolution: every row reads one live channel. A vector holds one pixel of kLanes planes, so that a tap
// of a pixel is one aligned multiply-add, whatever the list of channels, the size of the plane and the stride. The two
// memory formats differ in how pixels get into such vectors and out of them again. Planes whose rows fill vectors need
// not be rearranged for a 3x3 kernel: they are summed as they lie.
#pragma once

#include <algorithm>
#include <utility>

#include "../routes.h"
#include "activation.h"
#include "direct.h"
#include "gemm_tile.h"
#include "kernels.h"
#include "lanes.h"
#include "plane_sum.h"

namespace adakernels {
namespace {

// Pixels of a row that are summed at once: with the tap's weights and a product they fill 16 registers.
constexpr int kRunPixels = 14;
// Computed pixels that wait to be stored together, so that the rows of small planes make whole vectors.
constexpr int64_t kStoredPixels = 128;
// Up to this size, a plane is fetched while the ones before it are computed: it ends before the processor would have
// seen what to fetch ahead.
constexpr int64_t kPrefetchedPixels = 1024;

// out[i] = start + sum over steps of weights[step.weight] * source[step.source + i], all of them vectors.
template <int count>
void depthwise_run(const float* source, const Step* steps, int64_t step_count, const float* weights,
                   const float* start, float* out) {
  using V = Vector<kLanes>;
  V sum[count];
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) sum[i] = load<kLanes>(start);
  for (const Step *step = steps, *end = step + step_count; step != end; ++step) {
    const V weight = load<kLanes>(weights + step->weight);
    const float* pixels = source + step->source;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) sum[i] += weight * load<kLanes>(pixels + i * kLanes);
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i) store<kLanes>(out + i * kLanes, sum[i]);
}

using RunFunction = void (*)(const float*, const Step*, int64_t, const float*, const float*, float*);

template <int... counts>
constexpr RunFunction pick_run(int64_t count, std::integer_sequence<int, counts...>) {
  constexpr RunFunction functions[] = {depthwise_run<counts + 1>...};
  return functions[count - 1];
}

// One row of the grid: the steps of its first temporal tap, as many follow for each further one, and where the pixels
// that it reads end.
struct GridRow {
  int32_t first_step, step_count, pixel_end;
};

// What the groups of planes of a task have in common. Pixel p of the source at a temporal tap, counted from row
// `first_row` on, is kept at offsets[p] of that tap's ring of rows, which lie in the order of their stride phases
// between zeros.
class DepthwiseGeometry {
 public:
  // whole: keeps all rows of the source, not only as many as a row of the grid reads.
  DepthwiseGeometry(const Convolution& conv, const Tile& tile, bool whole, Layout& layout)
      : conv_(conv), tile_(tile) {
    const Planes& source = conv.source;
    for (const Tap& tap : conv.taps) {
      first_y_ = std::min<int64_t>(first_y_, tap.dy), last_y_ = std::max<int64_t>(last_y_, tap.dy);
      first_x_ = std::min<int64_t>(first_x_, tap.dx), last_x_ = std::max<int64_t>(last_x_, tap.dx);
    }
    first_row = std::clamp<int64_t>(tile.y_begin * conv.step_y + first_y_, 0, source.height);
    const int64_t last_row = std::clamp<int64_t>((tile.y_end - 1) * conv.step_y + last_y_, -1, source.height - 1);
    source_rows = std::max<int64_t>(0, last_row - first_row + 1);
    // Pixels come in fours, so that up to three of them run ahead into further rows.
    ring_rows_ = whole ? source_rows : std::min(source_rows, last_y_ - first_y_ + 2 + 3 / source.width);
    ring_rows_ = std::max<int64_t>(1, ring_rows_);
    const int64_t columns = std::max(source.width, (conv.grid_width - 1) * conv.step_x + last_x_ + 1) - first_x_;
    phase_columns_ = (columns + conv.step_x - 1) / conv.step_x;
    pitch_ = phase_columns_ * conv.step_x;
    ring_size = ring_rows_ * pitch_ * kLanes;

    const int64_t grid_rows = tile.y_end - tile.y_begin;
    offsets_at_ = layout.add<int32_t>(source_rows * source.width);
    rows_at_ = layout.add<GridRow>(grid_rows);
    steps_at_ = layout.add<Step>(grid_rows * conv.times * int64_t(conv.taps.size()));
    ring_at_ = layout.add<float>(conv.times * ring_size);
    weights_at_ = layout.add<float>((conv.weight_row + 1) * kLanes);
  }

  void lay_out(char* memory) {
    offsets = reinterpret_cast<int32_t*>(memory + offsets_at_);
    rows = reinterpret_cast<GridRow*>(memory + rows_at_);
    steps = reinterpret_cast<Step*>(memory + steps_at_);
    ring = reinterpret_cast<float*>(memory + ring_at_);
    weights = reinterpret_cast<float*>(memory + weights_at_);
    std::memset(ring, 0, size_t(conv_.times * ring_size) * 4);
    lay_out_pixels();
    lay_out_rows();
  }

  // Computes row y of the grid from the pixels in the ring at temporal taps [tap_begin, tap_end).
  // out: [grid_width, kLanes]
  void compute_row(int64_t y, int64_t tap_begin, int64_t tap_end, const float* start, float* out) const {
    const int64_t width = conv_.grid_width, runs = (width + kRunPixels - 1) / kRunPixels;
    const GridRow& row = rows[y - tile_.y_begin];
    const Step* first = steps + row.first_step + tap_begin * row.step_count;
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t begin = width * r / runs, count = width * (r + 1) / runs - begin;
      pick_run(count, std::make_integer_sequence<int, kRunPixels>())(
          ring + begin * kLanes, first, (tap_end - tap_begin) * row.step_count, weights, start, out + begin * kLanes);
    }
    activate(conv_.activation, out, width * kLanes);
  }

  int64_t first_row, source_rows;
  int64_t ring_size;  // of one temporal tap
  int32_t* offsets;
  GridRow* rows;
  Step* steps;
  float *ring, *weights;  // weights: of one group, [conv.weight_row + 1, kLanes]

 private:
  int64_t row_offset(int64_t y) const { return (y - first_row) % ring_rows_ * pitch_; }

  void lay_out_pixels() {
    int32_t* offset = offsets;
    for (int64_t y = 0; y < source_rows; ++y) {
      const int64_t row = row_offset(first_row + y);
      int64_t phase = -first_x_ % conv_.step_x, column = -first_x_ / conv_.step_x;
      for (int64_t x = 0; x < conv_.source.width; ++x) {
        *offset++ = int32_t((row + phase * phase_columns_ + column) * kLanes);
        if (++phase == conv_.step_x) phase = 0, ++column;
      }
    }
  }

  void lay_out_rows() {
    const Planes& source = conv_.source;
    int32_t step_count = 0;
    for (int64_t i = 0; i < tile_.y_end - tile_.y_begin; ++i) {
      const int64_t y = (tile_.y_begin + i) * conv_.step_y;
      GridRow& row = rows[i];
      row.first_step = step_count;
      for (int64_t time = 0; time < conv_.times; ++time)
        for (const Tap& tap : conv_.taps) {
          if (y + tap.dy < 0 || y + tap.dy >= source.height) continue;
          const int64_t x = tap.dx - first_x_;
          const int64_t column = x % conv_.step_x * phase_columns_ + x / conv_.step_x;
          steps[step_count++] = {int32_t((tap.weight + time * conv_.weight_time) * kLanes),
                                 int32_t(time * ring_size + (row_offset(y + tap.dy) + column) * kLanes)};
        }
      row.step_count = (step_count - row.first_step) / int32_t(conv_.times);
      const int64_t row_end = std::clamp(y + last_y_ + 1 - first_row, int64_t(0), source_rows);
      row.pixel_end = int32_t(std::min((row_end * source.width + 3) / 4 * 4, source_rows * source.width));
    }
  }

  const Convolution& conv_;
  const Tile& tile_;
  int64_t first_y_ = 0, last_y_ = 0, first_x_ = 0, last_x_ = 0;
  int64_t ring_rows_, phase_columns_, pitch_;  // in vectors
  int64_t offsets_at_, rows_at_, steps_at_, ring_at_, weights_at_;
};

// Planes to compute: what they are read from, and what they are written to.
struct Lanes {
  const float* source[kLanes];  // at temporal tap 0
  const float* weights[kLanes];
  float* target[kLanes];
  // Second targets, and the lanes that go to them.
  float* copy[kLanes];
  int copied[kLanes];
  int64_t copy_count;
  int64_t tap_begin, tap_end;  // temporal taps
  alignas(64) float start[kLanes];
};

// Fetches part `i` of `parts` of some planes. GCC drops calls of a function that does nothing else.
template <bool write, typename Plane>
[[gnu::always_inline]] inline void prefetch_part(Plane* const* planes, int64_t at, int64_t size, int64_t i,
                                                 int64_t parts) {
  constexpr int64_t line = 16;
  const int64_t lines = (size + line - 1) / line;
  for (int64_t j = lines * i / parts; j < lines * (i + 1) / parts; ++j)
    for (int l = 0; l < kLanes; ++l) __builtin_prefetch(planes[l] + at + j * line, write, 2);
}

// `next`: the planes that come after these, or null.
inline void depthwise_group(const Convolution& conv, const Tile& tile, const DepthwiseGeometry& geometry,
                            const Lanes& lanes, const Lanes* next, float* out) {
  const int64_t width = conv.grid_width, grid_rows = tile.y_end - tile.y_begin;
  const int64_t source_size = geometry.source_rows * conv.source.width;
  if (source_size > kPrefetchedPixels) next = nullptr;
  gather_lanes(lanes.weights, 0, conv.weight_row,
               [&](int64_t i, Vector<kLanes> v) { store<kLanes>(geometry.weights + i * kLanes, v); });
  const int64_t rows_stored = std::max<int64_t>(1, kStoredPixels / width);
  float* target[kLanes];
  int64_t filled = 0;
  for (int64_t y = tile.y_begin; y < tile.y_end; y += rows_stored) {
    const int64_t end = std::min(tile.y_end, y + rows_stored);
    for (int64_t i = y; i < end; ++i) {
      const GridRow& row = geometry.rows[i - tile.y_begin];
      if (next != nullptr) {
        for (int64_t time = next->tap_begin; time < next->tap_end; ++time)
          prefetch_part<false>(next->source, time * conv.source.tap_stride, source_size, i - tile.y_begin, grid_rows);
        prefetch_part<true>(next->target, 0, grid_rows * width, i - tile.y_begin, grid_rows);
      }
      for (int64_t time = lanes.tap_begin; filled < row.pixel_end && time < lanes.tap_end; ++time) {
        const float* source[kLanes];
        for (int l = 0; l < kLanes; ++l) source[l] = lanes.source[l] + time * conv.source.tap_stride;
        float* ring = geometry.ring + time * geometry.ring_size;
        gather_lanes(source, filled, row.pixel_end, [&](int64_t p, Vector<kLanes> v) {
          store<kLanes>(ring + geometry.offsets[p], v);
        });
      }
      filled = std::max<int64_t>(filled, row.pixel_end);
      geometry.compute_row(i, lanes.tap_begin, lanes.tap_end, lanes.start, out + (i - y) * width * kLanes);
    }
    for (int l = 0; l < kLanes; ++l) target[l] = lanes.target[l] + y * width;
    scatter_lanes(target, out, (end - y) * width);
    for (int64_t i = 0; i < lanes.copy_count; ++i)
      std::memcpy(lanes.copy[i] + y * width, target[lanes.copied[i]], size_t((end - y) * width) * 4);
  }
}

// Rows that are told apart at once by whether the channel that they read is live, so that the dead ones are filled next
// to the arithmetic of the others.
constexpr int64_t kSortedRows = 32;

// Which of a unit's channels are live, all of them at the same temporal taps.
struct LiveChannels {
  int64_t tap_begin = 0, tap_end = 0;
  const uint8_t* marks = nullptr;  // [channels], or null if all are

  // memory: [channels]
  LiveChannels(const Unit& unit, int64_t channels, uint8_t* memory) {
    if (unit.live_count > 0) {
      tap_begin = unit.live[0].tap;
      tap_end = unit.live[unit.live_count - 1].tap + 1;
    }
    const int64_t needed = channels * (tap_end - tap_begin);
    // In a sorted list of distinct channels the first ones are all there if the last of as many entries is.
    if (channels == 0 || (needed > 0 && unit.live_count >= needed && unit.live[needed - 1].channel == channels - 1))
      return;
    std::memset(memory, 0, size_t(channels));
    for (const Route* live = unit.live; live != unit.live + unit.live_count && live->channel < channels; ++live)
      memory[live->channel] = 1;
    marks = memory;
  }
  bool operator[](int64_t channel) const { return marks == nullptr || marks[channel]; }
};

// How many source channels there are up to the last one that the rows of these units read.
inline int64_t most_channels(const Convolution& conv, const Unit* units, int64_t unit_count) {
  int64_t most = 0;
  for (const Unit* unit = units; unit != units + unit_count; ++unit)
    if (unit->row_count > 0) most = std::max(most, unit->rows[unit->row_count - 1].channel / conv.rows_per_live + 1);
  return most;
}

inline float start_of(const Convolution& conv, const Route& row) { return conv.bias ? conv.bias[row.channel] : 0.f; }

// Whether a tile is a sum of source planes of the target's size, filtered by 3x3 kernels.
inline bool sums_planes(const Convolution& conv, const Tile& tile, const PlaneShape& shape) {
  if (shape.rows == PlaneShape::Rows::of_any_width || conv.taps.size() != 9 || conv.step_y != 1 || conv.step_x != 1 ||
      conv.source.height != shape.height || conv.source.width != shape.width || conv.times > kMostFiltered)
    return false;
  for (int64_t i = 0; i < 9; ++i) {
    const Tap& tap = conv.taps[size_t(i)];
    if (tap.dy != i / 3 - 1 || tap.dx != i % 3 - 1) return false;
  }
  return shape.rows != PlaneShape::Rows::half_a_vector || (tile.y_begin % 2 == 0 && tile.y_end % 2 == 0);
}

void convolve_summed_planes(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                            PlaneShape& shape, Scratch& scratch) {
  const Planes &source = conv.source, &target = conv.target;
  const int64_t begin = tile.y_begin, end = tile.y_end;
  Layout layout;
  const int64_t tables_at = layout.add<float>(shape.table_size());
  const int64_t marks_at = layout.add<uint8_t>(most_channels(conv, units, unit_count));
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  shape.fill_tables(reinterpret_cast<float*>(memory + tables_at));
  PlaneSum sum(shape);
  int64_t passed = 0;  // rows of the units before this one
  for (const Unit* unit = units; unit != units + unit_count && passed < tile.row_end; passed += unit++->row_count) {
    const LiveChannels is_live(*unit, most_channels(conv, unit, 1), reinterpret_cast<uint8_t*>(memory + marks_at));
    for (int64_t r = std::max<int64_t>(0, tile.row_begin - passed);
         r < std::min(unit->row_count, tile.row_end - passed); ++r) {
      const Route& row = unit->rows[r];
      const int64_t channel = row.channel / conv.rows_per_live;
      const float* const plane = static_cast<const float*>(source.data) +
                                 unit->source_frame * source.frame_stride + channel * source.channel_stride;
      sum.clear(start_of(conv, row));
      for (int64_t time = is_live.tap_begin; is_live[channel] && time < is_live.tap_end; ++time) {
        float kernel[9];
        const float* const weights = conv.weight + row.channel * conv.weight_row + time * conv.weight_time;
        for (int i = 0; i < 9; ++i) kernel[i] = weights[conv.taps[size_t(i)].weight];
        sum.add_filtered(plane + time * source.tap_stride, 0, kernel);
      }
      float* const to = static_cast<float*>(target.data) + (unit->frame + !row.here) * target.frame_stride +
                        row.channel * target.channel_stride;
      sum.write_rows(begin, end, to, {conv.activation});
      if (row.here && row.next)
        std::memcpy(to + target.frame_stride + begin * target.width, to + begin * target.width,
                    size_t((end - begin) * target.width) * 4);
    }
  }
}

// Tile rows count through all units of the task, which may be of several frames.
void convolve_depthwise_planes(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                               Scratch& scratch) {
  PlaneShape shape(conv.grid_height, conv.grid_width, 3);
  if (sums_planes(conv, tile, shape)) {
    convolve_summed_planes(conv, units, unit_count, tile, shape, scratch);
    return;
  }
  const Planes &source = conv.source, &target = conv.target;
  const int64_t rows_stored = std::max<int64_t>(1, kStoredPixels / conv.grid_width);
  Layout layout;
  DepthwiseGeometry geometry(conv, tile, false, layout);
  const int64_t out_at = layout.add<float>(rows_stored * conv.grid_width * kLanes);
  const int64_t unused_at = layout.add<float>(target.height * target.width);
  const int64_t marks_at = layout.add<uint8_t>(most_channels(conv, units, unit_count));
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  uint8_t* marks = reinterpret_cast<uint8_t*>(memory + marks_at);
  geometry.lay_out(memory);

  Lanes groups[2];  // one to compute, and one that is being put together
  int current = 0, lane_count = 0;
  bool waiting = false;
  groups[0].copy_count = 0;
  float* unused = reinterpret_cast<float*>(memory + unused_at);
  const auto compute_waiting = [&](const Lanes* next) {
    if (waiting)
      depthwise_group(conv, tile, geometry, groups[1 - current], next, reinterpret_cast<float*>(memory + out_at));
  };
  const auto finish_group = [&] {
    Lanes& lanes = groups[current];
    for (int l = lane_count; l < kLanes; ++l) {
      lanes.source[l] = lanes.source[0];
      lanes.weights[l] = lanes.weights[0];
      lanes.start[l] = lanes.start[0];
      lanes.target[l] = unused;
    }
    compute_waiting(&lanes);
    waiting = true;
    current = 1 - current;
    lane_count = 0;
    groups[current].copy_count = 0;
  };
  const auto target_plane = [&](const Unit& unit, const Route& row) {
    return static_cast<float*>(target.data) + (unit.frame + !row.here) * target.frame_stride +
           row.channel * target.channel_stride;
  };
  int64_t begin = tile.row_begin, end = tile.row_end;
  for (const Unit* unit = units; unit != units + unit_count && end > 0; ++unit) {
    const auto channel_of = [&](const Route& row) { return row.channel / int32_t(conv.rows_per_live); };
    const LiveChannels is_live(*unit, most_channels(conv, unit, 1), marks);
    // The planes of a group share their temporal taps.
    if (lane_count > 0 &&
        (groups[current].tap_begin != is_live.tap_begin || groups[current].tap_end != is_live.tap_end))
      finish_group();
    const float* frame = static_cast<const float*>(source.data) + unit->source_frame * source.frame_stride +
                         geometry.first_row * source.width;
    const int64_t rows_end = std::min(end, unit->row_count);
    for (int64_t first = begin; first < rows_end; first += kSortedRows) {
      const int64_t count = std::min(kSortedRows, rows_end - first);
      const Route* rows = unit->rows + first;
      // Which rows are live is hard to predict for a branch.
      int64_t live[kSortedRows], dead[kSortedRows], live_count = 0, dead_count = 0;
      for (int64_t r = 0; r < count; ++r) {
        const bool alive = is_live[channel_of(rows[r])];
        live[live_count] = dead[dead_count] = r;
        live_count += alive;
        dead_count += !alive;
      }
      for (int64_t i = 0; i < dead_count; ++i) {
        const Route& row = rows[dead[i]];
        float value[kLanes];
        store<kLanes>(value, activate<kLanes>(conv.activation, Vector<kLanes>{} + start_of(conv, row)));
        float* plane = target_plane(*unit, row);
        for (float* to : {plane, row.here && row.next ? plane + target.frame_stride : plane})
          std::fill(to + tile.y_begin * target.width, to + tile.y_end * target.width, value[0]);
      }
      for (int64_t i = 0; i < live_count; ++i) {
        const Route& row = rows[live[i]];
        Lanes& lanes = groups[current];
        float* plane = target_plane(*unit, row);
        lanes.source[lane_count] = frame + channel_of(row) * source.channel_stride;
        lanes.weights[lane_count] = conv.weight + row.channel * conv.weight_row;
        lanes.start[lane_count] = start_of(conv, row);
        lanes.target[lane_count] = plane;
        lanes.copy[lanes.copy_count] = plane + target.frame_stride;
        lanes.copied[lanes.copy_count] = lane_count;
        lanes.copy_count += row.here & row.next;
        lanes.tap_begin = is_live.tap_begin;
        lanes.tap_end = is_live.tap_end;
        if (++lane_count == kLanes) finish_group();
      }
    }
    begin = std::max<int64_t>(0, begin - unit->row_count);
    end -= unit->row_count;
  }
  if (lane_count > 0) finish_group();
  compute_waiting(nullptr);
}

// Blocks of kLanes channels in a channels-last target that are put together at once: what is computed of them stays in
// the first-level cache for small maps.
constexpr int64_t kChunkBlocks = 4;

using LaneMask = VectorOf<kLanes>::integer;

// -1 in the lanes whose bit is set, else 0.
inline LaneMask lanes_of(uint32_t bits) {
  constexpr auto bit = indices<kLanes>([](int i) { return 1 << i; });
  LaneMask each;
  std::memcpy(&each, bit.at, sizeof(each));
  return ((LaneMask{} + int32_t(bits)) & each) != 0;
}

// Some neighbouring channels of a channels-last target frame: which of them are computed, and what goes to the others.
struct Chunk {
  static constexpr int64_t kChannels = kChunkBlocks * kLanes;

  // kLanes neighbouring channels, as sets of bits.
  struct Block {
    uint32_t computed = 0, here = 0, next = 0, zero = 0;  // here, next: belong to this frame and the one after it
    int64_t group;               // that has the first computed one
    int32_t position[kLanes];    // of a computed one in that group and the next one
  };

  int64_t begin;
  Block blocks[kChunkBlocks];
  // Computed channels follow one another in the lanes of groups.
  int32_t channel[kChannels], source[kChannels];
  int64_t lane_count = 0;

  // Channels [begin, end) of a unit.
  Chunk(const Convolution& conv, const Unit& unit, const LiveChannels& live, int64_t begin, int64_t end)
      : begin(begin) {
    const auto before = [](const Route& row, int64_t channel) { return row.channel < channel; };
    const Route* const rows_end = unit.rows + unit.row_count;
    const Route* row = std::lower_bound(unit.rows, rows_end, begin, before);
    for (int64_t b = 0, first = begin; first < end; ++b, first += kLanes) {
      Block& block = blocks[b];
      const int64_t block_end = std::min(end, first + kLanes);
      for (; row != rows_end && row->channel < block_end; ++row) {
        const int64_t i = row->channel - first;
        block.here |= uint32_t(row->here) << i;
        block.next |= uint32_t(row->next) << i;
      }
      block.computed = block.here | block.next;
      if (conv.zeros != nullptr) block.zero = conv.zeros->bits(unit.frame, first, block_end);
      if (live.marks != nullptr)
        for (int64_t i = 0; i < block_end - first; ++i)
          block.computed &= ~(uint32_t(!live[(first + i) / conv.rows_per_live]) << i);
      block.group = lane_count / kLanes;
      for (int i = 0; i < kLanes; ++i) {
        channel[lane_count] = int32_t(first + i);
        block.position[i] = int32_t(lane_count - block.group * kLanes);
        lane_count += block.computed >> i & 1;
      }
    }
    for (int64_t i = 0; i < lane_count; ++i)
      source[i] = conv.rows_per_live == 1 ? channel[i] : channel[i] / int32_t(conv.rows_per_live);
  }
};

// Takes the channels of all lanes from pixels of `channels` channels each.
class ChannelPicker {
 public:
  // from: [kLanes], sorted
  ChannelPicker(const int32_t* from, int64_t channels) : from_(from), channels_(channels) {
    if (channels < kLanes) return;
    LaneMask all;
    std::memcpy(&all, from, sizeof(all));
    for (int lane = 0; lane < kLanes;) {
      const int32_t low = std::min(from[lane], int32_t(channels) - kLanes);
      const int32_t high = std::min(low + kLanes, int32_t(channels) - kLanes);
      const LaneMask found = all < from[lane], positions = all < low + kLanes ? all - low : all - high + kLanes;
      Pair& pair = pairs_[pair_count_++];
      pair.low = low;
      pair.high = high;
      pair.found = found;
      std::memcpy(pair.positions.at, &positions, sizeof(positions));
      while (lane < kLanes && from[lane] < high + kLanes) ++lane;
    }
  }

  // For each of `count` pixels a vector at offsets[pixel] of `to`; without offsets one after the other.
  void pick(const float* pixels, int64_t stride, int64_t count, float* to, const int32_t* offsets = nullptr) const {
    const auto at = [=](int64_t p) { return to + (offsets != nullptr ? offsets[p] : p * kLanes); };
    if (channels_ < kLanes) {
      for (int64_t p = 0; p < count; ++p)
        for (int l = 0; l < kLanes; ++l) at(p)[l] = pixels[p * stride + from_[l]];
      return;
    }
    for (const Pair* pair = pairs_; pair != pairs_ + pair_count_; ++pair) {
      const float *low = pixels + pair->low, *high = pixels + pair->high;
      const auto positions = pair->positions;
      const LaneMask found = pair->found;
      const auto picked = [&](int64_t p) {
        return shuffle<kLanes>(load<kLanes>(low + p * stride), load<kLanes>(high + p * stride), positions);
      };
      if (pair == pairs_)
        for (int64_t p = 0; p < count; ++p) store<kLanes>(at(p), picked(p));
      else
        for (int64_t p = 0; p < count; ++p) store<kLanes>(at(p), found ? load<kLanes>(at(p)) : picked(p));
    }
  }

 private:
  // Two vectors in which some lanes find their channels, and the lanes that have found theirs in earlier ones.
  struct Pair {
    int64_t low, high;
    Indices<kLanes> positions;
    LaneMask found;
  };
  const int32_t* from_;
  int64_t channels_;
  Pair pairs_[kLanes];
  int pair_count_ = 0;
};

// Computes a group of a chunk's lanes. source: the first pixel at temporal tap 0; out: [points, kLanes]
inline void depthwise_lanes(const Convolution& conv, const Tile& tile, const DepthwiseGeometry& geometry,
                            const Chunk& chunk, int64_t group, const LiveChannels& live, const float* source,
                            float* out) {
  alignas(64) int32_t channel[kLanes], from[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    const int64_t i = std::min(group * kLanes + l, chunk.lane_count - 1);
    channel[l] = chunk.channel[i];
    from[l] = chunk.source[i];
  }
  const ChannelPicker pixels(from, conv.channels), weights(channel, conv.columns.count);
  weights.pick(conv.columns.data, conv.columns.count, conv.weight_row + 1, geometry.weights);
  for (int64_t time = live.tap_begin; time < live.tap_end; ++time)
    pixels.pick(source + time * conv.source.tap_stride, conv.source.column_stride,
                geometry.source_rows * conv.source.width, geometry.ring + time * geometry.ring_size, geometry.offsets);
  const float* start = geometry.weights + conv.weight_row * kLanes;
  for (int64_t y = tile.y_begin; y < tile.y_end; ++y, out += conv.grid_width * kLanes)
    geometry.compute_row(y, live.tap_begin, live.tap_end, start, out);
}

// Stores a block of a chunk. out: what was computed of it, [groups, points, kLanes]; to: its first channel.
inline void store_block(const Convolution& conv, const Chunk& chunk, int64_t number, const float* out, int64_t points,
                        float* to) {
  const Chunk::Block& block = chunk.blocks[number];
  const float *low = out + block.group * points * kLanes, *high = low + points * kLanes;
  Indices<kLanes> positions;
  std::memcpy(positions.at, block.position, sizeof(positions));
  const auto computed = lanes_of(block.computed), here = lanes_of(block.here), next = lanes_of(block.next);
  const auto written = lanes_of(block.here | block.zero);
  const auto zero = Vector<kLanes>{};
  auto value = zero;  // of channels without a source
  if (((block.here | block.next) & ~block.computed) != 0)
    value = activate<kLanes>(conv.activation, load<kLanes>(conv.columns.data + conv.weight_row * conv.columns.count +
                                                           chunk.begin + number * kLanes));
  for (int64_t p = 0; p < points; ++p, to += conv.target.column_stride) {
    const auto picked = shuffle<kLanes>(load<kLanes>(low + p * kLanes), load<kLanes>(high + p * kLanes), positions);
    const auto v = computed ? picked : value;
    store_lanes(to, here ? v : zero, written);
    if (block.next != 0) store_lanes(to + conv.target.frame_stride, v, next);
  }
}

// Tile rows count through the target channels of all units, where those of a unit are rounded up to whole vectors.
void convolve_depthwise_channels(const Convolution& conv, const Unit* units, const Tile& tile, Scratch& scratch) {
  const Planes &source = conv.source, &target = conv.target;
  const int64_t points = (tile.y_end - tile.y_begin) * conv.grid_width;
  Layout layout;
  DepthwiseGeometry geometry(conv, tile, true, layout);
  // One group more than there are, which the last block is picked from too.
  const int64_t out_at = layout.add<float>((kChunkBlocks + 1) * points * kLanes);
  const int64_t marks_at = layout.add<uint8_t>(conv.channels);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  float* out = reinterpret_cast<float*>(memory + out_at);
  geometry.lay_out(memory);

  const int64_t channels = conv.channels * conv.rows_per_live, unit_rows = (channels + kLanes - 1) / kLanes * kLanes;
  for (int64_t begin = tile.row_begin; begin < tile.row_end;) {
    const Unit& unit = units[begin / unit_rows];
    const int64_t unit_begin = begin / unit_rows * unit_rows;
    const int64_t end = std::min(tile.row_end - unit_begin, unit_rows);
    const LiveChannels live(unit, conv.channels, reinterpret_cast<uint8_t*>(memory + marks_at));
    const float* pixels = static_cast<const float*>(source.data) + unit.source_frame * source.frame_stride +
                          geometry.first_row * source.row_stride;
    float* to = static_cast<float*>(target.data) + unit.frame * target.frame_stride + tile.y_begin * target.row_stride;
    for (int64_t c = begin - unit_begin; c < end; c += Chunk::kChannels) {
      const int64_t chunk_end = std::min({c + Chunk::kChannels, end, channels});
      const Chunk chunk(conv, unit, live, c, chunk_end);
      for (int64_t group = 0; group * kLanes < chunk.lane_count; ++group)
        depthwise_lanes(conv, tile, geometry, chunk, group, live, pixels, out + group * points * kLanes);
      for (int64_t block = 0; c + block * kLanes < chunk_end; ++block)
        store_block(conv, chunk, block, out, points, to + c + block * kLanes);
    }
    begin = unit_begin + end;
  }
}

// Tap by tap the weights of all target channels, and then their biases, as depthwise convolutions of channels-last
// planes take them. to: [weight_row + 1, column_count]
void depthwise_columns(const Convolution& conv, float* to, int64_t column_count) {
  const int64_t channels = conv.channels * conv.rows_per_live;
  std::memset(to, 0, size_t((conv.weight_row + 1) * column_count) * 4);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const float* rows[kLanes];
    for (int l = 0; l < kLanes; ++l) rows[l] = conv.weight + std::min(c + l, channels - 1) * conv.weight_row;
    gather_lanes(rows, 0, conv.weight_row,
                 [&](int64_t i, Vector<kLanes> v) { store<kLanes>(to + i * column_count + c, v); });
  }
  if (conv.bias) std::memcpy(to + conv.weight_row * column_count, conv.bias, size_t(channels) * 4);
}

void convolve_depthwise(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                        Scratch& scratch) {
  if (conv.channels > 0)
    convolve_depthwise_channels(conv, units, tile, scratch);
  else
    convolve_depthwise_planes(conv, units, unit_count, tile, scratch);
}

}  // namespace
}  // namespace adakernels
