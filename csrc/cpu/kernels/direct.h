// The direct convolution of one tile: any taps, strides, routes and lists.
#pragma once

#include <algorithm>
#include <new>
#include <stdexcept>

#include "activation.h"
#include "copy.h"
#include "gemm_tile.h"
#include "kernels.h"
#include "store.h"

namespace adakernels {
namespace {

// What all groups of rows read again from the first-level cache, next to their weights.
constexpr int64_t kCloseBytes = 24 * 1024;

inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Lays objects out one after the other in a thread's scratch memory.
class Layout {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += align(count * int64_t(sizeof(T)));
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Rows of weights of a group of a unit's rows, for steps whose weights count from the first live channel.
struct RowGroup {
  const float* rows[kRows];
  float start[kRows];
  float floor;  // that of a register tile, which applies ReLU itself

  RowGroup(const Convolution& conv, const Unit& unit, int64_t first, int64_t count)
      : floor(conv.activation == Activation::relu && !conv.accumulates ? 0.f : Product().floor) {
    const int64_t live = unit.live_count > 0 ? live_weight(conv, unit.live[0]) : 0;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t channel = unit.rows[first + r].channel;
      rows[r] = conv.weight + unit.weight_offset + channel * conv.weight_row + live;
      start[r] = conv.bias ? conv.bias[channel] : 0.f;
    }
  }
};

// Activates, unless register tiles did, and stores a tile of `count` rows, `width` points from `at` on:
// segments(at, width, list) fills in where the points go and returns the number of segments. out: [count][out_stride]
template <typename Segments>
inline void finish_tile(const Convolution& conv, const Unit& unit, const Route* rows, int64_t count, float* out,
                        int64_t out_stride, int64_t at, int64_t width, const Segments& segments) {
  const int64_t hop = conv.target_step_x * conv.target.column_stride;
  Segment list[kTilePixels];
  const int64_t segment_count = segments(at, width, list);
  for (int64_t r = 0; r < count; ++r) {
    float* row = out + r * out_stride;
    if (conv.accumulates) add_target(conv.target, hop, unit.frame, rows[r], row, list, segment_count);
    if (conv.accumulates || conv.activation != Activation::relu) activate(conv.activation, row, width);
    store_route(conv.target, hop, unit.frame, rows[r], row, list, segment_count);
  }
}

// Runs the steps over `point_count` grid points of a unit and stores them.
template <typename Segments>
inline void multiply_and_store(const Convolution& conv, const Unit& unit, const Tile& tile, const float* source,
                               const Step* steps, int64_t step_count, int64_t point_count, const Segments& segments) {
  alignas(64) float out[kRows * kTilePixels];
  for_row_groups(tile.row_begin, std::min(tile.row_end, unit.row_count), [&](int64_t first, int64_t count) {
    const RowGroup group(conv, unit, first, count);
    Product product = {group.rows, steps, step_count, source, group.start};
    product.floor = group.floor;
    multiply<0, true>(product, count, point_count, out, kTilePixels, [&](int64_t at, int64_t width) {
      finish_tile(conv, unit, unit.rows + first, count, out, kTilePixels, at, width, segments);
    });
  });
}

// Bytes of weights that are read once for larger blocks, and of such a block.
constexpr int64_t kManyWeights = 512 * 1024, kLargeBlock = 512 * 1024;

// Whether so many planes lie so far apart that most of what a register tile reads of them meets in a few sets of the
// caches, which cannot hold it.
inline bool collides(int64_t channel_stride, int64_t live_count) {
  constexpr int64_t kSetBytes = 4096, kWays = 8;
  return channel_stride * 4 % kSetBytes == 0 && live_count > kWays;
}

// The tensor is read where it lies, unless planes collide. Else only the last points, less than a vector, are copied: a
// tile would read past the plane.
inline void convolve_in_place(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  constexpr int64_t span = kVectors * kLanes;
  const Planes& planes = conv.source;
  const float* source =
      static_cast<const float*>(planes.data) + unit.source_frame * planes.frame_stride + tile.x_begin;
  const int64_t live_count = unit.live_count, first_weight = live_count > 0 ? live_weight(conv, unit.live[0]) : 0;
  const int64_t count = tile.x_end - tile.x_begin, whole = count / kLanes * kLanes, rest = count - whole;
  // Temporal taps of weights with the channels innermost come in another order than the list's.
  bool gapless = live_count > 0;
  for (int64_t i = 0; i < live_count; ++i) gapless &= live_weight(conv, unit.live[i]) - first_weight == i;
  const bool dots = rest <= kMostDots && gapless;
  const int64_t spans = std::max<int64_t>(1, (whole + span - 1) / span);
  const int64_t row_end = std::min(tile.row_end, unit.row_count);
  const int64_t groups = (row_end - tile.row_begin + kRows - 1) / kRows;
  const bool packs = groups > 1 && collides(planes.channel_stride, live_count);
  // Weights that the second-level cache would not keep from one register tile's pixels to the next are read once for
  // many of these instead.
  const bool many_weights = (row_end - tile.row_begin) * live_count * 4 > kManyWeights;
  const int64_t block_bytes = many_weights ? kLargeBlock : kSourceBytes / 2;
  const int64_t fitting = std::max<int64_t>(1, block_bytes / (4 * std::max<int64_t>(1, live_count) * span));
  const int64_t blocks = (spans + fitting - 1) / fitting;
  // From a packed channel to the next: an odd number of vectors, so that these do not collide again.
  const int64_t pitch = (std::min((spans + blocks - 1) / blocks * span, whole) / kLanes | 1) * kLanes;
  Layout layout;
  const int64_t steps_at = layout.add<Step>(live_count), rest_steps_at = layout.add<Step>(live_count);
  const int64_t copy_at = layout.add<float>(live_count * kLanes);
  const int64_t packed_steps_at = layout.add<Step>(packs ? live_count : 0);
  const int64_t packed_at = layout.add<float>(packs ? live_count * pitch : 0);
  const int64_t groups_at = layout.add<RowGroup>(groups);
  const int64_t out_at = layout.add<float>((many_weights ? kRows : row_end - tile.row_begin) * span + kTilePixels);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  Step* rest_steps = reinterpret_cast<Step*>(memory + rest_steps_at);
  float* copy = reinterpret_cast<float*>(memory + copy_at);
  Step* packed_steps = reinterpret_cast<Step*>(memory + packed_steps_at);
  float* packed = reinterpret_cast<float*>(memory + packed_at);
  RowGroup* const row_groups = reinterpret_cast<RowGroup*>(memory + groups_at);
  float* const out = reinterpret_cast<float*>(memory + out_at);
  RowGroup* next_group = row_groups;
  for_row_groups(tile.row_begin, row_end,
                 [&](int64_t first, int64_t count) { new (next_group++) RowGroup(conv, unit, first, count); });
  for (int64_t i = 0; i < live_count; ++i) {
    const auto weight = int32_t(live_weight(conv, unit.live[i]) - first_weight + conv.taps[0].weight);
    steps[i] = {weight, int32_t(plane_offset(planes, 0, unit.live[i]))};
    rest_steps[i] = {weight, int32_t(i * kLanes)};
    if (packs) packed_steps[i] = {weight, int32_t(i * pitch)};
  }
  const auto copy_rest = [&] {
    for (int64_t i = 0; i < live_count; ++i) {
      const float* points = source + steps[i].source + whole;
      for (int64_t x = 0; x < rest; ++x) copy[dots ? x * live_count + i : i * kLanes + x] = points[x];
      for (int64_t x = rest; x < kLanes && !dots; ++x) copy[i * kLanes + x] = 0;
    }
  };

  // All groups of rows read a block from the second-level cache while the next one is fetched from memory: by the first
  // groups, which share the vectors of a register tile, so that memory has time. Unless weights are many, all groups
  // read those channels of a register tile's pixels that the first-level cache holds before they go on to the next;
  // the sums of a tile wait in `out`.
  const int64_t share = groups > 0 ? (kVectors + groups - 1) / groups : 0;
  const int64_t chunk = spans > 1 && !many_weights ? kCloseBytes / (4 * span) : std::max<int64_t>(1, live_count);
  const auto finish = [&](int64_t first, int64_t count, float* sums, int64_t at, int64_t width) {
    finish_tile(conv, unit, unit.rows + first, count, sums, span, at, width,
                [&](int64_t point, int64_t, Segment* list) {
                  list[0] = {0, target_offset(conv, 0, tile.x_begin + point), width};
                  return 1;
                });
  };
  // Calls use(rows, sums, first, count) for each group.
  const auto for_groups = [&](const auto& use) {
    const RowGroup* rows = row_groups;
    for_row_groups(tile.row_begin, row_end, [&](int64_t first, int64_t count) {
      use(*rows++, many_weights ? out : out + (first - tile.row_begin) * span, first, count);
    });
  };
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = spans * b / blocks * span, end = std::min(spans * (b + 1) / blocks * span, whole);
    const int64_t next = (b + 1 < blocks ? end : tile.next) - begin;
    for (int64_t i = 0; packs && i < live_count; ++i) {
      const float* const from = source + begin + steps[i].source;
      const float* const ahead = source + begin + steps[std::min(i + 1, live_count - 1)].source;
      for (int64_t p = 0; p < end - begin; p += kLanes) {
        __builtin_prefetch(ahead + p);
        store<kLanes>(packed + i * pitch + p, load<kLanes>(from + p));
      }
    }
    const int64_t shared = many_weights ? end - begin : span;
    for (int64_t at = begin; at < end; at += shared)
      for (int64_t channel = 0; channel == 0 || channel < live_count; channel += chunk) {
        const int64_t count = std::min(chunk, live_count - channel), width = std::min(shared, end - at);
        const bool last = channel + count == live_count;
        for_groups([&](const RowGroup& group, float* sums, int64_t first, int64_t row_count) {
          Product product = {group.rows, (packs ? packed_steps : steps) + channel, count,
                             packs ? packed + at - begin : source + at, channel == 0 ? group.start : nullptr};
          if (last) product.floor = group.floor;
          // The last element of a vector is fetched: the first one may lie in a line that was read before.
          const int64_t fetched = packs ? kVectors : share * (&group - row_groups);
          product.ahead = next + fetched * kLanes + kLanes - 1;
          const auto run = [&]<int prefetches>(std::integral_constant<int, prefetches>) {
            multiply<prefetches, true>(product, row_count, width, sums, span, [&](int64_t tile_at, int64_t tile_width) {
              if (last) finish(first, row_count, sums, at + tile_at, tile_width);
            });
          };
          const int64_t vectors = std::min(share, kVectors - fetched);
          if (vectors <= 0)
            run(std::integral_constant<int, 0>());
          else if (vectors == 1)
            run(std::integral_constant<int, 1>());
          else if (vectors == 2)
            run(std::integral_constant<int, 2>());
          else
            run(std::integral_constant<int, kVectors>());
        });
      }
  }
  if (rest == 0) return;
  copy_rest();
  for_groups([&](const RowGroup& group, float* sums, int64_t first, int64_t row_count) {
    Product product = {group.rows, dots ? steps : rest_steps, live_count, copy, group.start};
    product.floor = group.floor;
    if (dots)
      dot(product, row_count, rest, sums, span);
    else
      multiply<0, true>(product, row_count, rest, sums, span, [](int64_t, int64_t) {});
    finish(first, row_count, sums, whole, rest);
  });
}

// Few grid points: each tap's are gathered, so that vectors are full and nothing is computed only to be dropped.
// Where a phase of a channel lies row by row at the width of the grid, all of a tap's points are its plane from some
// offset on, but for those outside the source, which masks clear.
// Live channels are taken a few at a time, whose gathered points the second-level cache holds for all rows.
inline void convolve_gathered(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  using Mask = VectorOf<kLanes>::integer;
  const Planes& planes = conv.source;
  const int64_t grid_height = conv.grid_height, grid_width = conv.grid_width, point_count = grid_height * grid_width;
  const int64_t tap_count = int64_t(conv.taps.size()), phase_count = int64_t(conv.phases.size());
  const bool in_order = number_stride(conv) == tap_count && conv.taps[1].weight == 1;
  const int64_t rest = point_count % kLanes;
  const int64_t tail = in_order && point_count > rest && rest <= kMostDots ? rest : 0;
  const int64_t whole = point_count - tail, pitch = (whole + kLanes - 1) / kLanes * kLanes, masked = pitch + tail;
  const int64_t fitting = kSourceBytes / 4 / (tap_count * pitch);
  const int64_t chunk = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(1, unit.live_count));
  const int64_t row_end = std::min(tile.row_end, unit.row_count);
  const int64_t margin = (grid_width + 1) * (conv.shift_y + 1), plane = point_count + kTilePixels;
  Layout layout;
  const int64_t windows_at = layout.add<Window>(phase_count);
  const int64_t offsets_at = layout.add<int64_t>(tap_count);
  const int64_t masks_at = layout.add<int32_t>(tap_count * masked);
  const int64_t segments_at = layout.add<Segment>(grid_height);
  const int64_t steps_at = layout.add<Step>(chunk * tap_count);
  const int64_t copy_at = layout.add<float>(phase_count * plane + 2 * margin);
  const int64_t points_at = layout.add<float>(chunk * tap_count * pitch + kTilePixels);
  const int64_t tails_at = layout.add<float>(tail * live_span(conv, unit.live, unit.live_count) * tap_count);
  const int64_t out_at = layout.add<float>((row_end - tile.row_begin) * masked);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  Window* windows = reinterpret_cast<Window*>(memory + windows_at);
  int64_t* offsets = reinterpret_cast<int64_t*>(memory + offsets_at);
  int32_t* masks = reinterpret_cast<int32_t*>(memory + masks_at);
  Segment* segments = reinterpret_cast<Segment*>(memory + segments_at);
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  float* copy = reinterpret_cast<float*>(memory + copy_at);
  float* points = reinterpret_cast<float*>(memory + points_at);
  float* tails = reinterpret_cast<float*>(memory + tails_at);
  float* out = reinterpret_cast<float*>(memory + out_at);
  std::fill_n(copy, phase_count * plane + 2 * margin, 0.f);
  copy += margin;
  for (int64_t p = 0; p < phase_count; ++p) windows[p] = inner_window(conv, conv.phases[size_t(p)]);
  int64_t lowest = 0, highest = 0;
  for (int64_t t = 0; t < tap_count; ++t) {
    const Tap& tap = conv.taps[size_t(t)];
    const Window& window = windows[tap.phase];
    const Phase& phase = conv.phases[size_t(tap.phase)];
    const int64_t up = tap.shift_y - (window.y - phase.dy) / conv.step_y;
    const int64_t left = tap.shift_x - (window.x - phase.dx) / conv.step_x;
    const int64_t offset = up * grid_width + left;
    offsets[t] = tap.phase * plane + offset;
    lowest = std::min(lowest, offset);
    highest = std::max(highest, offset);
    for (int64_t i = 0; i < masked; ++i) {
      const int64_t y = i / grid_width + up, x = i % grid_width + left;
      masks[t * masked + i] = i < point_count && y >= 0 && y < window.height && x >= 0 && x < window.end ? -1 : 0;
    }
  }
  // Rows that follow one another in the target are stored as one.
  const int64_t hop = conv.target_step_x * conv.target.column_stride;
  const bool joined = hop == 1 && conv.target_step_y * conv.target.row_stride == grid_width;
  const int64_t segment_count = joined ? 1 : grid_height;
  for (int64_t y = 0; y < segment_count; ++y)
    segments[y] = {y * grid_width, target_offset(conv, y, 0), joined ? point_count : grid_width};
  const bool in_place = phase_count == 1 && conv.step_y == 1 && conv.step_x == 1 && planes.scalar == Scalar::f32 &&
                        planes.column_stride == 1 && planes.row_stride == grid_width && conv.all_live_here;
  const int64_t first = windows[0].y * planes.row_stride + windows[0].x;

