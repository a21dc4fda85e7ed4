// The one inner kernel: rows of weights given by pointers times vectors of pixels given by offsets.
#pragma once

#include <limits>
#include <utility>

#include "simd.h"

namespace adakernels {
namespace {

// One step of the reduction: where its weight lies in a row and where its pixels lie in the source.
struct Step {
  int32_t weight, source;
};

// An offset of all steps.
struct Term {
  int64_t weight, source;
};

constexpr Term kPlainTerm = {0, 0};

// Floats of a cache line.
constexpr int64_t kLine = kLineBytes / sizeof(float);

// Instead of a number of vectors to fetch: a line of its own at each step of each term.
constexpr int kLines = -1;

// The two factors of a product: rows[r][steps[k].weight] and source[steps[k].source + p], by all terms.
struct Product {
  const float* const* rows;
  const Step* steps;
  int64_t step_count;
  const float* source;
  const float* start;  // what row r is added to; null: what `out` holds
  const Term* terms = &kPlainTerm;
  int64_t term_count = 1;
  float floor = -std::numeric_limits<float>::infinity();  // what results below it become
  int64_t ahead = 0;  // from the source to what is to be fetched from memory meanwhile, in elements
  // With kLines: term t fetches line[line_steps[k].source + t * kLine] at its step k, and the next tile what follows.
  const float* line = nullptr;
  const Step* line_steps = nullptr;
};

// out[r][p] = max(floor, start[r] + sum_t sum_k rows[r][terms[t].weight + steps[k].weight]
//                                               * source[terms[t].source + steps[k].source + p])
// for r < row_count and p < vectors * lanes; NaN stays NaN. Rows are pointers, so any list of channels costs nothing.
// With `prefetches` so many vectors of pixels are fetched ahead at each step, for sources that no copy brings close; or,
// with kLines, a line that the product names. Narrow tiles fetch nothing.
template <int row_count, int vectors, int lanes, int prefetches>
void gemm_tile(const Product& product, float* out, int64_t out_stride) {
  using V = Vector<lanes>;
  V sum[row_count][vectors];
  const float* row[row_count];
  [[maybe_unused]] const float* line = product.line;
#pragma GCC unroll 16
  for (int r = 0; r < row_count; ++r) {
    row[r] = product.rows[r];
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      sum[r][v] = product.start ? broadcast<lanes>(product.start[r]) : load<lanes>(out + r * out_stride + v * lanes);
  }
  for (const Term *term = product.terms, *terms_end = term + product.term_count; term != terms_end; ++term) {
    const float* source = product.source + term->source;
    [[maybe_unused]] const Step* line_step = product.line_steps;
    for (const Step *step = product.steps, *end = step + product.step_count; step != end; ++step) {
      const int64_t at = term->weight + step->weight;
      const float* pixels = source + step->source;
      V b[vectors];
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) b[v] = load<lanes>(pixels + v * lanes);
#pragma GCC unroll 16
      for (int v = 0; v < prefetches; ++v) __builtin_prefetch(pixels + product.ahead + v * lanes, 0, 2);
      if constexpr (prefetches == kLines) __builtin_prefetch(line + line_step++->source, 0, 2);
#pragma GCC unroll 16
      for (int r = 0; r < row_count; ++r) {
        const V a = broadcast<lanes>(row[r][at]);
#pragma GCC unroll 16
        for (int v = 0; v < vectors; ++v) sum[r][v] += a * b[v];
      }
    }
    if constexpr (prefetches == kLines) line += kLine;
  }
  const V floor = broadcast<lanes>(product.floor);
#pragma GCC unroll 16
  for (int r = 0; r < row_count; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v)
      store<lanes>(out + r * out_stride + v * lanes, sum[r][v] < floor ? floor : sum[r][v]);
}

// The sum of a vector's lanes.
inline float sum_lanes(Vector<kLanes> v) {
#pragma GCC unroll 4
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    typename VectorOf<kLanes>::integer index;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) index[i] = i ^ distance;
    v += __builtin_shuffle(v, index);
  }
  return v[0];
}

