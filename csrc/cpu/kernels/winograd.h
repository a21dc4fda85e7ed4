// Winograd convolution F(2x2, 3x3): 16 multiplications for the 36 of a 2x2 block of outputs (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016). Rows and live channels are lists, as everywhere.
#pragma once

#include "direct.h"
#include "transpose.h"

namespace adakernels {
namespace {

constexpr int kPoints = 16;  // of a transformed 4x4 block

// kernels[k][i] = value k of the 3x3 kernel of channel first + i, for i < count.
inline void gather_kernels(const float* weights, const float* limit, int64_t stride, int64_t count,
                           float kernels[9][kLanes]) {
  int k = 0;
  if (count == kLanes)
    for (; k < 9 && weights + (kLanes - 1) * stride + k + kLanes <= limit; k += kLanes) {
      float block[kLanes][kLanes];
      const float* rows[kLanes];
      for (int i = 0; i < kLanes; ++i) rows[i] = weights + i * stride + k;
      transpose(rows, block[0], kLanes);
      for (int j = 0; j < kLanes && k + j < 9; ++j) store<kLanes>(kernels[k + j], load<kLanes>(block[j]));
    }
  for (; k < 9; ++k)
    for (int64_t i = 0; i < count; ++i) kernels[k][i] = weights[i * stride + k];
}

// The 16 values of G g G^T of one row's kernels: transformed[point * point_stride + channel].
// The nine values of a kernel lie next to each other, in any order.
void winograd_weights(const Convolution& conv, int64_t row, int64_t channel_count, float* transformed,
                      int64_t point_stride) {
  using V = Vector<kLanes>;
  int32_t at[3][3];
  for (const Tap& tap : conv.taps) at[tap.dy - conv.phases[0].dy][tap.dx - conv.phases[0].dx] = tap.weight;
  const float* weights = conv.weight + row * conv.weight_row;
  for (int64_t first = 0; first < channel_count; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channel_count - first);
    float kernels[9][kLanes] = {};
    gather_kernels(weights + first * conv.weight_channel, conv.weight + conv.weight_extent, conv.weight_channel, count,
                   kernels);
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
inline void transform_block_row(const float* patch, int64_t plane, int64_t pitch, int64_t block_count, float* point,
                                int64_t stride) {
  using V = Vector<kLanes>;
  for (int64_t t = 0; t < block_count; t += kLanes) {
    V rows[4][4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) {
      V d[4];
#pragma GCC unroll 4
      for (int y = 0; y < 4; ++y)
        d[y] = load<kLanes>(patch + (2 * (y & 1) + (x & 1)) * plane + (y >> 1) * pitch + (x >> 1) + t);
      rows[0][x] = d[0] - d[2];
      rows[1][x] = d[1] + d[2];
      rows[2][x] = d[2] - d[1];
      rows[3][x] = d[1] - d[3];
    }
#pragma GCC unroll 4
    for (int y = 0; y < 4; ++y) {
      float* to = point + 4 * y * stride + t;
      store<kLanes>(to, rows[y][0] - rows[y][2]);
      store<kLanes>(to + stride, rows[y][1] + rows[y][2]);
      store<kLanes>(to + 2 * stride, rows[y][2] - rows[y][1]);
      store<kLanes>(to + 3 * stride, rows[y][1] - rows[y][3]);
    }
  }
}

// The outputs A^T m A of `block_count` blocks, even columns and odd ones interleaved: upper[2 t + x], lower[2 t + x].
inline void transform_back(const float* products, int64_t stride, int64_t block_count, float bias,
                           Activation activation, float* upper, float* lower) {
  using V = Vector<kLanes>;
  typename VectorOf<kLanes>::integer first, second;
  for (int i = 0; i < kLanes; ++i) {
    first[i] = i / 2 + (i & 1) * kLanes;
    second[i] = first[i] + kLanes / 2;
  }
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
      store<kLanes>(to + 2 * t, __builtin_shuffle(left, right, first));
      store<kLanes>(to + 2 * t + kLanes, __builtin_shuffle(left, right, second));
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
        room((count + kTilePixels + 15) / 16 * 16) {}
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
  // The four phases of one channel, and what is read and written past them.
  const int64_t patch_size = 4 * plane + 2 * kTilePixels;
  float* patch = static_cast<float*>(scratch.reserve(patch_size * 4));
  for (int64_t i = 0; i < patch_size; ++i) patch[i] = 0;
  for (int64_t i = 0; i < unit.live_count; ++i) {
    for (int p = 0; p < 4; ++p)
      copy_route(patch + p * plane, width, conv.source, unit.frame, unit.live[i], windows[p]);
    // In order, because each row of blocks overruns into the next one or the next channel.
    for (int64_t y = 0; y < blocks.rows; ++y)
      transform_block_row(patch + y * width, plane, width, blocks.columns,
                          points + i * blocks.count + y * blocks.columns, slice);
  }
}

// Multiplies and stores part `part` of `part_count` of the rows of units that share a tile's geometry. Point by point,
// so that the weights of one point serve all units before those of the next are read.
// points: [unit][winograd_points_size]
void winograd_rows(const Convolution& conv, const Unit* units, int64_t unit_count, const Tile& tile,
                   const float* points, int64_t part, int64_t part_count, Scratch& scratch) {
  const Blocks blocks(tile);
  const auto begin_of = [&](const Unit& unit, int64_t i) {
    const int64_t rows = std::min(tile.row_end, unit.row_count) - tile.row_begin;
    return tile.row_begin + rows * i / part_count;
  };
  int64_t live_most = 0, rows_most = 0;
  for (int64_t u = 0; u < unit_count; ++u) {
    live_most = std::max(live_most, units[u].live_count);
    rows_most = std::max(rows_most, begin_of(units[u], part + 1) - begin_of(units[u], part));
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
      const int64_t slice = blocks.slice(unit.live_count), begin = begin_of(unit, part);
      for_row_groups(begin, begin_of(unit, part + 1), [&](int64_t first, int64_t count) {
        const float* rows[kRows];
        for (int64_t r = 0; r < count; ++r)
          rows[r] = conv.winograd.weight + unit.rows[first + r].channel * conv.winograd.row_stride +
                    point * conv.winograd.point_stride;
        const Product product = {rows, steps + u * live_most, unit.live_count, unit_points + point * slice, zero};
        multiply<false, false>(product, count, blocks.count,
                               products + (u * rows_most + first - begin) * row_room + point * blocks.room, row_room,
                               [](int64_t, int64_t) {});
      });
      unit_points += kPoints * slice;
    }
  }
  for (int64_t u = 0; u < unit_count; ++u) {
    const Unit& unit = units[u];
    const int64_t begin = begin_of(unit, part), end = begin_of(unit, part + 1);
    for (int64_t r = begin; r < end; ++r) {
      const Route& route = unit.rows[r];
      transform_back(products + (u * rows_most + r - begin) * row_room, blocks.room, blocks.count,
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
  const int64_t parts = (tile.row_end - tile.row_begin + kRows - 1) / kRows;
  for (int64_t part = 0; part < parts; ++part)
    winograd_rows(conv, &unit, 1, tile, points, part, parts, scratch);
}

}  // namespace
}  // namespace adakernels
