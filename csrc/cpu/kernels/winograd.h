// Winograd convolution of 3x3 kernels, by blocks of 2x2 or 4x4 outputs (Lavin and Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016). Rows and live channels are lists, as everywhere.
#pragma once

#include <algorithm>
#include <cstdlib>

#include "direct.h"
#include "transpose.h"

namespace adakernels {
namespace {

// What Winograd's method does along one dimension to make `outputs` neighbouring outputs: `size` pixels of the source,
// of which the next block's start `step` pixels on, are transformed to as many points. Point i is multiplied by point
// kernel[i] of the transformed kernel and added to sum[i], and the sums give the outputs.

// F(2, 3): 4 multiplications for 6.
struct UnitStrideBy2 {
  static constexpr int outputs = 2, step = 2, size = 4, sums = 4;
  static constexpr int kernel[size] = {0, 1, 2, 3}, sum[size] = {0, 1, 2, 3};

  template <typename V>
  static void transform_kernel(V a, V b, V c, V* g) {
    g[0] = a;
    g[1] = 0.5f * (a + b + c);
    g[2] = 0.5f * (a - b + c);
    g[3] = c;
  }
  template <typename V>
  static void transform_source(const V* d, V* point) {
    point[0] = d[0] - d[2];
    point[1] = d[1] + d[2];
    point[2] = d[2] - d[1];
    point[3] = d[1] - d[3];
  }
  template <typename V>
  static void transform_back(const V* m, V* out) {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
};

// F(4, 3): 6 multiplications for 12. It interpolates at 0, ±√½, ±√2 and infinity, because powers that differ little
// keep more digits than those of the customary 0, ±1, ±2.
struct UnitStrideBy4 {
  static constexpr int outputs = 4, step = 4, size = 6, sums = 6;
  static constexpr int kernel[size] = {0, 1, 2, 3, 4, 5}, sum[size] = {0, 1, 2, 3, 4, 5};
  static constexpr float p = 0.70710678f, q = 1.41421356f;  // their squares are 1/2 and 2

  template <typename V>
  static void transform_kernel(V a, V b, V c, V* g) {
    const V even_p = (-2.f / 3) * a - (1.f / 3) * c, odd_p = (-2.f / 3 * p) * b;
    const V even_q = (1.f / 6) * a + (1.f / 3) * c, odd_q = (1.f / 6 * q) * b;
    g[0] = a;
    g[1] = even_p + odd_p;
    g[2] = even_p - odd_p;
    g[3] = even_q + odd_q;
    g[4] = even_q - odd_q;
    g[5] = c;
  }
  template <typename V>
  static void transform_source(const V* d, V* point) {
    const V even_p = d[4] - 2.f * d[2], odd_p = d[3] - 2.f * d[1];
    const V even_q = d[4] - 0.5f * d[2], odd_q = d[3] - 0.5f * d[1];
    point[0] = d[0] + d[4] - 2.5f * d[2];
    point[1] = even_p + p * odd_p;
    point[2] = even_p - p * odd_p;
    point[3] = even_q + q * odd_q;
    point[4] = even_q - q * odd_q;
    point[5] = d[1] + d[5] - 2.5f * d[3];
  }
  template <typename V>
  static void transform_back(const V* m, V* out) {
    const V even_p = m[1] + m[2], odd_p = m[1] - m[2], even_q = m[3] + m[4], odd_q = m[3] - m[4];
    out[0] = m[0] + even_p + even_q;
    out[1] = p * odd_p + q * odd_q;
    out[2] = 0.5f * even_p + 2.f * even_q;
    out[3] = m[5] + (0.5f * p) * odd_p + (2.f * q) * odd_q;
  }
};

// At stride 2 the outer taps read odd pixels, to which they are a kernel of two taps at stride 1, F(2, 2); the middle
// one reads even pixels, each for one output, and its products join the sums that go to that output alone: 5 for 6.
// Blocks of 4 would take 9 for 12, but also more sums, kernels and vectors than registers hold, and were slower.
struct StrideTwo {
  static constexpr int outputs = 2, step = 4, size = 5, sums = 3;
  static constexpr int kernel[size] = {0, 3, 1, 3, 2}, sum[size] = {0, 0, 1, 2, 2};