  for (int64_t begin = 0; begin == 0 || begin < unit.live_count; begin += chunk) {
    const int64_t live_count = std::min(chunk, unit.live_count - begin), step_count = live_count * tap_count;
    const Route* live = unit.live + begin;
    // The few last points' columns go by all channels, with zeros for dead ones, as the weights do that they meet.
    const int64_t span = live_span(conv, live, live_count) * tap_count;
    std::fill_n(tails, tail * span, 0.f);
    for (int64_t i = 0; i < live_count; ++i) {
      const int64_t at = plane_offset(planes, unit.source_frame, live[i]) + first;
      const float* source = copy;
      if (in_place && at + lowest >= 0 && at + highest + masked <= planes.extent)  // whole vectors, too
        source = static_cast<const float*>(planes.data) + at;
      else
        copy_phases(copy, plane, grid_width, planes, unit.source_frame, live[i], windows, phase_count);
      RowsAhead ahead = rows_ahead(planes, unit, begin + i, windows[0]);
      for (int64_t y = 0; y < conv.step_y * grid_height; ++y) ahead.fetch_next();
      const int64_t weight = live_weight(conv, live[i]) - live_weight(conv, unit.live[0]);
      for (int64_t t = 0; t < tap_count; ++t) {
        const int64_t k = i * tap_count + t;
        steps[k] = {int32_t(weight + conv.taps[size_t(t)].weight), int32_t(k * pitch)};
        const float* from = source + offsets[t];
        float* to = points + k * pitch;
        for (int64_t p = 0; p < pitch; p += kLanes) {
          Mask mask;
          std::memcpy(&mask, masks + t * masked + p, sizeof(mask));
          store<kLanes>(to + p, Vector<kLanes>(Mask(load<kLanes>(from + p)) & mask));
        }
      }
      float* column = tails + (live_number(conv, live[i]) - live_number(conv, live[0])) * tap_count;
      for (int64_t p = 0; p < tail; ++p, column += span)
        for (int64_t t = 0; t < tap_count; ++t)
          column[t] = masks[t * masked + pitch + p] ? source[offsets[t] + whole + p] : 0.f;
    }
    for_row_groups(tile.row_begin, row_end, [&](int64_t first, int64_t count) {
      const RowGroup group(conv, unit, first, count);
      const float* start = begin == 0 ? group.start : nullptr;
      float* to = out + (first - tile.row_begin) * masked;
      Product product = {group.rows, steps, step_count, points, start};
      if (begin + chunk >= unit.live_count) product.floor = group.floor;
      multiply<0, false>(product, count, whole, to, masked, [](int64_t, int64_t) {});
      if (tail == 0) return;
      product.step_count = span;
      product.source = tails;
      dot(product, count, tail, to + whole, masked);
    });
  }
  for (int64_t r = tile.row_begin; r < row_end; ++r, out += masked) {
    if (conv.accumulates) add_target(conv.target, hop, unit.frame, unit.rows[r], out, segments, segment_count);
    if (conv.accumulates || conv.activation != Activation::relu) activate(conv.activation, out, point_count);
    store_route(conv.target, hop, unit.frame, unit.rows[r], out, segments, segment_count);
  }
}

