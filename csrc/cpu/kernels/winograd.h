// Winograd convolution F(2x2, 3x3): 16 multiplications for the 36 of a 2x2 block of outputs (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016). Rows and live channels are lists, as everywhere.
#pragma once

#include <cstdlib>

#include "direct.h"
#include "transpose.h"

namespace adakernels {
namespace {

constexpr int kPoints = 16;  // of a transformed 4x4 block

// Points are whole cache lines apart, but not a power of two of them: 16 are written at once.
int64_t winograd_point_stride(int64_t channel_count) { return (channel_count + 15) / 16 * 16 + 16; }

// kernels[k][i] = value k of the 3x3 kernel of channel first + i, for i < count.
inline void gather_kernels(const float* weights, const float* limit, int64_t stride, int64_t count, int64_t tap_stride,
                           float kernels[9][kLanes]) {
  int k = 0;
  if (stride == 1 && count == kLanes)
    for (; k < 9; ++k) store<kLanes>(kernels[k], load<kLanes>(weights + k * tap_stride));
  if (tap_stride == 1 && count == kLanes)
    for (; k < 9 && weights + (kLanes - 1) * stride + k + kLanes <= limit; k += kLanes) {
      float block[kLanes][kLanes];
      const float* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = weights + i * stride + k;
      transpose(rows, block[0], kLanes);
      for (int j = 0; j < kLanes && k + j < 9; ++j) store<kLanes>(kernels[k + j], load<kLanes>(block[j]));
    }
  for (; k < 9; ++k)
    for (int64_t i = 0; i < kLanes; ++i) kernels[k][i] = i < count ? weights[i * stride + k * tap_stride] : 0.f;
}

// The 16 values of G g G^T of one row's kernels: transformed[point * point_stride + channel].
// The nine values of a kernel lie the same distance apart.
void winograd_weights(const Convolution& conv, int64_t row, int64_t channel_count, float* transformed,
                      int64_t point_stride) {
  using V = Vector<kLanes>;
  int32_t at[3][3];  // which of the nine values, in the order they lie in, a position has
  const int64_t tap_stride = std::abs(conv.taps[1].weight - conv.taps[0].weight);
  for (const Tap& tap : conv.taps)
    at[tap.dy - conv.phases[0].dy][tap.dx - conv.phases[0].dx] = int32_t(tap.weight / tap_stride);
  const float* weights = conv.weight + row * conv.weight_row;
  for (int64_t first = 0; first < channel_count; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channel_count - first);
    float kernels[9][kLanes];
    // Asked for early: the next kernels come from memory, or from a cache that other cores share.
    for (int line = 0; line < 9 * kLanes; line += 16)
      __builtin_prefetch(weights + (first + 4 * kLanes) * conv.weight_channel + line);
    gather_kernels(weights + first * conv.weight_channel, conv.weight + conv.weight_extent, conv.weight_channel, count,
                   tap_stride, kernels);
    V g[4][3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      const V a = load<kLanes>(kernels[at[0][x]]), b = load<kLanes>(kernels[at[1][x]]);
      const V c = load<kLanes>(kernels[at[2][x]]);
      g[0][x] = a;
      g[1][x] = 0.5f * (a + b + c);
      g[2][x] = 0.5f * (a - b + c);
      g[3][x] = c;
    }
    const auto put = [&](int point, V value) {
      float* to = transformed + point * point_stride + first;
      if (count == kLanes) {
        store<kLanes>(to, value);
      } else {
        for (int64_t i = 0; i < count; ++i) to[i] = value[i];
      }
    };
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      put(4 * y, g[y][0]);
      put(4 * y + 1, 0.5f * (g[y][0] + g[y][1] + g[y][2]));
      put(4 * y + 2, 0.5f * (g[y][0] - g[y][1] + g[y][2]));
      put(4 * y + 3, g[y][2]);
    }
  }
}

// point[p * stride + t] = the 16 values of B^T d B for the blocks of one row of blocks; d lies in four phases.
template <int lanes>
inline void transform_block_row(const float* patch, int64_t plane, int64_t pitch, int64_t block_count, float* point,
                                int64_t stride) {
  using V = Vector<lanes>;
  for (int64_t t = 0; t < block_count; t += lanes) {
    V rows[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      V d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y)
        d[y] = load<lanes>(patch + (2 * (y & 1) + (x & 1)) * plane + (y >> 1) * pitch + (x >> 1) + t);
      rows[0][x] = d[0] - d[2];
      rows[1][x] = d[1] + d[2];
      rows[2][x] = d[2] - d[1];
      rows[3][x] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      float* to = point + 4 * y * stride + t;
      store<lanes>(to, rows[y][0] - rows[y][2]);
      store<lanes>(to + stride, rows[y][1] + rows[y][2]);
      store<lanes>(to + 2 * stride, rows[y][2] - rows[y][1]);
      store<lanes>(to + 3 * stride, rows[y][1] - rows[y][3]);
    }
  }
}