  template <typename V>
  static void transform_kernel(V a, V b, V c, V* g) {
    g[0] = a;
    g[1] = a + c;
    g[2] = c;
    g[3] = b;
  }
  template <typename V>
  static void transform_source(const V* d, V* point) {
    point[0] = d[0] - d[2];
    point[1] = d[1];
    point[2] = d[2];
    point[3] = d[3];
    point[4] = d[4] - d[2];
  }
  template <typename V>
  static void transform_back(const V* m, V* out) {
    out[0] = m[0] + m[1];
    out[1] = m[1] + m[2];
  }
};

template <typename Use>
inline auto with_method(const Convolution& conv, const Use& use) {
  if (conv.step_y == 2) return use(StrideTwo{});
  return conv.winograd.block == 2 ? use(UnitStrideBy2{}) : use(UnitStrideBy4{});
}

// What the sums of as many rows take as are computed together.
constexpr int64_t kSumBytes = 256 * 1024;

// How many pixels of so many steps these are, in whole register tiles.
inline int64_t close_pixels(int64_t step_count) {
  constexpr int64_t width = kVectors * kLanes;
  return std::max<int64_t>(1, kCloseBytes / (4 * width * std::max<int64_t>(1, step_count))) * width;
}

// The tap of the smallest offsets, be they in ascending order or, as in a gradient, in descending order.
inline const Tap& first_tap(const Convolution& conv) {
  const Tap &front = conv.taps.front(), &back = conv.taps.back();
  return front.dy < back.dy ? front : back;
}

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

// The points of one row's kernels: transformed[point * point_stride + channel].
// The nine values of a kernel lie the same distance apart.
template <typename Method>
inline void transform_kernels(const Convolution& conv, int64_t row, int64_t channel_count, float* transformed,
                              int64_t point_stride) {
  using V = Vector<kLanes>;
  constexpr int side = Method::outputs + 2;  // points of a kernel in one dimension
  const Tap& corner = first_tap(conv);
  int32_t at[3][3];  // which of the nine values, in the order they lie in, a position has
  const int64_t tap_stride = std::abs(conv.taps[1].weight - conv.taps[0].weight);
  for (const Tap& tap : conv.taps) at[tap.dy - corner.dy][tap.dx - corner.dx] = int32_t(tap.weight / tap_stride);
  const float* weights = conv.weight + row * conv.weight_row;
  const int64_t stride = number_stride(conv);
  for (int64_t first = 0; first < channel_count; first += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, channel_count - first);
    float kernels[9][kLanes];
    // Asked for early: the next kernels come from memory, or from a cache that other cores share.
    for (int line = 0; line < 9 * kLanes; line += 16)
      __builtin_prefetch(weights + (first + 4 * kLanes) * stride + line);
    gather_kernels(weights + first * stride, conv.weight + conv.weight_extent, stride, count, tap_stride, kernels);
    V columns[3][side];
#pragma GCC unroll 3
    for (int x = 0; x < 3; ++x)
      Method::transform_kernel(load<kLanes>(kernels[at[0][x]]), load<kLanes>(kernels[at[1][x]]),
                               load<kLanes>(kernels[at[2][x]]), columns[x]);
#pragma GCC unroll 6
    for (int y = 0; y < side; ++y) {
      V points[side];
      Method::transform_kernel(columns[0][y], columns[1][y], columns[2][y], points);
#pragma GCC unroll 6
      for (int x = 0; x < side; ++x) {
        float* to = transformed + (side * y + x) * point_stride + first;
        if (count == kLanes) {
          store<kLanes>(to, points[x]);
        } else {
          for (int64_t i = 0; i < count; ++i) to[i] = points[x][i];
        }
      }
    }
  }
}

void winograd_weights(const Convolution& conv, int64_t row, int64_t channel_count, float* transformed,
                      int64_t point_stride) {
  with_method(conv, [&](auto method) {
    transform_kernels<decltype(method)>(conv, row, channel_count, transformed, point_stride);
  });
}

// The rows of pixels that the blocks of a tile read, wherever they lie; zeros stand for rows outside the source.
struct PixelRows {
  const float* data;
  int64_t offset, pitch;  // of row 0, and between rows
  int64_t begin, end;     // the rows inside the source
  const float* zeros;
  const float* operator[](int64_t y) const { return y >= begin && y < end ? data + offset + y * pitch : zeros; }
};

// How many pixels of a row are read for `columns` blocks by vectors of `lanes`.
template <typename Method>
constexpr int64_t reach(int64_t columns, int64_t lanes) {
  return ((columns + lanes - 1) / lanes * Method::step + 1) * lanes;
}

// Pixels number x of `lanes` neighbouring blocks go to d[x]; masks clear those outside the source.
template <typename Method, int lanes>
inline void split_row(const float* pixels, const int32_t* masks, Vector<lanes>* d) {
  using V = Vector<lanes>;
  using Mask = typename VectorOf<lanes>::integer;
  constexpr int step = Method::step;
  V v[step];
#pragma GCC unroll 4
  for (int p = 0; p < step; ++p) v[p] = load<lanes>(pixels + p * lanes);
  deinterleave<step, lanes>(v);
  const V next = load<lanes>(pixels + step * lanes);
#pragma GCC unroll 6
  for (int x = 0; x < Method::size; ++x) {
    V pixel = v[x % step];
    if (x >= step) {
      constexpr auto first = indices<lanes>([](int i) { return i + 1; });
      constexpr auto second = indices<lanes>([](int i) { return i + 1 + (i + 1 == lanes); });
      pixel = x == step ? shuffle<lanes>(pixel, next, first) : shuffle<lanes>(pixel, next, second);
    }
    Mask mask;
    std::memcpy(&mask, masks + x * lanes, sizeof(mask));
    d[x] = V(Mask(pixel) & mask);
  }
}

// Transforms the blocks of a channel, and fetches rows of the next one: point p of block t is points[p * stride + t].
// Vectors may overrun a row of blocks, into the next one or the next channel, so what they overrun is written after.
template <typename Method, int lanes>
inline void transform_pixels(const PixelRows& rows, const int32_t* masks, int64_t block_rows, int64_t block_columns,
                             float* points, int64_t stride, RowsAhead ahead) {
  using V = Vector<lanes>;
  constexpr int size = Method::size, step = Method::step, kept = size - step;
  for (int64_t t = (block_columns - 1) / lanes * lanes; t >= 0; t -= lanes) {
    const int32_t* mask = masks + t * size;
    float* to = points + t;
    V lines[size][size];  // rows of pixels, transformed along x
    const auto read = [&](int64_t y, V* line) {
      V d[size];
      split_row<Method, lanes>(rows[y] + step * t, mask, d);
      Method::transform_source(d, line);
    };
#pragma GCC unroll 2
    for (int y = 0; y < kept; ++y) read(y, lines[y]);
    for (int64_t b = 0; b < block_rows; ++b, to += block_columns) {
#pragma GCC unroll 4
      for (int y = kept; y < size; ++y) {
        ahead.fetch_next();
        read(step * b + y, lines[y]);
      }
#pragma GCC unroll 6
      for (int x = 0; x < size; ++x) {
        V column[size], transformed[size];
#pragma GCC unroll 6
        for (int y = 0; y < size; ++y) column[y] = lines[y][x];
        Method::transform_source(column, transformed);
#pragma GCC unroll 6
        for (int y = 0; y < size; ++y) store<lanes>(to + (size * y + x) * stride, transformed[y]);
      }
#pragma GCC unroll 2
      for (int y = 0; y < kept; ++y)
#pragma GCC unroll 6
        for (int x = 0; x < size; ++x) lines[y][x] = lines[y + step][x];
    }
    ahead = RowsAhead();
  }
}

// Element i * n + p of n vectors in a row is element i of the given vector p.
template <int n>
inline void interleave(Vector<kLanes>* v) {
  constexpr auto low = indices<kLanes>([](int i) { return i / 2 + (i & 1) * kLanes; });
  constexpr auto high = indices<kLanes>([](int i) { return i / 2 + (i & 1) * kLanes + kLanes / 2; });
  if constexpr (n > 1) {
    Vector<kLanes> even[n / 2], odd[n / 2];
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      even[i] = v[2 * i];
      odd[i] = v[2 * i + 1];
    }
    interleave<n / 2>(even);
    interleave<n / 2>(odd);
#pragma GCC unroll 2
    for (int i = 0; i < n / 2; ++i) {
      v[2 * i] = shuffle<kLanes>(even[i], odd[i], low);
      v[2 * i + 1] = shuffle<kLanes>(even[i], odd[i], high);
    }
  }
}

// The outputs of `block_count` blocks: output (y, x) of block t is out[y * row_stride + outputs * t + x].
template <typename Method>
inline void transform_back(const float* products, int64_t stride, int64_t block_count, float bias,
                           Activation activation, float* out, int64_t row_stride) {
  using V = Vector<kLanes>;
  constexpr int sums = Method::sums, outputs = Method::outputs;
  for (int64_t t = 0; t < block_count; t += kLanes) {
    V columns[sums][outputs];
#pragma GCC unroll 6
    for (int x = 0; x < sums; ++x) {
      V m[sums];
#pragma GCC unroll 6
      for (int y = 0; y < sums; ++y) m[y] = load<kLanes>(products + (sums * y + x) * stride + t);
      Method::transform_back(m, columns[x]);
    }
#pragma GCC unroll 4
    for (int y = 0; y < outputs; ++y) {
      V m[sums], row[outputs];
#pragma GCC unroll 6
      for (int x = 0; x < sums; ++x) m[x] = columns[x][y];
      Method::transform_back(m, row);
#pragma GCC unroll 4
      for (int x = 0; x < outputs; ++x) row[x] = activate<kLanes>(activation, row[x] + bias);
      interleave<outputs>(row);
#pragma GCC unroll 4
      for (int x = 0; x < outputs; ++x) store<kLanes>(out + y * row_stride + outputs * t + x * kLanes, row[x]);
    }
  }
}

// Sizes of a tile's blocks. The tile counts blocks of outputs, and spans whole rows of them.
struct Blocks {
  int64_t rows, columns, count;
  int64_t tail;  // the last blocks, if so few of them are left past whole vectors that their sums are dot products
  int64_t room;  // of one point of one row, in whole vectors as register tiles write it
  // One point of all blocks: [live channel][block], what is read past it, and [tail block][channel] for all channels
  // from the first live one to the last, zero for dead ones, as the weights lie that they meet.
  int64_t slice(const Convolution& conv, const Unit& unit) const {
    return tails(unit) + live_span(conv, unit.live, unit.live_count) * tail;
  }
  int64_t tails(const Unit& unit) const { return unit.live_count * count + kTilePixels; }