// The same for pixels that follow one another by whole reductions, source[p * step_count + k], and for weights that lie
// side by side from the first step's on: vectors run over the reduction, so a few pixels don't leave vectors empty.
template <int row_count>
void dot_tile(const Product& product, int64_t count, float* out, int64_t out_stride) {
  const int64_t step_count = product.step_count, whole = step_count / kLanes * kLanes;
  for (int64_t p = 0; p < count; ++p) {
    Vector<kLanes> sum[row_count] = {};
    float rest[row_count] = {};
    for (int64_t t = 0; t < product.term_count; ++t) {
      const int64_t at = product.terms[t].weight + product.steps[0].weight;
      const float* pixel = product.source + product.terms[t].source + p * step_count;
      for (int64_t k = 0; k < whole; k += kLanes) {
        const Vector<kLanes> b = load<kLanes>(pixel + k);
#pragma GCC unroll 16
        for (int r = 0; r < row_count; ++r) sum[r] += load<kLanes>(product.rows[r] + at + k) * b;
      }
      for (int64_t k = whole; k < step_count; ++k)
        for (int r = 0; r < row_count; ++r) rest[r] += product.rows[r][at + k] * pixel[k];
    }
#pragma GCC unroll 16
    for (int r = 0; r < row_count; ++r) {
      float& to = out[r * out_stride + p];
      to = (product.start ? product.start[r] : to) + sum_lanes(sum[r]) + rest[r];
      to = to < product.floor ? product.floor : to;
    }
  }
}

template <int... rows>
inline void pick_dot(const Product& product, int64_t row_count, int64_t count, float* out, int64_t out_stride,
                     std::integer_sequence<int, rows...>) {
  constexpr void (*functions[])(const Product&, int64_t, float*, int64_t) = {dot_tile<rows + 1>...};
  functions[row_count - 1](product, count, out, out_stride);
}

// Of up to kRows rows.
inline void dot(const Product& product, int64_t row_count, int64_t count, float* out, int64_t out_stride) {
  pick_dot(product, row_count, count, out, out_stride, std::make_integer_sequence<int, kRows>());
}

// Of at least as many pixels half a vector costs less than vectors over the reduction.
constexpr int kMostDots = kLanes / 4;

using TileFunction = void (*)(const Product&, float*, int64_t);

template <int vectors, int lanes, int prefetches, int... rows>
constexpr TileFunction pick_rows(int64_t row_count, std::integer_sequence<int, rows...>) {
  constexpr TileFunction functions[] = {gemm_tile<rows + 1, vectors, lanes, prefetches>...};
  return functions[row_count - 1];
}

// A register tile for up to kRows rows.
template <int vectors, int lanes = kLanes, int prefetches = 0>
inline TileFunction tile_for(int64_t row_count) {
  return pick_rows<vectors, lanes, prefetches>(row_count, std::make_integer_sequence<int, kRows>());
}

// A single row takes as many vectors as keep the multipliers busy.
constexpr int kSingleRowVectors = 8;

// The widest tile, in pixels: what may be read past the last pixel, and the room that a tile's result needs.
constexpr int kTilePixels = kSingleRowVectors * kLanes;

// Multiplies `count` pixels, register tile by register tile. Pixel i of row r goes to out[r * row_stride + i], or, with
// `reuse`, to the same place for every tile, at most kTilePixels a row. Calls done(first, count) after each tile.
template <int prefetches, bool reuse, typename Done>
inline void multiply(const Product& product, int64_t row_count, int64_t count, float* out, int64_t row_stride,
                     const Done& done) {
  constexpr int half = kLanes / 2;
  Product tile = product;
  for (int64_t at = 0; at < count;) {
    const int64_t left = count - at;
    TileFunction function;
    int64_t width;
    if (row_count == 1 && left >= kTilePixels) {
      function = gemm_tile<1, kSingleRowVectors, kLanes, (prefetches > 0 ? kSingleRowVectors : prefetches)>;
      width = kTilePixels;
    } else if (left > (kVectors - 1) * kLanes + (kHalfIsCheaper ? half : 0)) {
      function = tile_for<kVectors, kLanes, prefetches>(row_count), width = kVectors * kLanes;
    } else if (kHalfIsCheaper && left <= half) {
      function = tile_for<1, half>(row_count), width = half;
    } else if (kVectors > 2 && left > kLanes + (kHalfIsCheaper ? half : 0)) {
      function = tile_for<2>(row_count), width = 2 * kLanes;
    } else {
      function = tile_for<1>(row_count), width = kLanes;
    }
    tile.source = product.source + at;
    function(tile, reuse ? out : out + at, row_stride);
    if constexpr (prefetches == kLines) tile.line += tile.term_count * kLine;
    done(at, left < width ? left : width);
    at += width;
  }
}

// For `multiply` where nothing is left to do.
struct NoMore {
  void operator()(int64_t, int64_t) const {}
};

// Spreads rows evenly over register tiles, so that no tile is left with one row: calls use(first, count).
template <typename Use>
inline void for_row_groups(int64_t begin, int64_t end, const Use& use) {
  const int64_t total = end - begin, groups = (total + kRows - 1) / kRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = begin + total * g / groups;
    use(first, begin + total * (g + 1) / groups - first);
  }
}

}  // namespace
}  // namespace adakernels