// The outputs A^T m A of `block_count` blocks, even columns and odd ones interleaved: upper[2 t + x], lower[2 t + x].
inline void transform_back(const float* products, int64_t stride, int64_t block_count, float bias,
                           Activation activation, float* upper, float* lower) {
  using V = Vector<kLanes>;
  constexpr auto first = indices<kLanes>([](int i) { return i / 2 + (i & 1) * kLanes; });
  constexpr auto second = indices<kLanes>([](int i) { return i / 2 + (i & 1) * kLanes + kLanes / 2; });
  for (int64_t t = 0; t < block_count; t += kLanes) {
    V top[4], bottom[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      V m[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y) m[y] = load<kLanes>(products + (4 * y + x) * stride + t);
      top[x] = m[0] + m[1] + m[2];
      bottom[x] = m[1] - m[2] - m[3];
    }
    const auto finish = [&](const V* s, float* to) {
      const V left = activate<kLanes>(activation, s[0] + s[1] + s[2] + bias);
      const V right = activate<kLanes>(activation, s[1] - s[2] - s[3] + bias);
      store<kLanes>(to + 2 * t, shuffle<kLanes>(left, right, first));
      store<kLanes>(to + 2 * t + kLanes, shuffle<kLanes>(left, right, second));
    };
    finish(top, upper);
    finish(bottom, lower);
  }
}

// Sizes of a tile's blocks. The tile counts blocks of 2x2 outputs, and spans whole rows of them.
struct Blocks {
  int64_t rows, columns, count;
  int64_t room;  // of one point of one row, with what register tiles write past the last block
  int64_t slice(int64_t live_count) const { return live_count * count + kTilePixels; }

  explicit Blocks(const Tile& tile)
      : rows(tile.y_end - tile.y_begin),
        columns(tile.x_end),
        count(rows * columns),
        room(count <= kVectors * kLanes ? (count + kLanes - 1) / kLanes * kLanes : count + kTilePixels) {}
};

int64_t winograd_points_size(const Tile& tile, int64_t live_count) {
  return kPoints * Blocks(tile).slice(live_count);
}

// Transforms the live channels of a unit: points[point][live channel][block].
void winograd_points(const Convolution& conv, const Unit& unit, const Tile& tile, float* points, Scratch& scratch) {
  const Blocks blocks(tile);
  const int64_t width = blocks.columns + 1, height = blocks.rows + 1, plane = width * height;
  const int64_t slice = blocks.slice(unit.live_count);
  Window windows[4];
  for (int p = 0; p < 4; ++p)
    windows[p] = window_of(conv.source, 2 * tile.y_begin + conv.phases[0].dy + p / 2, conv.phases[0].dx + p % 2, height,
                           width, 2, 2);
  // Vectors as long as a row of blocks, where that is short.
  const auto transform = blocks.columns <= 4                    ? transform_block_row<4>
                         : blocks.columns <= kLanes / 2 ? transform_block_row<(kLanes > 8 ? kLanes / 2 : kLanes)>
                                                        : transform_block_row<kLanes>;
  // The four phases of one channel, and what is read and written past them.
  const int64_t patch_size = 4 * plane + 2 * kTilePixels;
  float* patch = static_cast<float*>(scratch.reserve(patch_size * 4));
  for (int64_t i = 0; i < patch_size; ++i) patch[i] = 0;
  for (int64_t i = 0; i < unit.live_count; ++i) {
    copy_phases(patch, plane, width, conv.source, unit.frame, unit.live[i], windows, 4);
    // In order, because each row of blocks may overrun into the next one or the next channel.
    for (int64_t y = 0; y < blocks.rows; ++y)
      transform(patch + y * width, plane, width, blocks.columns, points + i * blocks.count + y * blocks.columns,
                slice);
  }
}