  explicit Blocks(const Tile& tile)
      : rows(tile.y_end - tile.y_begin),
        columns(tile.x_end),
        count(rows * columns),
        tail(count % kLanes <= kMostDots ? count % kLanes : 0),
        room((count + kLanes - 1) / kLanes * kLanes) {}
};

int64_t winograd_points_size(const Convolution& conv, const Unit& unit, const Tile& tile) {
  return with_method(conv, [&](auto method) { return method.size * method.size * Blocks(tile).slice(conv, unit); });
}

// Transforms the live channels of a unit: points[point][live channel][block].
template <typename Method>
inline void transform_unit(const Convolution& conv, const Unit& unit, const Tile& tile, float* points,
                           Scratch& scratch) {
  constexpr int step = Method::step, size = Method::size, half = kLanes > 8 ? kLanes / 2 : kLanes;
  const Blocks blocks(tile);
  const int64_t slice = blocks.slice(conv, unit);
  const int64_t height = step * blocks.rows + size - step, width = step * blocks.columns + size - step;
  const Tap& corner = first_tap(conv);
  const Planes& planes = conv.source;
  const Window window = window_of(planes, step * tile.y_begin + corner.dy, corner.dx, height, width, 1, 1);
  // Vectors as long as a row of blocks, where that is short.
  const int lanes = blocks.columns <= 4 ? 4 : blocks.columns <= half ? half : kLanes;
  const auto transform = lanes == 4      ? transform_pixels<Method, 4>
                         : lanes == half ? transform_pixels<Method, half>
                                         : transform_pixels<Method, kLanes>;
  const int64_t read = reach<Method>(blocks.columns, lanes);
  Layout layout;
  const int64_t masks_at = layout.add<int32_t>(size * read), zeros_at = layout.add<float>(read);
  const int64_t copy_at = layout.add<float>(height * width + read + kLanes);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  int32_t* masks = reinterpret_cast<int32_t*>(memory + masks_at);
  float* zeros = reinterpret_cast<float*>(memory + zeros_at);
  float* copy = reinterpret_cast<float*>(memory + copy_at);
  std::fill_n(zeros, read, 0.f);
  std::fill_n(copy, height * width + read + kLanes, 0.f);
  for (int64_t t = 0; t < blocks.columns; t += lanes)
    for (int64_t x = 0; x < size; ++x)
      for (int64_t i = 0; i < lanes; ++i) {
        const int64_t column = step * (t + i) + x;
        masks[t * size + x * lanes + i] = column >= window.begin && column < window.end ? -1 : 0;
      }
  const int64_t begin = std::clamp<int64_t>(-window.y, 0, height);
  const int64_t end = std::clamp<int64_t>(planes.height - window.y, begin, height);
  const bool in_place = planes.scalar == Scalar::f32 && planes.column_stride == 1 && begin < end;
  const int64_t span = live_span(conv, unit.live, unit.live_count);
  float* const tails = points + blocks.tails(unit);
  for (int64_t point = 0; point < size * size && span > unit.live_count; ++point)
    std::fill_n(tails + point * slice, blocks.tail * span, 0.f);
  for (int64_t i = 0; i < unit.live_count; ++i) {
    const Route& route = unit.live[i];
    const int64_t offset = plane_offset(planes, unit.source_frame + !route.here, route) +
                           window.y * planes.row_stride + window.x;
    PixelRows rows = {static_cast<const float*>(planes.data), offset, planes.row_stride, begin, end, zeros};
    // Whole vectors must not leave the tensor.
    if (!in_place || (route.here && route.next) || offset + begin * planes.row_stride < 0 ||
        offset + (end - 1) * planes.row_stride + read > planes.extent) {
      copy_route(copy, width, planes, unit.source_frame, route, window);
      rows = {copy, 0, width, 0, height, zeros};
    }
    float* const to = points + i * blocks.count;
    transform(rows, masks, blocks.rows, blocks.columns, to, slice, rows_ahead(planes, unit, i, window));
    const int64_t number = live_number(conv, route) - live_number(conv, unit.live[0]);
    for (int64_t t = 0; t < blocks.tail; ++t)
      for (int64_t point = 0; point < size * size; ++point)
        tails[point * slice + t * span + number] = to[point * slice + blocks.count - blocks.tail + t];
  }
}

// The source of the tile that a thread takes next, to be fetched from memory next to the products of this one, a line
// of every channel at a time: all at once they would keep the products waiting.
class SourceAhead {
 public:
  // steps: room for one per live channel; turns: how often `add_to` is going to be called.
  SourceAhead(const Convolution& conv, const Unit& unit, const Tile& tile, int64_t height, int64_t y, Step* steps,
              int64_t turns)
      : steps_(steps), turns_(turns) {
    const Planes& planes = conv.source;
    const bool in_rows = planes.scalar == Scalar::f32 && planes.column_stride == 1;
    if (tile.next == 0 || !in_rows || planes.extent > INT32_MAX) return;
    data_ = static_cast<const float*>(planes.data) + plane_offset(planes, unit.source_frame, {}) +
            y * planes.row_stride + tile.next;
    line_count_ = (height * planes.row_stride + kLine - 1) / kLine;
    for (int64_t i = 0; i < unit.live_count; ++i)
      steps[i] = {0, int32_t(plane_offset(planes, !unit.live[i].here, unit.live[i]))};
  }

