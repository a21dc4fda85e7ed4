// Winograd convolution F(2x2, 3x3): 16 multiplications for the 36 of a 2x2 block of outputs (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2016). Rows and live channels are lists, as everywhere.
#pragma once

#include "direct.h"

namespace adakernels {
namespace {

constexpr int kPoints = 16;  // of a transformed 4x4 block

// The 16 values of G g G^T of one row's kernels: transformed[point * point_stride + channel].
void winograd_weights(const Convolution& conv, int64_t row, int64_t channel_count, float* transformed,
                      int64_t point_stride) {
  using V = Vector<kLanes>;
  int32_t at[9];  // where the kernel's values lie
  for (const Tap& tap : conv.taps) at[3 * (tap.dy - conv.phases[0].dy) + tap.dx - conv.phases[0].dx] = tap.weight;
  const float* weights = conv.weight + row * conv.weight_row;
  for (int64_t first = 0; first < channel_count; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channel_count - first);
    float kernels[9][kLanes] = {};
    for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 9
      for (int k = 0; k < 9; ++k) kernels[k][i] = weights[(first + i) * conv.weight_channel + at[k]];
    V g[4][3];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x) {
      const V a = load<kLanes>(kernels[x]), b = load<kLanes>(kernels[3 + x]), c = load<kLanes>(kernels[6 + x]);
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

// One tile of one unit: its grid rectangle counts blocks of 2x2 outputs, and it spans whole rows of blocks.
void convolve_winograd(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  const int64_t block_rows = tile.y_end - tile.y_begin, block_columns = tile.x_end;
  const int64_t blocks = block_rows * block_columns;
  const int64_t live = unit.live_count;

  // A patch holds the four phases of one channel.
  const int64_t width = block_columns + 1, height = block_rows + 1, plane = width * height;
  const int64_t slice = live * blocks + kTilePixels;  // one point of all live channels
  constexpr int64_t most_products = kRows * kPoints;
  const int64_t room = (blocks + kTilePixels + 15) / 16 * 16;
  Layout layout;
  const int64_t patch_at = layout.add<float>(4 * plane + 2 * kTilePixels);
  const int64_t points_at = layout.add<float>(kPoints * slice);
  const int64_t products_at = layout.add<float>(most_products * room);
  const int64_t outputs_at = layout.add<float>(2 * (2 * room));
  const int64_t steps_at = layout.add<Step>(live);
  const int64_t segments_at = layout.add<Segment>(2 * block_rows);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  float* patch = reinterpret_cast<float*>(memory + patch_at);
  float* points = reinterpret_cast<float*>(memory + points_at);
  float* products = reinterpret_cast<float*>(memory + products_at);
  float* upper = reinterpret_cast<float*>(memory + outputs_at);
  float* lower = upper + 2 * room;
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  Segment* segments = reinterpret_cast<Segment*>(memory + segments_at);

  Window windows[4];
  for (int p = 0; p < 4; ++p)
    windows[p] = window_of(conv.source, 2 * tile.y_begin + conv.phases[0].dy + p / 2, conv.phases[0].dx + p % 2, height,
                           width, 2, 2);
  for (int64_t i = 0; i < 4 * plane + 2 * kTilePixels; ++i) patch[i] = 0;
  for (int64_t i = 0; i < live; ++i) {
    for (int p = 0; p < 4; ++p)
      copy_route(patch + p * plane, width, conv.source, unit.frame, unit.live[i], windows[p]);
    // Rows of blocks are written in order, because each overruns into the next.
    for (int64_t y = 0; y < block_rows; ++y)
      transform_block_row(patch + y * width, plane, width, block_columns, points + i * blocks + y * block_columns,
                          slice);
    steps[i] = {unit.live[i].channel, int32_t(i * blocks)};
  }

  int64_t segment_count[2] = {0, 0};
  for (int64_t y = 0; y < block_rows; ++y)
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t row = 2 * (tile.y_begin + y) + half;
      if (row < conv.grid_height)
        segments[half * block_rows + segment_count[half]++] = {2 * y * block_columns, target_offset(conv, row, 0),
                                                               conv.grid_width};
    }

  const float zero[kRows] = {};
  const int64_t hop = conv.target_step_x * conv.target.column_stride;
  for_row_groups(tile.row_begin, tile.row_end, [&](int64_t first, int64_t count) {
    const float* rows[kRows];
    for (int64_t point = 0; point < kPoints; ++point) {
      for (int64_t r = 0; r < count; ++r)
        rows[r] = conv.winograd.weight + unit.rows[first + r].channel * conv.winograd.row_stride +
                  point * conv.winograd.point_stride;
      const Product product = {rows, steps, live, points + point * slice, zero};
      multiply<false, false>(product, count, blocks, products + point * room, kPoints * room, [](int64_t, int64_t) {});
    }
    for (int64_t r = 0; r < count; ++r) {
      const Route& route = unit.rows[first + r];
      transform_back(products + r * kPoints * room, room, blocks, conv.bias ? conv.bias[route.channel] : 0.f,
                     conv.activation, upper, lower);
      store_route(conv.target, hop, unit.frame, route, upper, segments, segment_count[0]);
      store_route(conv.target, hop, unit.frame, route, lower, segments + block_rows, segment_count[1]);
    }
  });
}

}  // namespace
}  // namespace adakernels