// Multiplies and stores the rows of units that share a tile's geometry. Point by point, so that the weights of one
// point serve all units before those of the next are read. points: [unit][winograd_points_size]
inline void winograd_rows(const Convolution& conv, const WinogradWeights& weights, const Unit* units,
                          int64_t unit_count, const Tile& tile, const float* points, Scratch& scratch) {
  const Blocks blocks(tile);
  int64_t live_most = 0, rows_most = 0;
  for (int64_t u = 0; u < unit_count; ++u) {
    live_most = std::max(live_most, units[u].live_count);
    rows_most = std::max(rows_most, units[u].row_count);
  }
  Layout layout;
  const int64_t products_at = layout.add<float>(unit_count * rows_most * kPoints * blocks.room);
  const int64_t outputs_at = layout.add<float>(4 * blocks.room);
  const int64_t steps_at = layout.add<Step>(unit_count * live_most);
  const int64_t segments_at = layout.add<Segment>(2 * blocks.rows);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  float* products = reinterpret_cast<float*>(memory + products_at);
  float* upper = reinterpret_cast<float*>(memory + outputs_at);
  float* lower = upper + 2 * blocks.room;
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  Segment* segments = reinterpret_cast<Segment*>(memory + segments_at);

  for (int64_t u = 0; u < unit_count; ++u)
    for (int64_t i = 0; i < units[u].live_count; ++i)
      steps[u * live_most + i] = {units[u].live[i].channel, int32_t(i * blocks.count)};
  int64_t segment_count[2] = {0, 0};
  for (int64_t y = 0; y < blocks.rows; ++y)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = 2 * (tile.y_begin + y) + half;
      if (row < conv.grid_height)
        segments[half * blocks.rows + segment_count[half]++] = {2 * y * blocks.columns, target_offset(conv, row, 0),
                                                                conv.grid_width};
    }

  const float zero[kRows] = {};
  const int64_t hop = conv.target_step_x * conv.target.column_stride;
  const int64_t row_room = kPoints * blocks.room;
  for (int64_t point = 0; point < kPoints; ++point) {
    const float* unit_points = points;
    for (int64_t u = 0; u < unit_count; ++u) {
      const Unit& unit = units[u];
      const int64_t slice = blocks.slice(unit.live_count);
      for_row_groups(0, unit.row_count, [&](int64_t first, int64_t count) {
        const float* rows[kRows];
        for (int64_t r = 0; r < count; ++r)
          rows[r] = weights.weight + unit.rows[first + r].channel * weights.row_stride + point * weights.point_stride;
        const Product product = {rows, steps + u * live_most, unit.live_count, unit_points + point * slice, zero};
        multiply<false, false>(product, count, blocks.count,
                               products + (u * rows_most + first) * row_room + point * blocks.room, row_room,
                               [](int64_t, int64_t) {});
      });
      unit_points += kPoints * slice;
    }
  }
  for (int64_t u = 0; u < unit_count; ++u) {
    const Unit& unit = units[u];
    for (int64_t r = 0; r < unit.row_count; ++r) {
      const Route& route = unit.rows[r];
      transform_back(products + (u * rows_most + r) * row_room, blocks.room, blocks.count,
                     conv.bias ? conv.bias[route.channel] : 0.f, conv.activation, upper, lower);
      store_route(conv.target, hop, unit.frame, route, upper, segments, segment_count[0]);
      store_route(conv.target, hop, unit.frame, route, lower, segments + blocks.rows, segment_count[1]);
    }
  }
}

// One tile of one unit, by groups of rows whose products stay close.
void convolve_winograd(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  float* points = static_cast<float*>(scratch.reserve(winograd_points_size(tile, unit.live_count) * 4, 1));
  winograd_points(conv, unit, tile, points, scratch);
  for_row_groups(tile.row_begin, tile.row_end, [&](int64_t first, int64_t count) {
    Unit group = unit;
    group.rows += first;
    group.row_count = count;
    winograd_rows(conv, conv.winograd, &group, 1, tile, points, scratch);
  });
}

// Rows [row_begin, row_end) of several units: their kernels are transformed here and stay close for all of them.
void convolve_winograd_rows(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                            const float* points, int64_t row_begin, int64_t row_end, int64_t channel_count,
                            Scratch& scratch) {
  WinogradWeights weights;
  weights.point_stride = winograd_point_stride(channel_count);
  weights.row_stride = kPoints * weights.point_stride;
  Layout layout;
  const int64_t units_at = layout.add<Unit>(unit_count);
  const int64_t used_at = layout.add<bool>(row_end - row_begin);
  const int64_t weights_at = layout.add<float>((row_end - row_begin) * weights.row_stride);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes(), 1));
  Unit* parts = reinterpret_cast<Unit*>(memory + units_at);
  bool* used = reinterpret_cast<bool*>(memory + used_at);
  float* transformed = reinterpret_cast<float*>(memory + weights_at);
  for (int64_t r = row_begin; r < row_end; ++r) used[r - row_begin] = false;
  for (int64_t u = 0; u < unit_count; ++u) {
    Unit& part = parts[u] = units[u];
    for (; part.row_count > 0 && part.rows->channel < row_begin; ++part.rows) --part.row_count;
    int64_t count = 0;
    for (; count < part.row_count && part.rows[count].channel < row_end; ++count)
      used[part.rows[count].channel - row_begin] = true;
    part.row_count = count;
  }
  for (int64_t r = row_begin; r < row_end; ++r)
    if (used[r - row_begin])
      winograd_weights(conv, r, channel_count, transformed + (r - row_begin) * weights.row_stride,
                       weights.point_stride);
  weights.weight = transformed - row_begin * weights.row_stride;
  winograd_rows(conv, weights, parts, unit_count, tile, points, scratch);
}

}  // namespace
}  // namespace adakernels