// The units differ in their channels only, so what the geometry asks for is worked out once for all of them.
void convolve_direct(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                     Scratch& scratch) {
  const int64_t grid_height = tile.y_end - tile.y_begin, grid_width = tile.x_end - tile.x_begin;
  if (reads_in_place(conv)) {
    for (int64_t u = 0; u < unit_count; ++u) convolve_in_place(conv, units[u], tile, scratch);
    return;
  }
  if (gathers_points(conv, units[0])) {
    convolve_gathered(conv, units[0], tile, scratch);
    return;
  }

  // The source channels of a tile are copied once so that every tap of every grid point is a plain offset:
  // zero-padded, and split by stride phase so that neighbouring grid points are neighbours in memory.
  // Grid point (y, x) is number y * pitch + x; the pitch - width points between two rows are computed and dropped,
  // which is cheaper than the nine-fold copy of im2col.
  const int64_t width = grid_width + conv.shift_x, height = grid_height + conv.shift_y;
  const int64_t phase_count = int64_t(conv.phases.size()), tap_count = int64_t(conv.taps.size());
  const int64_t x_first = tile.x_begin * conv.step_x, y_first = tile.y_begin * conv.step_y;
  int64_t shared = 0;  // zeros right of one row and left of the next are stored once
  if (conv.step_x == 1 && phase_count == 1) {
    const int64_t left = x_first + conv.phases[0].dx;
    shared = std::max<int64_t>(0, std::min({-left, left + width - conv.source.width, conv.shift_x}));
  }
  const int64_t pitch = width - shared;
  const int64_t plane = height * pitch + shared, channel = phase_count * plane;
  const int64_t point_count = (grid_height - 1) * pitch + grid_width;

  int64_t live_most = 0;
  for (int64_t u = 0; u < unit_count; ++u) live_most = std::max(live_most, units[u].live_count);
  if (tap_count == 0) live_most = 0;
  if (live_most * channel > INT32_MAX) throw std::runtime_error("the convolution is too large");
  Layout layout;
  const int64_t windows_at = layout.add<Window>(phase_count);
  const int64_t steps_at = layout.add<Step>(live_most * tap_count);
  const int64_t source_at = layout.add<float>(live_most * channel + kTilePixels);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  Window* windows = reinterpret_cast<Window*>(memory + windows_at);
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  float* source = reinterpret_cast<float*>(memory + source_at);
  for (int64_t p = 0; p < phase_count; ++p)
    windows[p] = window_of(conv.source, y_first + conv.phases[size_t(p)].dy, x_first + conv.phases[size_t(p)].dx,
                           height, width, conv.step_y, conv.step_x);

  const auto segments = [&](int64_t at, int64_t count, Segment* list) {
    int64_t n = 0;
    int64_t y = at / pitch, x = at % pitch;
    for (int64_t from = 0; from < count; ++y, x = 0) {
      const int64_t run = std::min(pitch - x, count - from), kept = std::min(run, grid_width - x);
      if (kept > 0) list[n++] = {from, target_offset(conv, tile.y_begin + y, tile.x_begin + x), kept};
      from += run;
    }
    return n;
  };

  int64_t steps_made = 0;
  for (int64_t u = 0; u < unit_count; ++u) {
    const Unit& unit = units[u];
    const int64_t live_count = tap_count == 0 ? 0 : unit.live_count, step_count = live_count * tap_count;
    for (int64_t i = 0; i < live_count; ++i)
      copy_phases(source + i * channel, plane, pitch, conv.source, unit.source_frame, unit.live[i], windows,
                  phase_count);
    // Register tiles read past the last point: those lanes are dropped, but must be readable.
    for (int64_t i = 0; i < kTilePixels; ++i) source[live_count * channel + i] = 0;
    // Units with one live channel all have the same steps, because weights count from the first live channel.
    if (live_count != 1 || steps_made != 1) {
      Step* step = steps;
      for (int64_t i = 0; i < live_count; ++i) {
        const int64_t weight = live_weight(conv, unit.live[i]) - live_weight(conv, unit.live[0]);
        for (const Tap& tap : conv.taps)
          *step++ = {int32_t(weight + tap.weight),
                     int32_t(i * channel + tap.phase * plane + tap.shift_y * pitch + tap.shift_x)};
      }
      steps_made = live_count;
    }
    multiply_and_store(conv, unit, tile, source, steps, step_count, point_count, segments);
  }
}

}  // namespace
}  // namespace adakernels