  // Whether `product` is to fetch some lines, as many as keep the turns even.
  bool add_to(Product& product, int64_t pixels) {
    if (line_ * turns_ > line_count_ * turn_++ || line_ >= line_count_) return false;
    product.line = data_ + line_ * kLine;
    product.line_steps = steps_;
    line_ += product.term_count * std::max<int64_t>(1, pixels / (kVectors * kLanes));
    return true;
  }

 private:
  Step* steps_;
  const float* data_ = nullptr;
  int64_t line_count_ = 0, line_ = 0, turns_, turn_ = 0;
};

// Multiplies and stores the rows of a tile. Sum by sum, so that what one of them reads stays close for all rows.
template <typename Method>
inline void multiply_unit(const Convolution& conv, const Unit& unit, const Tile& tile, const float* points,
                          Scratch& scratch) {
  constexpr int size = Method::size, sums = Method::sums, outputs = Method::outputs;
  constexpr int64_t kFinished = 4;  // rows at a time: what was stored just before is slow to load at other offsets
  const Blocks blocks(tile);
  const int64_t slice = blocks.slice(conv, unit), row_count = tile.row_end - tile.row_begin;
  Layout layout;
  const int64_t products_at = layout.add<float>(row_count * sums * sums * blocks.room);
  const int64_t finished_at = layout.add<float>(kFinished * outputs * outputs * blocks.room);
  const int64_t steps_at = layout.add<Step>(unit.live_count);
  const int64_t line_steps_at = layout.add<Step>(unit.live_count);
  const int64_t segments_at = layout.add<Segment>(outputs * blocks.rows);
  // Rows are short, so those that are to go past the caches are joined first.
  const int64_t hop = conv.target_step_x * conv.target.column_stride;
  const int64_t tile_row = outputs * tile.y_begin, width = conv.grid_width;
  const int64_t tile_points = std::min(outputs * blocks.rows, conv.grid_height - tile_row) * width;
  const bool joins = conv.target.streamed && !conv.accumulates && hop == 1 &&
                     conv.target_step_y * conv.target.row_stride == width;
  const int64_t joined_at = layout.add<float>(joins ? tile_points + kLanes : 0);
  char* memory = static_cast<char*>(scratch.reserve(layout.bytes()));
  float* products = reinterpret_cast<float*>(memory + products_at);
  float* finished = reinterpret_cast<float*>(memory + finished_at);
  Step* steps = reinterpret_cast<Step*>(memory + steps_at);
  Segment* segments = reinterpret_cast<Segment*>(memory + segments_at);
  float* joined = reinterpret_cast<float*>(memory + joined_at);

  for (int64_t i = 0; i < unit.live_count; ++i)
    steps[i] = {int32_t(live_number(conv, unit.live[i])), int32_t(i * blocks.count)};
  const int64_t line = outputs * blocks.room;  // what one row of every block takes
  int64_t segment_count[outputs] = {};
  for (int64_t y = 0; y < blocks.rows; ++y)
    for (int64_t part = 0; part < outputs; ++part) {
      const int64_t row = tile_row + outputs * y + part;
      if (row < conv.grid_height)
        segments[part * blocks.rows + segment_count[part]++] = {outputs * y * blocks.columns,
                                                                target_offset(conv, row, 0), conv.grid_width};
    }

  const int64_t groups = (row_count + kRows - 1) / kRows;
  SourceAhead source_ahead(conv, unit, tile, Method::step * blocks.rows + size - Method::step,
                           Method::step * tile.y_begin + first_tap(conv).dy,
                           reinterpret_cast<Step*>(memory + line_steps_at), sums * sums * groups);
  const float zero[kRows] = {};
  const int64_t row_room = sums * sums * blocks.room;
  const int64_t tail = unit.live_count > 0 ? blocks.tail : 0;
  for (int sum = 0; sum < sums * sums; ++sum) {
    Term terms[size * size];
    int64_t term_count = 0;
    for (int y = 0; y < size; ++y)
      for (int x = 0; x < size; ++x)
        if (Method::sum[y] * sums + Method::sum[x] == sum)
          terms[term_count++] = {((outputs + 2) * Method::kernel[y] + Method::kernel[x]) * conv.winograd.point_stride,
                                 (size * y + x) * slice};
    // All rows read what the first-level cache holds of a sum's points before they go on to the next blocks.
    const int64_t end = blocks.count - tail, span = close_pixels(term_count * unit.live_count);
    for (int64_t at = 0; at == 0 || at < end; at += span)
      for_row_groups(0, row_count, [&](int64_t first, int64_t count) {
        const float* rows[kRows];
        for (int64_t r = 0; r < count; ++r)
          rows[r] = conv.winograd.row(unit.rows[tile.row_begin + first + r].channel);
        Product product = {rows, steps, unit.live_count, points + at, zero, terms, term_count};
        float* out = products + first * row_room + sum * blocks.room;
        const int64_t pixels = std::min(span, end - at);
        const bool fetches = at == 0 && source_ahead.add_to(product, pixels);
        const auto run = fetches ? multiply<kLines, false, NoMore> : multiply<0, false, NoMore>;
        run(product, count, pixels, out + at, row_room, NoMore());
        if (at + span < end || tail == 0) return;
        Product last = product;
        last.source = points + blocks.tails(unit);
        last.step_count = live_span(conv, unit.live, unit.live_count);
        dot(last, count, tail, out + end, row_room);
      });
  }
  const Activation activation = conv.accumulates ? Activation::none : conv.activation;
  for (int64_t first = 0; first < row_count; first += kFinished) {
    const int64_t end = std::min(first + kFinished, row_count);
    float* output = finished;
    for (int64_t r = first; r < end; ++r, output += outputs * line)
      transform_back<Method>(products + r * row_room, blocks.room, blocks.count,
                             conv.bias ? conv.bias[unit.rows[tile.row_begin + r].channel] : 0.f, activation, output,
                             line);
    output = finished;
    for (int64_t r = first; r < end; ++r, output += outputs * line) {
      const Route& route = unit.rows[tile.row_begin + r];
      if (joins) {
        for (int64_t y = 0; y * width < tile_points; ++y)
          store_run(joined + y * width, output + y % outputs * line + y / outputs * outputs * blocks.columns, width, 1);
        const Segment whole = {0, target_offset(conv, tile_row, 0), tile_points};
        store_route(conv.target, hop, unit.frame, route, joined, &whole, 1);
        continue;
      }
      for (int part = 0; part < outputs; ++part) {
        float* const lines = output + part * line;
        const Segment* list = segments + part * blocks.rows;
        if (conv.accumulates) {
          add_target(conv.target, hop, unit.frame, route, lines, list, segment_count[part]);
          activate(conv.activation, lines, outputs * blocks.count);
        }
        store_route(conv.target, hop, unit.frame, route, lines, list, segment_count[part]);
      }
    }
  }
}

void convolve_winograd(const Convolution& conv, const Unit& unit, const Tile& tile, Scratch& scratch) {
  float* points = static_cast<float*>(scratch.reserve(winograd_points_size(conv, unit, tile) * 4, 1));
  with_method(conv, [&](auto method) {
    using Method = decltype(method);
    transform_unit<Method>(conv, unit, tile, points, scratch);
    const int64_t fitting = kSumBytes / (4 * Method::sums * Method::sums * Blocks(tile).room);
    const int64_t row_count = tile.row_end - tile.row_begin, parts = row_count / std::max<int64_t>(kRows, fitting) + 1;
    for (int64_t p = 0; p < parts; ++p) {
      Tile part = tile;
      part.row_begin = tile.row_begin + row_count * p / parts;
      part.row_end = tile.row_begin + row_count * (p + 1) / parts;
      if (p + 1 < parts) part.next = 0;
      multiply_unit<Method>(conv, unit, part, points, scratch);
    }
  });
}

}  // namespace
}  // namespace adakernels
